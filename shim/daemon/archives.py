"""Archives as sources of layers: what a prepared tree's meta says of one becomes an open source of bytes."""

from __future__ import annotations

import os
import stat
from array import array
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from shim.archive.source import ArchiveBytes, FileReader, Reader, S3Reader
from shim.errors import CacheError, IndexFormatError
from shim.settings import Settings
from shim.stores import urls
from shim.stores.s3 import S3Store, options_of

_PUT_BACK = "put it back, or start a container with the archive again"
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def note(directory: Path, fd: int) -> None:
    """Remember in a tree's directory where its archive was, for a daemon that comes after this one."""
    try:
        name = os.readlink(f"/proc/self/fd/{fd}")
        temporary = directory / "archive.tmp"
        temporary.write_bytes(os.fsencode(name))
        temporary.rename(directory / "archive")
    except OSError as error:
        raise CacheError(f"cannot note where the archive is: {error.strerror}") from error


def source(meta: dict[str, Any], directory: Path, fd: int | None, settings: Settings) -> ArchiveBytes | None:
    """The archive that a tree's layer lies in; None for a tree whose layers are in a registry.

    fd: the archive, when it is a file that came with the request; else the one that was noted last is opened.
    Raises IndexFormatError (no archive is there), CacheError (the tree's directory is damaged), ConfigError.
    """
    location = meta.get("archive")
    if location is None:
        return None
    numbers = array("Q")
    try:
        numbers.frombytes((directory / "pieces").read_bytes())
    except (OSError, ValueError) as error:
        raise CacheError(f"{directory}/pieces is damaged: {error}") from error
    return ArchiveBytes(_reader(location, directory, fd, settings), numbers)


def _reader(location: str, directory: Path, fd: int | None, settings: Settings) -> Reader:
    if location:
        place = urls.parse(location)
        assert isinstance(place, urls.S3Place)  # the index's reader saw to that
        return S3Reader(S3Store(place, options_of(settings["stores.s3"], place.bucket)), place)
    if fd is not None:
        return FileReader(fd)
    try:
        own = os.open((directory / "archive").read_bytes(), _OPEN)
    except OSError as error:
        raise IndexFormatError(f"the archive is not where it was: {error.strerror}", hint=_PUT_BACK) from error
    try:
        if not stat.S_ISREG(os.fstat(own).st_mode):
            raise IndexFormatError("the archive is not where it was", hint=_PUT_BACK)
        return FileReader(own)
    finally:
        os.close(own)


class ArchiveStream:
    """A range of an archive's layer, with the methods of the registry's blob streams that `Layers` uses."""

    def __init__(self, archive: ArchiveBytes, start: int, end: int) -> None:
        self._opened: AbstractContextManager[Iterator[bytes]] = archive.open(start, end)
        self._chunks: Iterator[bytes] = iter(())

    def __enter__(self) -> ArchiveStream:
        self._chunks = self._opened.__enter__()
        return self

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks

    def report_corrupt(self) -> None:
        """There is no other host to ask."""

    def close(self) -> None:
        self._opened.__exit__(None, None, None)
