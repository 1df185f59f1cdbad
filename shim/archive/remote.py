"""Archives in S3: the small file that stands for one, and reading what an object is."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from shim.errors import IndexFormatError
from shim.goclip import files, write
from shim.index import codec, container
from shim.stores.s3 import S3Store
from shim.stores.urls import S3Place


@contextmanager
def reading(path: Path, *, follow: bool = False) -> Iterator[tuple[files.ReadAt, int]]:
    """A regular file as (read, size), for `goclip.files`. follow: `path` may be a symlink.

    Raises OSError, and IndexFormatError when it is something else or becomes shorter.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    with open(os.open(path, flags), "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise IndexFormatError(f"{path} is not a regular file")

        def read(offset: int, length: int) -> bytes:
            data = os.pread(file.fileno(), length, offset)
            if len(data) != length:
                raise IndexFormatError(f"{path} is cut short")
            return data

        yield read, os.fstat(file.fileno()).st_size


def pointer(archive: Path, place: S3Place, options: Mapping[str, Any]) -> bytes:
    """The file that stands for `archive`, a file of ours, when it lies at `place`: Go clip's pointer, and our index.

    options: of `stores.s3` for the bucket. Raises IndexFormatError: it is no archive that `clip-shim archive` made.
    """
    with reading(archive) as (read, size):
        header = files.read_header(read, size)
        nodes = read(header.index, header.index_length)
        if not container.start_of_part(read, size):
            raise IndexFormatError(f"{archive} has no index of ours", hint="make it with `clip-shim archive`")
    index = codec.read_index(archive)
    if index.archive is None:
        raise IndexFormatError(f"{archive} is an index, not an archive", hint="make one with `clip-shim archive`")
    index.archive = replace(index.archive, location=str(place))
    info = files.S3Place(
        place.bucket,
        place.key,
        options.get("region", ""),
        options.get("endpoint", ""),
        bool(options.get("path_style", False)),
    )
    return write.encode_pointer(nodes, info) + codec.encode(index)


def read_index(store: S3Store, place: S3Place) -> bytes | None:
    """The index of the archive at `place`, saying so; None when the object is something else or a foreign archive.

    Its end alone is fetched. Raises AbsentError, StoreError, IndexFormatError.
    """
    size = store.size(place) or 0

    def read(offset: int, length: int) -> bytes:
        return store.read(place, offset, length)

    if not files.is_go(read(0, min(size, len(files.MAGIC)))):
        return None
    start = container.start_of_part(read, size)
    if not start:
        return None
    index = codec.decode(read(start, size - start))
    if index.archive is None:
        return None
    if not index.archive.location:
        index.archive = replace(index.archive, location=str(place))
    return codec.encode(index)
