"""The system's page cache, and models that are too large to stay there.

Where all that a merge reads and writes does not fit, a later merge finds none of it there. Dropped behind the merge,
its pages are used over and over, which costs far less than taking new ones for which others have to go.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")


def can_hold(size: int) -> bool:
    """Whether ``size`` bytes of files may stay in the page cache; True where the system does not say."""
    try:
        found = re.search(r"^MemAvailable: *(\d+) kB", _MEMINFO.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return True
    return found is None or size <= 1024 * int(found[1])


def drop(descriptor: int, start: int, stop: int) -> None:
    """Have bytes ``start`` … ``stop`` of an open file leave the page cache, those that are not on the disk yet after
    they have been written there; where the system takes no such advice, nothing happens.

    Large pages go only where the whole of one lies in the range, so that ranges had better overlap.
    """
    start = max(0, start)
    if start < stop and hasattr(os, "posix_fadvise"):  # a length of 0 would mean all that follows
        with suppress(OSError):  # a merge does not depend on it
            os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)
