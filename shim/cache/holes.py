"""Holes in a sparse file: fallocate(2), which Python's os module does not have."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator

_PUNCH_HOLE = 3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE

_libc = ctypes.CDLL(None, use_errno=True)


def contiguous(spans: list[int]) -> Iterator[tuple[int, int]]:
    """(first, stop) of each stretch of consecutive numbers in an ascending list."""
    first = previous = spans[0]
    for span in spans[1:]:
        if span != previous + 1:
            yield first, previous + 1
            first = span
        previous = span
    yield first, previous + 1


def punch(fd: int, offset: int, length: int) -> None:
    """fallocate(2): deallocate whole blocks, zero the rest. A file system that cannot keeps the space."""
    if _libc.fallocate(fd, _PUNCH_HOLE, ctypes.c_int64(offset), ctypes.c_int64(length)):
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(code, os.strerror(code))
