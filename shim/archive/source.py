"""An archive as a source of a layer's bytes: a local file, or an object in S3 that is read by ranges."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from shim.errors import IntegrityError, LayerError, StoreError
from shim.layers.source import Source
from shim.stores.s3 import S3Store
from shim.stores.urls import S3Place

_CHUNK = 1 << 18
_NEAR = 1 << 18  # bytes between two pieces that are rather read over than asked for anew


class Reader(Protocol):
    """The archive's bytes. `place`: for messages, and to know two of the same archive. Thread-safe."""

    place: str

    def stream(self, start: int, end: int) -> AbstractContextManager[Iterable[bytes]]:
        """Bytes [start, end) in chunks. It, and its iteration, raise StoreError; a shorter archive is just shorter."""


class FileReader:
    """A local archive, by its open descriptor, of which it keeps one of its own. Close it when done."""

    def __init__(self, fd: int) -> None:
        self._fd = os.dup(fd)
        self.place = f"the file {os.readlink(f'/proc/self/fd/{fd}')}"

    @contextmanager
    def stream(self, start: int, end: int) -> Iterator[Iterable[bytes]]:
        yield self._chunks(start, end)

    def _chunks(self, start: int, end: int) -> Iterator[bytes]:
        at = start
        while at < end:
            try:
                data = os.pread(self._fd, min(_CHUNK, end - at), at)
            except OSError as error:
                raise StoreError(f"{self.place} cannot be read: {error.strerror}") from error
            if not data:
                return
            at += len(data)
            yield data

    def close(self) -> None:
        """Harmless twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    __del__ = close


class S3Reader:
    """An archive in S3."""

    def __init__(self, store: S3Store, place: S3Place) -> None:
        self._store = store
        self._place = place
        self.place = str(place)

    def stream(self, start: int, end: int) -> AbstractContextManager[Iterable[bytes]]:
        return self._store.stream(self._place, start, end)


class ArchiveBytes:
    """The layer that an archive is: pieces of it, and zeros between them (`model.Archive`)."""

    def __init__(self, reader: Reader, numbers: Sequence[int]) -> None:
        """numbers: the pieces, as `archived.flat` gives them."""
        self.reader = reader
        self._layer = numbers[0::3]
        self._archive = numbers[1::3]
        self._length = numbers[2::3]

    @property
    def is_remote(self) -> bool:
        """Whether it is somewhere else than on this machine."""
        return not isinstance(self.reader, FileReader)

    @contextmanager
    def open(self, start: int, end: int) -> Iterator[Iterator[bytes]]:
        """Bytes [start, end) of the layer. Iterating raises StoreError, and IntegrityError if the archive is short."""
        chunks = self._chunks(start, end)
        try:
            yield chunks
        finally:
            chunks.close()

    def read(self, start: int, end: int) -> bytes:
        """The same at once."""
        with self.open(start, end) as chunks:
            return b"".join(chunks)

    def _plan(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """What makes up [start, end): (zeros, offset in the archive, length), in order."""
        plan = []
        at = start
        i = max(0, bisect_right(self._layer, start) - 1)
        while at < end and i < len(self._layer):
            low, high = max(at, self._layer[i]), min(end, self._layer[i] + self._length[i])
            if low < high:
                plan.append((low - at, self._archive[i] + low - self._layer[i], high - low))
                at = high
            i += 1
            if i < len(self._layer) and self._layer[i] >= end:
                break
        if at < end:
            plan.append((end - at, 0, 0))
        return plan

    def _chunks(self, start: int, end: int) -> Generator[bytes, None, None]:
        for group in _groups(self._plan(start, end)):
            first = next((offset for _, offset, length in group if length), 0)
            last = max((offset + length for _, offset, length in group if length), default=0)
            with self.reader.stream(first, last) as raw:
                source = Source(raw, first)
                for zeros, offset, length in group:
                    yield from _zeros(zeros)
                    try:
                        if length:
                            source.skip(offset - source.offset)
                        for at in range(0, length, _CHUNK):
                            yield source.take(min(_CHUNK, length - at))
                    except LayerError as error:
                        raise IntegrityError(
                            f"{self.reader.place} is shorter than it was", hint="make it again"
                        ) from error


def _groups(plan: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Parts of a plan that one request is for."""
    group: list[tuple[int, int, int]] = []
    end = 0
    for item in plan:
        _, offset, length = item
        if group and length and end and offset - end > _NEAR:
            yield group
            group = []
        group.append(item)
        if length:
            end = offset + length
    if group:
        yield group


def _zeros(count: int) -> Iterator[bytes]:
    while count > 0:
        step = min(count, _CHUNK)
        yield bytes(step)
        count -= step
