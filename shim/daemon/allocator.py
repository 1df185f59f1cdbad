"""The C library's allocator in a process that fetches: spans of half a megabyte come and go by the hundred a second."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_TRIM_THRESHOLD = -1  # mallopt(3)
_M_MMAP_THRESHOLD = -3
_KEPT = 8 << 20  # bytes that an arena may keep when they are freed …
_MAPPED = 4 << 20  # … and the size from which memory is mapped for itself

_libc = ctypes.CDLL(None)


def keep() -> None:
    """Have freed memory kept for the next span. By default glibc gives it back at once: each span then costs a system
    call or two and 128 page faults, together a tenth of the time of a fetch. Nothing where the C library is another."""
    with suppress(AttributeError):
        _libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED)
        _libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)


def trim() -> None:
    """Give back what is kept and not used: malloc_trim(3)."""
    with suppress(AttributeError):
        _libc.malloc_trim(0)
