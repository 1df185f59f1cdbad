"""The data part of an archive, written in one pass: Go's blocks, and the SHA-256 of each span of it.

    0          54-byte header (written last)
    512 k - 1  a block: its type byte (0), …
    512 k      … a file's bytes, and their CRC-64/GO-ISO, big-endian
    …          zeros up to the next block

Go finds data by position, so the gaps are allowed; they put every file's data at a multiple of 512, which is what lets
the kernel map it. The layer of our index is the data part from BASE on.
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass
from hashlib import sha256
from queue import SimpleQueue
from threading import BoundedSemaphore, Thread

from fastcrc import crc64

from shim.cache.holes import punch
from shim.errors import LayerError, StoreError
from shim.index.model import BLOCK, Compression, Layer, Restart, SpanTable

BASE = 512
SPAN = 1 << 20
MEDIA_TYPE = "application/vnd.clip.archive.v1"
MAX_DATA = 1 << 40
MAX_HOLES = 4 << 30  # of one file: an archive holds them as zeros, which Go reads
_BUFFER = 4 << 20
_BUFFERS = 3
_ZEROS = bytes(1 << 20)


@dataclass(frozen=True, slots=True)
class Block:
    """A file's data in the archive. position: of the first byte in the file; content_hash: hex SHA-256."""

    position: int
    size: int
    content_hash: str


class BlockWriter:
    """Call `begin`, `write`/`zeros` until the size is reached, and again for the next file; then `finish`.

    One thread calls; another hashes spans and writes. What that one meets (a full disk) is raised by the next call.
    """

    def __init__(self, fd: int) -> None:
        """fd: a file open for reading and writing, empty."""
        self._fd = fd
        self._buffer = bytearray()
        self._flushed = BASE  # file offset of the buffer's first byte
        self._block: tuple[int, int] | None = None
        self._content = sha256()
        self._crc = 0
        self._left = 0
        self._digests: list[bytes] = []
        self._error: OSError | None = None
        self._slots = BoundedSemaphore(_BUFFERS)
        self._full: SimpleQueue[tuple[int, bytearray] | None] = SimpleQueue()
        self._thread: Thread | None = Thread(target=self._drain, name="archive-write", daemon=True)
        self._thread.start()

    @property
    def position(self) -> int:
        """Of the next byte."""
        return self._flushed + len(self._buffer)

    def begin(self, size: int) -> None:
        """A file of `size` bytes follows. Raises LayerError: the archive would be too large."""
        assert self._block is None
        at = self.position
        start = -(-(at + 1) // BLOCK) * BLOCK if at > BASE else BASE
        if start + size > MAX_DATA:
            raise LayerError(
                "the archive would be larger than 1 TiB", hint="archives are for smaller images: use `index`"
            )
        self._put(_ZEROS[: start - at])  # the type byte, 0, is the last of them
        self._block = (start, size)
        self._left = size
        self._content = sha256()
        self._crc = 0

    def write(self, data: bytes | memoryview) -> None:
        """The file's next bytes."""
        self._left -= len(data)
        self._content.update(data)
        self._crc = crc64.go_iso(data, self._crc)
        self._put(data)

    def zeros(self, count: int) -> None:
        """The same for a hole."""
        while count > 0:
            step = min(count, len(_ZEROS))
            self.write(_ZEROS[:step])
            count -= step

    def end(self) -> Block:
        """After the file's last byte."""
        assert self._block is not None
        assert self._left == 0
        start, size = self._block
        self._put(self._crc.to_bytes(8, "big"))
        self._block = None
        return Block(start, size, self._content.hexdigest())

    def _put(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            room = _BUFFER - len(self._buffer)
            self._buffer += view[:room]
            view = view[room:]
            if len(self._buffer) == _BUFFER:
                self._hand_over()

    def _hand_over(self) -> None:
        if self._error is not None:
            raise _disk(self._error)
        self._slots.acquire()
        self._full.put((self._flushed, self._buffer))
        self._flushed += len(self._buffer)
        self._buffer = bytearray()

    def _drain(self) -> None:
        while (job := self._full.get()) is not None:
            offset, buffer = job
            try:
                if self._error is None:
                    with memoryview(buffer) as view:
                        for at in range(0, len(view), SPAN):
                            self._digests.append(sha256(view[at : at + SPAN]).digest())
                        _write_at(self._fd, view, offset)
            except OSError as error:
                self._error = error
            finally:
                self._slots.release()

    def close(self) -> None:
        """End the thread. Harmless twice."""
        if self._thread is not None:
            self._full.put(None)
            self._thread.join()
            self._thread = None

    def finish(self, live: list[Block]) -> tuple[Layer, int]:
        """(the layer that the data part is, its end in the file). live: blocks that the tree refers to.

        Data of files that a higher layer replaced or removed were written before that was known: they become holes,
        so that an archive holds what the image shows and nothing else.
        """
        size = self.position - BASE
        self._hand_over()
        self.close()
        if self._error is not None:
            raise _disk(self._error)
        try:
            for start, end in _gaps(live, self.position):
                self._clear(start, end)
        except OSError as error:
            raise _disk(error) from error
        return layer_of(size, self._digests), self.position

    def _clear(self, start: int, end: int) -> None:
        punch(self._fd, start, end - start)  # where the file system cannot, the bytes stay: what is there is hashed
        for number in range((start - BASE) // SPAN, (end - 1 - BASE) // SPAN + 1):
            if number < len(self._digests):
                length = min(SPAN, self.position - BASE - number * SPAN)
                self._digests[number] = sha256(os.pread(self._fd, length, BASE + number * SPAN)).digest()


def layer_of(size: int, digests: list[bytes]) -> Layer:
    """A data part of `size` bytes as a layer: spans of SPAN bytes, each a place where reading can begin."""
    starts = array("Q", range(0, size, SPAN))
    starts.append(size)
    if not size:
        starts, digests = array("Q", [0]), []
    count = len(digests)
    name = "sha256:" + sha256(b"".join(digests)).hexdigest()
    spans = SpanTable(
        starts,
        array("Q", starts),
        bytearray(count),
        bytearray([Restart.STREAM]) * count,
        bytearray(b"".join(digests)),
        [b""] * count,
    )
    return Layer(name, name, size, size, MEDIA_TYPE, Compression.NONE, spans)


def _gaps(live: list[Block], end: int) -> list[tuple[int, int]]:
    """What lies between live blocks, each with its type byte and CRC, and is more than padding."""
    gaps = []
    at = BASE
    for block in sorted({(block.position, block.size) for block in live}):
        if block[0] - at > BLOCK:
            gaps.append((at, block[0] - 1))
        at = block[0] + block[1] + 8
    if end - at > BLOCK:
        gaps.append((at, end))
    return gaps


def _write_at(fd: int, view: memoryview, offset: int) -> None:
    at = 0
    while at < len(view):
        at += os.pwrite(fd, view[at:], offset + at)


def _disk(error: OSError) -> StoreError:
    return StoreError(f"the archive cannot be written: {error.strerror}", hint="is the disk full?")
