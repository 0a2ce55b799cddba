"""The C library's allocator, told what a merge does with memory."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # <malloc.h> of glibc


def keep_freed_memory(largest: int = 2**30) -> bool:
    """Have this process keep the memory that it frees, in pieces of up to ``largest`` bytes, for its next allocation.

    glibc hands large blocks back to the system at once, so that every activation of a forward pass is paged in and
    cleared anew; keeping them makes forward passes on the CPU up to half as fast again. What one thread has freed is
    kept for all: otherwise each of many passes side by side would keep its own. It concerns the whole process, which is
    why the command line does it and the library does not. What is kept lies in pieces between what is used: a merge
    that counts on the memory of one block of a model has its large tensors handed back.

    Returns whether the allocator took it.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    options = {_M_MMAP_THRESHOLD: largest, _M_TRIM_THRESHOLD: 2**31 - 1, _M_ARENA_MAX: 1}
    return all(mallopt(option, value) for option, value in options.items())
