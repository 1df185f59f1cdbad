"""Verified bytes of a layer's spans, from compressed bytes that begin at a restart point."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import sha256

from shim.errors import IntegrityError, LayerError
from shim.index.model import WINDOW_SIZE, Compression, Restart, Spans
from shim.layers import gzipformat, zstdformat
from shim.layers.resume import Begin, best_inflater
from shim.layers.scan import MAX_SPAN
from shim.layers.source import Source

_NO_WINDOW = bytes(WINDOW_SIZE)


def compressed_range(spans: Spans, first: int, stop: int) -> tuple[int, int]:
    """The compressed bytes [start, end) that suffice to inflate spans first .. stop-1; first must be a restart point.

    Exact where span `stop` is a restart point (one byte further if the point lies inside a byte) and at the layer's
    end, which includes the stream's trailer. Where `stop` is CONTINUE no offset is known, so the range reaches to the
    next restart point: read it as a stream and close it when the last span has come.
    """
    count = spans.count
    if not 0 <= first < stop <= count or spans.kind(first) == Restart.CONTINUE:
        raise ValueError(f"spans {first} to {stop} of {count} cannot be read")
    end = spans.run_end(stop - 1)
    return spans.cstart(first), spans.cstart(end) + (end < count and spans.bit(end) > 0)


def inflate_spans(
    spans: Spans,
    compression: Compression,
    first: int,
    chunks: Iterable[bytes],
    stop: int | None = None,
    *,
    begin: Begin | None = None,
) -> Iterator[tuple[int, bytes]]:
    """Yield (span number, its bytes) for first .. stop-1 (default: all that follow), each as soon as it is complete.

    chunks: the compressed bytes from `spans.cstart(first)` on; nothing is taken from it past what the last span needs.
    Restart points on the way are read over. Holds one span and one chunk. `begin` chooses the inflater for gzip.
    Raises IntegrityError if a span's digest differs, LayerError if the stream is invalid, ends too early, or the table
    has a span longer than MAX_SPAN; what `chunks` raises passes through. ValueError if `first` is no restart point.
    """
    stop = spans.count if stop is None else stop
    if not 0 <= first < stop <= spans.count or spans.kind(first) == Restart.CONTINUE:
        raise ValueError(f"spans {first} to {stop} of {spans.count} cannot be read")
    return _verified(spans, first, stop, _pieces(spans, compression, first, chunks, begin or best_inflater()))


def _verified(spans: Spans, first: int, stop: int, pieces: Iterator[bytes | bytearray]) -> Iterator[tuple[int, bytes]]:
    left: bytes | bytearray | memoryview = b""
    for i in range(first, stop):
        size = spans.ustart(i + 1) - spans.ustart(i)
        if not 0 < size <= MAX_SPAN:
            raise LayerError(f"span {i} of the layer has an impossible size, {size} bytes")
        parts: list[bytes | bytearray | memoryview] = []
        missing = size
        while missing:
            piece = left or next(pieces, None)
            if piece is None:
                raise LayerError(f"the compressed stream ends inside span {i}, {missing} bytes early")
            part = piece if len(piece) <= missing else memoryview(piece)[:missing]
            left = b"" if len(piece) <= missing else memoryview(piece)[missing:]
            parts.append(part)
            missing -= len(part)
        data = b"".join(parts)
        if sha256(data).digest() != spans.digest(i):
            raise IntegrityError(f"span {i} of the layer does not match its digest")
        yield i, data


def _pieces(
    spans: Spans, compression: Compression, first: int, chunks: Iterable[bytes], begin: Begin
) -> Iterator[bytes | bytearray]:
    source = Source(chunks, spans.cstart(first))
    if compression == Compression.NONE:
        return _plain(source)
    if compression == Compression.ZSTD:
        return (data for _, data in zstdformat.decode(source) if data)
    if spans.kind(first) == Restart.DEFLATE:
        return _gzip(source, begin, spans.bit(first), spans.window(first) or _NO_WINDOW)
    return _gzip(source, begin, 0, None)


def _plain(source: Source) -> Iterator[bytes]:
    while source.more():
        piece = source.chunk[source.pos :]
        source.pos = len(source.chunk)
        yield piece


def _gzip(source: Source, begin: Begin, bits: int, window: bytes | None) -> Iterator[bytes | bytearray]:
    """window: None at a member's start. Checksums of members are not looked at: the spans' digests say more."""
    if window is None:
        gzipformat.read_header(source)
        inflater = begin(0, 0, b"")
    else:
        inflater = begin(bits, source.take(1)[0] if bits else 0, window)
    while True:
        while not inflater.eof:
            if inflater.hungry:
                source.need()
            data, source.pos = inflater.inflate(source.chunk, source.pos)
            if data:
                yield data
        gzipformat.read_trailer(source)
        if gzipformat.at_end(source):
            return
        gzipformat.read_header(source)
        inflater = begin(0, 0, b"")
