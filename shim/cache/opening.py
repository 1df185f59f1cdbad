"""A layer's files, opened: made if they are not there, as they are where the disk takes no writes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from shim.cache import bitmap

_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


def open_layer(path: Path, size: int, count: int, table_digest: bytes, meta: str) -> tuple[int, bytearray]:
    """(descriptor of `path`/data, one byte for each span: 1 if the bitmap has it). Raises OSError.

    size: of the data file; count, table_digest: of the spans; meta: text of a new meta.json. What does not fit is begun
    anew. On a read-only file system what is there is opened for reading: writes to it fail, as they should.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path / "data", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
        return _open_read_only(path, size, count, table_digest, error)
    try:
        flags = bitmap.load(path / "bitmap", count, table_digest)
        if flags is None or os.fstat(fd).st_size != size:
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size)
            (path / "bitmap").unlink(missing_ok=True)
            (path / "meta.json").write_text(meta)
            flags = bytearray(count)
        else:
            (path / "meta.json").touch(0o600)  # what is missing would never be cleaned
    except OSError:
        os.close(fd)
        raise
    return fd, flags


def _open_read_only(path: Path, size: int, count: int, table_digest: bytes, refused: OSError) -> tuple[int, bytearray]:
    fd = os.open(path / "data", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    flags = bitmap.load(path / "bitmap", count, table_digest)
    if flags is None or os.fstat(fd).st_size != size:
        os.close(fd)
        raise refused
    return fd, flags
