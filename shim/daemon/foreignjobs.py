"""Jobs about Go clip's files: what decodes gob or reads whole archives, kept out of the server."""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from shim import log
from shim.archive import remote
from shim.archive.convert import convert
from shim.archive.source import FileReader, S3Reader
from shim.cache.seed import Seed
from shim.daemon.indexfile import identity
from shim.errors import IndexFormatError
from shim.goclip import files
from shim.index import codec
from shim.registry.ref import ImageRef
from shim.settings import Settings
from shim.stores.s3 import S3Store, options_of
from shim.stores.urls import S3Place


@dataclass(frozen=True, slots=True)
class Look:
    """What a Go clip file leads to, and a name of its own: a hash of its index and place, and, where the data are in
    the file itself, of which file it is."""

    place: files.S3Place | files.OciPlace | None
    key: str


def look(path: str) -> Look:
    """What the Go clip file at `path` is. Raises IndexFormatError."""
    with remote.reading(Path(path), follow=True) as (read, size):
        clip = files.read(read, size, nodes=False)
        header = files.read_header(read, size)
        check = sha256(repr(clip.place).encode())
        check.update(read(header.index, header.index_length))
        if clip.place is None:  # its index says nothing of what its data are: each file has an index of its own
            check.update(repr(identity(os.stat(path))).encode())
    return Look(clip.place, check.hexdigest())


def image_of(place: files.OciPlace) -> ImageRef:
    """The image that a v2 index is of. Raises ImageReferenceError, IndexFormatError."""
    host = place.registry.partition("://")[2] or place.registry
    if host in ("registry-1.docker.io", "index.docker.io"):
        host = "docker.io"
    if not host or not place.repository:
        raise IndexFormatError("the Go clip file does not say which image it is of")
    sign = "@" if place.reference.startswith("sha256:") else ":"
    return ImageRef.parse(f"{host}/{place.repository}{sign}{place.reference or 'latest'}", local_paths=False)


def index_archive(settings: Settings, path: str, place: files.S3Place | None, out: str) -> None:
    """Write the native index of a foreign v1 archive to `out`: of the file at `path`, or of the object it points to."""
    if place is None:
        with remote.reading(Path(path), follow=True) as (read, size):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            reader = FileReader(fd)
            os.close(fd)
            index = convert(read, size, reader, "")
        codec.write_index(out, index)
        return
    where = S3Place(place.bucket, place.key)
    store = S3Store(where, options_of(settings["stores.s3"], place.bucket))
    data = remote.read_index(store, where)
    if data is None:
        seed = Seed(settings.state_dir / "cache", settings["cache.free_low"])
        try:
            size = store.size(where) or 0
            source = S3Reader(store, where)
            index = convert(
                lambda at, length: store.read(where, at, length), size, source, str(where), on_data=seed.write
            )
            if not seed.keep(index.layers[0]) and seed.failed is not None:
                log.warning("the cache was not filled", error=str(seed.failed))
        finally:
            seed.close()
        data = codec.encode(index)
    codec.write_file(Path(out), data)
