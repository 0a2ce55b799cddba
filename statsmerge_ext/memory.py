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
    mallopt = _of_glibc("mallopt")
    if mallopt is None:
        return False
    options = {_M_MMAP_THRESHOLD: largest, _M_TRIM_THRESHOLD: 2**31 - 1, _M_ARENA_MAX: 1}
    return all(mallopt(option, value) for option, value in options.items())


def give_back_freed_memory() -> None:
    """Hand back to the system what is freed at this moment, also where it lies between what is used.

    What different stages of a merge need never fits exactly into what earlier ones have left, so that kept memory grows
    from stage to stage. Where the allocator cannot do it, nothing happens.
    """
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str):
    """A function of glibc's allocator, None where there is another; musl has none of them."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
