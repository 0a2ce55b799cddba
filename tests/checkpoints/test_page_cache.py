"""What fits into the page cache, and what is dropped from it."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import pytest

from statsmerge_ext.checkpoints import page_cache

PAGE = mmap.PAGESIZE


@pytest.mark.parametrize(
    ("text", "largest"),
    [("MemTotal: 24105 kB\nMemFree:   9 kB\nMemAvailable:   21531 kB\n", 21531 * 1024), ("MemTotal: 24105 kB\n", None)],
)
def test_what_fits_is_what_the_system_has_available(tmp_path, monkeypatch, text, largest):
    (tmp_path / "meminfo").write_text(text)
    monkeypatch.setattr(page_cache, "_MEMINFO", tmp_path / "meminfo")
    assert page_cache.can_hold(largest or 2**60)
    assert largest is None or not page_cache.can_hold(largest + 1)


def test_a_system_that_does_not_say_holds_all(tmp_path, monkeypatch):
    monkeypatch.setattr(page_cache, "_MEMINFO", tmp_path / "none")
    assert page_cache.can_hold(2**60)


def pages_in_memory(path) -> list[bool]:
    """Which pages of a file the page cache holds."""
    size = path.stat().st_size
    found = (ctypes.c_ubyte * (size // PAGE))()
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), size) as view:
        start = ctypes.c_ubyte.from_buffer(view)
        result = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(size), found)
        del start
    assert result == 0
    return [bool(page & 1) for page in found]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mincore")
def test_bytes_that_are_on_the_disk_leave_the_page_cache(tmp_path):
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.write(bytes(4096 * PAGE))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if any(pages_in_memory(path)):
            pytest.skip("a file system in memory")
        path.read_bytes()
        page_cache.drop(file.fileno(), 8, 8)
        page_cache.drop(file.fileno(), -PAGE, 0)
        assert all(pages_in_memory(path))
        page_cache.drop(file.fileno(), -PAGE, 4096 * PAGE)
    assert not any(pages_in_memory(path))


def test_a_file_that_has_no_pages_is_left_alone():
    reading, writing = os.pipe()
    try:
        page_cache.drop(reading, 0, 10)
    finally:
        os.close(reading)
        os.close(writing)
