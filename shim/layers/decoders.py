"""The first half of a scan: one decoder a format, each writing uncompressed bytes and restart points to a `Writer`."""

from __future__ import annotations

from collections.abc import Callable

from shim.errors import LayerError
from shim.index.model import WINDOW_SIZE, Compression, Restart
from shim.layers import gzipformat, libz, zstdformat
from shim.layers.source import Source
from shim.layers.spans import Batch, Data, MemberEnd, Op, Point, Probe, ProbeEnd

_OPS_LIMIT = 512  # a batch also ends here: an op may hold a piece of compressed stream
_BARREN_LIMIT = 100_000  # members, blocks or frames in a row that give nothing: no real stream has them


class Writer:
    """What decoders write to: fills buffers, keeps the order of events, knows when the next restart point is due.

    `acquire()` gives an empty buffer and may wait; `publish(batch)` hands a full one over.
    """

    def __init__(
        self, spacing: int, limit: int, acquire: Callable[[], bytearray], publish: Callable[[Batch], None]
    ) -> None:
        self._spacing = spacing
        self._limit = limit
        self._acquire = acquire
        self._publish = publish
        self._batch: Batch | None = None
        self._address = 0
        self._filled = 0  # bytes in the batch's buffer
        self._told = 0  # of these, how many its ops already name
        self._barren = 0
        self.total = 0  # uncompressed bytes so far
        self.due = 0  # the first candidate at or after this uncompressed offset becomes a restart point

    def _open(self) -> Batch:
        batch = self._batch
        if batch is None:
            batch = self._batch = Batch(self._acquire())
            self._address = libz.address_of_buffer(batch.buffer)
            self._filled = self._told = 0
        return batch

    def room(self) -> tuple[int, int]:
        """(address, size) of the space for the next bytes; size >= 1."""
        batch = self._open()
        if self._filled == len(batch.buffer) or len(batch.ops) >= _OPS_LIMIT:
            self.flush()
            batch = self._open()
        return self._address + self._filled, len(batch.buffer) - self._filled

    def advance(self, count: int) -> None:
        """`count` bytes were written to the room. Raises LayerError past the limit."""
        if count:
            self._filled += count
            self.total += count
            self._barren = 0
            if self.total > self._limit:
                raise LayerError(f"the layer unpacks to more than {self._limit} bytes")

    def write(self, data: bytes) -> None:
        """Copy `data`."""
        view = memoryview(data)
        while view:
            _, room = self.room()
            part = view[:room]
            self._open().buffer[self._filled : self._filled + len(part)] = part
            self.advance(len(part))
            view = view[len(part) :]

    def barren(self) -> None:
        """A unit of input gave no output. Raises LayerError when there is no end to them."""
        self._barren += 1
        if self._barren > _BARREN_LIMIT:
            raise LayerError(f"the compressed stream has endless empty parts at uncompressed byte {self.total}")

    def event(self, op: Op) -> None:
        """Something happened at the current position."""
        if len(self._open().ops) >= _OPS_LIMIT:
            self.flush()
        batch = self._open()
        if self._filled > self._told:
            batch.ops.append(Data(self._told, self._filled))
            self._told = self._filled
        batch.ops.append(op)

    def point(self, point: Point) -> None:
        self.event(point)
        self.due = self.total + self._spacing

    def flush(self) -> None:
        """Hand over what there is."""
        batch = self._batch
        if batch is None:
            return
        if self._filled > self._told:
            batch.ops.append(Data(self._told, self._filled))
        self._batch = None
        batch.filled = self._filled
        self._publish(batch)


def sniff(source: Source) -> Compression:
    """The compression by its magic bytes; what is none of the known ones is a plain tar.

    Raises LayerError for formats that engines know and registries do not carry (xz, bzip2).
    """
    magic = source.peek(6)
    if magic[:2] == gzipformat.MAGIC:
        return Compression.GZIP
    if magic[:4] == zstdformat.MAGIC or zstdformat.is_skippable(magic[:4]):
        return Compression.ZSTD
    if magic[:3] == b"BZh" or magic == b"\xfd7zXZ\0":
        raise LayerError("the layer is compressed with bzip2 or xz", hint="build the image with gzip or zstd layers")
    return Compression.NONE


def scan_plain(source: Source, writer: Writer) -> None:
    """An uncompressed layer: a restart point at exactly every `spacing` bytes."""
    while source.more():
        if writer.total == writer.due:
            writer.point(Point(Restart.STREAM, writer.total))
        size = min(len(source.chunk) - source.pos, writer.due - writer.total)
        writer.write(source.chunk[source.pos : source.pos + size])
        source.pos += size


def scan_zstd(source: Source, writer: Writer) -> None:
    """zstd: a restart point at the first frame that starts when one is due."""
    if not source.more():
        raise LayerError("the zstd stream is empty")
    first = True
    for start, data in zstdformat.decode(source):
        if start >= 0 and writer.total >= writer.due:
            writer.point(Point(Restart.STREAM, 0 if first else start))  # span 0 begins at 0, whatever is skipped first
            first = False
        if data:
            writer.write(data)
        else:
            writer.barren()


def scan_gzip(source: Source, writer: Writer) -> None:
    """gzip: a restart point at the first member start or deflate block end when one is due."""
    inflater = libz.RawInflate()
    try:
        start = source.offset
        while True:
            gzipformat.read_header(source)
            if writer.total >= writer.due:
                writer.point(Point(Restart.STREAM, start))
            else:
                writer.barren()
            inflater.reset()
            _scan_member(source, writer, inflater)
            crc, size = gzipformat.read_trailer(source)
            writer.event(MemberEnd(crc, size))
            start = source.offset
            if gzipformat.at_end(source):
                return
    finally:
        inflater.close()


def _scan_member(source: Source, writer: Writer, inflater: libz.RawInflate) -> None:
    chunk, address = b"", 0
    last_byte = 0  # the last one taken; it may lie in the chunk before
    probe_until = -1  # uncompressed offset up to which the probe wants input; -1: there is no probe
    while True:
        source.need()
        if source.chunk is not chunk:
            chunk, address = source.chunk, libz.address_of(source.chunk)
        target, room = writer.room()
        # Fast up to one byte before a point is due, then block by block. One byte before: at the limit itself inflate
        # could already have passed a block end, depending on how the input was cut.
        fast = writer.due - 1 - writer.total
        flush = libz.Z_NO_FLUSH if fast > 0 else libz.Z_BLOCK
        at = source.pos
        status, used, made, flags = inflater.inflate(
            address + at, len(chunk) - at, target, min(room, fast) if fast > 0 else room, flush
        )
        if used:
            source.pos = at + used
            last_byte = chunk[source.pos - 1]
        if made:
            writer.advance(made)
        elif fast <= 0 or not used:
            writer.barren()
        if probe_until >= 0:
            if used:
                writer.event(Probe(chunk, at, at + used))
            if writer.total >= probe_until or status == libz.Z_STREAM_END:
                writer.event(ProbeEnd())
                probe_until = -1
        if status == libz.Z_STREAM_END:
            return
        if fast <= 0 and flags & (libz.BLOCK_END | libz.LAST_BLOCK) == libz.BLOCK_END and writer.total >= writer.due:
            bits = flags & libz.UNUSED_BITS
            cstart = source.offset - (bits > 0)
            writer.point(Point(Restart.DEFLATE, cstart, bits, last_byte, inflater.get_window()))
            probe_until = writer.total + WINDOW_SIZE


SCANNERS: dict[Compression, Callable[[Source, Writer], None]] = {
    Compression.NONE: scan_plain,
    Compression.GZIP: scan_gzip,
    Compression.ZSTD: scan_zstd,
}
