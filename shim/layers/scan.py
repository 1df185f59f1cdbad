"""One streaming pass over a layer: span table with restart points, digests of both sides, the tar's bytes on the way.

Three threads share the work: the caller hashes the compressed bytes, one decodes and makes the diff id, one makes the
spans' digests and calls back. Between them are bounded queues, so memory does not grow with the layer: about 16 MiB,
plus the span table itself (about 4 KiB a point), plus up to 128 MiB where a zstd frame asks for such a window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from threading import BoundedSemaphore, Lock, Thread
from types import TracebackType
from typing import ClassVar

from shim.index.model import WINDOW_SIZE, Compression, SpanTable
from shim.layers.decoders import SCANNERS, Writer, sniff
from shim.layers.source import Source
from shim.layers.spans import Batch, OnData, OnSpan, SpanBuilder

MIN_SPACING = 2 * WINDOW_SIZE  # below it the probes of two points would overlap
MAX_SPACING = 64 << 20
MAX_SPAN = 2 * MAX_SPACING  # a table with a longer span is refused, so that a reader can hold one
MAX_UNCOMPRESSED = 1 << 40

_PIECES_AHEAD = 4
# Large buffers: between two calls of inflate the decoder needs the GIL, which the other thread's Python may hold for a
# millisecond. Measured against bare zlib: 1.15 to 1.3 times with 512 KiB, 0.9 to 1.2 times with 2 MiB.
_BUFFER = 2 << 20
_BUFFERS = 4


@dataclass(frozen=True, slots=True)
class ScanResult:
    """What is known of a layer after its last byte. Digests are "sha256:<64 hex>", sizes bytes."""

    compression: Compression
    digest: str
    size: int
    diff_id: str
    uncompressed_size: int
    spans: SpanTable


class _StoppedError(Exception):
    """The other thread has failed, or the caller has given up: stop working."""


class LayerScanner:
    """Fed the compressed bytes in order, whatever their pieces; `finish` gives the result.

    compression: None finds it by magic bytes. spacing: least uncompressed distance of two restart points, MIN_SPACING
    to MAX_SPACING; digests come at a quarter of it. on_data gets the uncompressed bytes in order, on_span each finished
    span (number, all its bytes); both are called from one other thread, and the views are valid during the call only.
    What they raise comes out of `feed` or `finish`. Use it in a `with` block, or call `close`, so that no thread is
    left when the bytes stop coming.

    Equal bytes and equal spacing give equal tables.
    """

    piece_size: ClassVar[int] = 1 << 20  # compressed bytes are gathered, or cut, to about this many for the decoder

    def __init__(
        self,
        compression: Compression | None,
        spacing: int,
        on_data: OnData,
        on_span: OnSpan | None = None,
        *,
        max_uncompressed: int = MAX_UNCOMPRESSED,
    ) -> None:
        if not MIN_SPACING <= spacing <= MAX_SPACING:
            raise ValueError(f"spacing {spacing} is not between {MIN_SPACING} and {MAX_SPACING}")
        self._compression = compression
        self._builder = SpanBuilder(spacing, on_data, on_span)
        self._writer = Writer(spacing, max_uncompressed, self._acquire, self._publish)
        self._hash = hashlib.sha256()
        self._diff_hash = hashlib.sha256()
        self._hash_stream = True  # False: both digests are the same (an uncompressed layer)
        self._size = 0
        self._pending: list[bytes] = []  # fed, not yet handed to the decoder
        self._pending_size = 0
        self._closed = False
        self._error: BaseException | None = None
        self._lock = Lock()
        self._slots = BoundedSemaphore(_PIECES_AHEAD)
        self._chunks: SimpleQueue[bytes | None] = SimpleQueue()
        self._free: SimpleQueue[bytearray] = SimpleQueue()
        self._batches: SimpleQueue[Batch | None] = SimpleQueue()
        for _ in range(_BUFFERS):
            self._free.put(bytearray(_BUFFER))
        self._threads = (
            Thread(target=self._decode, name="layer-decode", daemon=True),
            Thread(target=self._digest, name="layer-digest", daemon=True),
        )
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> LayerScanner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def feed(self, chunk: bytes | bytearray | memoryview) -> None:
        """The next compressed bytes. May wait for the threads. Raises LayerError as soon as damage is seen."""
        if self._closed:
            raise ValueError("the scanner is finished")
        self._hash.update(chunk)
        self._size += len(chunk)
        view = memoryview(chunk)
        for start in range(0, len(view), self.piece_size):
            self._check()
            piece = view[start : start + self.piece_size]
            self._pending.append(chunk if isinstance(chunk, bytes) and len(piece) == len(chunk) else bytes(piece))
            self._pending_size += len(piece)
            if self._pending_size >= self.piece_size:
                self._hand_over()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _hand_over(self) -> None:
        piece = b"".join(self._pending)
        self._pending.clear()
        self._pending_size = 0
        self._slots.acquire()  # given back when the decoder takes the piece, in every case
        self._chunks.put(piece)

    def finish(self) -> ScanResult:
        """After the last byte. Raises LayerError if the stream is damaged or not complete."""
        if self._closed:
            raise ValueError("the scanner is finished")
        self._check()
        if self._pending:
            self._hand_over()
        self._join()
        self._check()
        spans, uncompressed = self._builder.finish(self._size)
        assert self._compression is not None
        digest = "sha256:" + self._hash.hexdigest()
        diff_id = "sha256:" + self._diff_hash.hexdigest() if self._hash_stream else digest
        return ScanResult(self._compression, digest, self._size, diff_id, uncompressed, spans)

    def close(self) -> None:
        """End the threads, whatever state the scan is in. Safe to call twice and after `finish`."""
        if not self._closed:
            self._fail(_StoppedError())
            self._join()

    def _join(self) -> None:
        self._closed = True
        self._chunks.put(None)
        for thread in self._threads:
            thread.join()
        self._free = SimpleQueue()  # the scanner and its threads are a cycle: not to hold the buffers until it is found

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None:
                self._error = error

    # The decoder's thread.

    def _pieces(self) -> Iterator[bytes]:
        while (piece := self._chunks.get()) is not None:
            self._slots.release()
            yield piece

    def _decode(self) -> None:
        pieces = self._pieces()
        try:
            source = Source(pieces)
            if self._compression is None:
                self._compression = sniff(source)
            self._hash_stream = self._compression != Compression.NONE
            SCANNERS[self._compression](source, self._writer)
            self._writer.flush()
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            self._fail(error)
        for _ in pieces:  # so that `feed` never waits for a decoder that has stopped
            pass
        self._batches.put(None)

    def _acquire(self) -> bytearray:
        return self._free.get()

    def _publish(self, batch: Batch) -> None:
        if self._error is not None:
            raise _StoppedError
        if self._hash_stream:  # here rather than in the digester's thread: so both take about as long
            with memoryview(batch.buffer) as view, view[: batch.filled] as filled:
                self._diff_hash.update(filled)
        self._batches.put(batch)

    # The digester's thread.

    def _digest(self) -> None:
        while (batch := self._batches.get()) is not None:
            if self._error is None:
                try:
                    self._builder.consume(batch)
                except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
                    self._fail(error)
            self._free.put(batch.buffer)
