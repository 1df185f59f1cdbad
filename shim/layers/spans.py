"""The second half of a scan: spans, digests, checksums and windows, from what the decoder hands over.

Runs in its own thread; hashing, the CRC and the marker inflaters release the GIL while the decoder inflates on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from shim.errors import LayerError
from shim.index.model import Restart, SpanTable
from shim.index.sparse import SparseWindows
from shim.layers.gzipformat import crc32
from shim.layers.windows import MarkerProbe

SPANS_A_POINT = 4  # no span is longer than the spacing divided by this

OnData = Callable[[memoryview], None]
OnSpan = Callable[[int, memoryview], None]


class Data(NamedTuple):
    """Uncompressed bytes: `buffer[start:end]` of the batch."""

    start: int
    end: int


class Point(NamedTuple):
    """Reading can begin here. `byte` is the one that `bits` belong to; `window` what came before (DEFLATE only)."""

    kind: Restart
    cstart: int
    bits: int = 0
    byte: int = 0
    window: bytes = b""


class Probe(NamedTuple):
    """Compressed bytes that follow the last DEFLATE point: `chunk[start:end]`."""

    chunk: bytes
    start: int
    end: int


class ProbeEnd(NamedTuple):
    """The probe has seen enough: 32 KiB of output, or the end of the gzip member."""


class MemberEnd(NamedTuple):
    """A gzip member is over; its trailer says this."""

    crc: int
    size: int


Op = Data | Point | Probe | ProbeEnd | MemberEnd


@dataclass(slots=True)
class Batch:
    """One buffer of uncompressed bytes and what happened while it filled, in order."""

    buffer: bytearray
    ops: list[Op] = field(default_factory=list)
    filled: int = 0


class SpanBuilder:
    """Turns batches into a span table and calls of `on_data` and `on_span`, in stream order.

    A span ends at the next restart point, or, before that, after exactly spacing / 4 bytes: the next one is then
    CONTINUE. A digest for each quarter costs 0.03 % of the image and lets a reader have its bytes as soon as the
    inflater has passed them, not when the whole stretch up to the next restart point is inflated. Where spans lie
    depends on the layer's bytes and `spacing` alone.
    """

    def __init__(self, spacing: int, on_data: OnData, on_span: OnSpan | None) -> None:
        self._longest = max(spacing // SPANS_A_POINT, 1)
        self._on_data = on_data
        self._on_span = on_span
        self._table = SpanTable(windows=SparseWindows())
        self._position = 0  # uncompressed offset of the next byte
        self._span = bytearray()  # the open span's bytes, kept for on_span only
        self._span_start = 0
        self._span_hash = hashlib.sha256()
        self._run_cstart = 0  # where the run's restart point lies
        self._crc = 0
        self._member_start = 0
        self._point_span = 0  # the span that begins at the last point
        self._probe: MarkerProbe | None = None
        self._window = b""

    def consume(self, batch: Batch) -> None:
        """Take one batch. Raises LayerError for a bad gzip trailer, and what the callbacks raise."""
        with memoryview(batch.buffer) as view:
            for op in batch.ops:
                if isinstance(op, Data):
                    with view[op.start : op.end] as data, data.toreadonly() as readonly:
                        self._data(readonly)
                elif isinstance(op, Probe):
                    if self._probe is not None:
                        self._probe.feed(op.chunk, op.start, op.end)
                elif isinstance(op, Point):
                    self._point(op)
                elif isinstance(op, ProbeEnd):
                    if self._probe is not None:
                        self._table.windows[self._point_span] = self._probe.sparse(self._window)
                else:
                    self._member_end(op)

    def _data(self, view: memoryview) -> None:
        self._crc = crc32(view, self._crc)
        at, size = 0, len(view)
        while at < size:
            room = self._span_start + self._longest - self._position
            if room == 0:
                self._close_span()
                self._open_span(Restart.CONTINUE, self._run_cstart, 0)
                continue
            part = view[at : at + room]
            self._span_hash.update(part)
            if self._on_span is not None:
                self._span += part
            at += len(part)
            self._position += len(part)
        self._on_data(view)

    def _point(self, point: Point) -> None:
        if self._table.count:
            self._close_span()
        self._open_span(point.kind, point.cstart, point.bits)
        self._run_cstart = point.cstart
        self._point_span = self._table.count - 1
        if point.kind == Restart.DEFLATE:
            if self._probe is None:
                self._probe = MarkerProbe()
            self._probe.start(point.bits, point.byte)
            self._window = point.window

    def _member_end(self, end: MemberEnd) -> None:
        size = self._position - self._member_start
        if end.crc != self._crc or end.size != size & 0xFFFFFFFF:
            raise LayerError(
                f"a gzip member does not match its checksum (it ends at uncompressed byte {self._position})"
            )
        self._crc = 0
        self._member_start = self._position

    def _open_span(self, kind: Restart, cstart: int, bits: int) -> None:
        table = self._table
        if table.count:
            table.ustarts.append(self._position)
            table.cstarts.append(cstart)
        else:
            table.ustarts[0], table.cstarts[0] = self._position, cstart
        table.kinds.append(kind)
        table.bits.append(bits)
        table.windows.append(b"")
        self._span_start = self._position

    def _close_span(self) -> None:
        self._table.digests += self._span_hash.digest()
        self._span_hash = hashlib.sha256()
        if self._on_span is not None:
            with memoryview(self._span) as view, view.toreadonly() as readonly:
                self._on_span(self._table.count - 1, readonly)
            self._span = bytearray()

    def finish(self, compressed_size: int) -> tuple[SpanTable, int]:
        """(table, number of the uncompressed bytes), after the last batch."""
        table = self._table
        if table.count and self._position == self._span_start:  # a point with nothing behind it
            table.kinds.pop()
            table.bits.pop()
            table.windows.pop()
            table.ustarts.pop()
            table.cstarts.pop()
        elif table.count:
            self._close_span()
        if table.count:
            table.ustarts.append(self._position)
            table.cstarts.append(compressed_size)
        else:
            del table.ustarts[:], table.cstarts[:]
            table.ustarts.append(0)
            table.cstarts.append(compressed_size)
        return table, self._position
