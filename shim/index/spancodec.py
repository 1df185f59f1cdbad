"""All layers' span tables as two sections: SPAN (offsets, kinds, digests) and WIND (the sparse windows' runs).

The windows of all layers are coded together: what gaps, lengths and bytes have in common is found across layers.
"""

from __future__ import annotations

from array import array
from itertools import accumulate, pairwise
from operator import add, sub

from shim.errors import IndexFormatError
from shim.index.columns import frame, join, pack, split, unpack
from shim.index.model import WINDOW_SIZE, Layer, Restart, SpanTable
from shim.index.sparse import MAX_RUNS, SparseWindows, make_record, records_of, split_record
from shim.index.validate import MAX_SPANS

MAX_SPAN_RAW = 32 << 20
MAX_WINDOW_RAW = 256 << 20
_DIGEST = 32  # SHA-256
SPAN_COLUMNS = ("counts", "uncompressed", "compressed", "kinds", "digests")
WINDOW_COLUMNS = ("runs", "gaps", "lengths", "bytes")


def encode_spans(layers: list[Layer]) -> bytes:
    """Section SPAN of valid layers."""
    uncompressed: list[int] = []
    compressed: list[int] = []
    kinds = bytearray()
    digests = bytearray()
    for layer in layers:
        spans = layer.spans
        uncompressed += (b - a for a, b in pairwise(spans.ustarts))
        compressed.append(spans.cstarts[0])
        compressed += (b - a for a, b in pairwise(spans.cstarts))
        kinds += bytes(kind | bit << 2 for kind, bit in zip(spans.kinds, spans.bits, strict=True))
        digests += spans.digests
    counts = pack(layer.spans.count for layer in layers)
    return join([counts, pack(uncompressed), pack(compressed), bytes(kinds), bytes(digests)])


def decode_spans(raw: bytes, layers: int) -> list[SpanTable]:
    """The span tables of a SPAN section, windows all b"". Raises IndexFormatError where the columns do not fit each
    other; what the values must obey is `validate.validate_spans`' part."""
    parts = split(raw, len(SPAN_COLUMNS), "SPAN")
    counts = unpack(parts[0], layers)
    total = sum(counts)
    if len(counts) != layers or total > MAX_SPANS:
        raise IndexFormatError(f"the span tables are damaged, or hold more than {MAX_SPANS} spans")
    uncompressed, compressed, kinds, digests = unpack(parts[1], total), unpack(parts[2], total + layers), *parts[3:]
    if not (len(uncompressed) == len(kinds) == total == len(digests) / _DIGEST and len(compressed) == total + layers):
        raise IndexFormatError("the span tables are damaged: their columns differ in length")
    tables = []
    at = 0
    for layer, count in enumerate(counts):
        end = at + count
        try:
            ustarts = array("Q", accumulate(uncompressed[at:end], initial=0))
            cstarts = array("Q", accumulate(compressed[at + layer : end + layer + 1]))
        except OverflowError as error:
            raise IndexFormatError(f"layer {layer}: a span's offset does not fit 64 bits") from error
        tables.append(
            SpanTable(
                ustarts,
                cstarts,
                bytearray(kind >> 2 for kind in kinds[at:end]),
                bytearray(kind & 3 for kind in kinds[at:end]),
                bytearray(digests[_DIGEST * at : _DIGEST * end]),
                SparseWindows(records=[b""] * count),
            )
        )
        at = end
    return tables


class WindowEncoder:
    """Section WIND of layers that come one by one: all but its last column is `head`, which is known at the end."""

    def __init__(self) -> None:
        self._runs: list[int] = []
        self._gaps: list[int] = []
        self._lengths: list[int] = []
        self._size = 0

    def add(self, layer: Layer) -> bytes:
        """The next (valid) layer's part of the last column, the runs' bytes."""
        parts: list[bytes] = []
        for kind, record in zip(layer.spans.kinds, records_of(layer.spans.windows), strict=True):
            if kind != Restart.DEFLATE:
                continue
            if not record:
                self._runs.append(0)
                continue
            numbers, at = split_record(record)
            starts, lengths = numbers[::2], numbers[1::2]
            self._gaps += map(sub, starts, (0, *map(add, starts, lengths)))
            self._lengths += lengths
            self._runs.append(len(lengths) + 1)
            parts.append(record[at:])
        data = b"".join(parts)
        self._size += len(data)
        return data

    def head(self) -> bytes:
        """What comes before the last column."""
        columns = pack(self._runs), pack(self._gaps), pack(self._lengths)
        return frame([*map(len, columns), self._size]) + b"".join(columns)


def encode_windows(layers: list[Layer]) -> bytes:
    """Section WIND of valid layers. `runs` has a number for each DEFLATE span: 0 for no window, else its runs + 1."""
    encoder = WindowEncoder()
    data = b"".join([encoder.add(layer) for layer in layers])
    return encoder.head() + data


def decode_windows(raw: bytes, tables: list[SpanTable]) -> None:
    """Put the windows of a WIND section into `tables`. Raises IndexFormatError where the columns do not fit."""
    parts = split(raw, len(WINDOW_COLUMNS), "WIND")
    points = sum(table.kinds.count(Restart.DEFLATE) for table in tables)
    runs = unpack(parts[0], points)
    total = sum(count - 1 for count in runs if count)
    if len(runs) != points or any(count > MAX_RUNS + 1 for count in runs):
        raise IndexFormatError("the windows are damaged: not one for each restart point")
    gaps, lengths = unpack(parts[1], total), unpack(parts[2], total)
    if len(gaps) != total or len(lengths) != total or sum(lengths) != len(parts[3]):
        raise IndexFormatError("the windows are damaged: their columns differ in length")
    counts, number, at = iter(runs), 0, 0
    for table in tables:
        records: list[bytes] = []
        for kind in table.kinds:
            count = next(counts) if kind == Restart.DEFLATE else 0
            if not count:
                records.append(b"")
                continue
            stop = number + count - 1
            numbers = _positions(gaps[number:stop], lengths[number:stop])
            number = stop
            end = at + sum(numbers[1::2])
            records.append(make_record(numbers, parts[3][at:end]))
            at = end
        table.windows = SparseWindows(records=records)


def _positions(gaps: list[int], lengths: list[int]) -> list[int]:
    """start, length, start, length … of one window's runs. Raises IndexFormatError if they leave the window."""
    numbers = [0] * (2 * len(gaps))
    numbers[::2] = accumulate(map(add, gaps, (0, *lengths)))
    numbers[1::2] = lengths
    if not all(lengths):
        raise IndexFormatError("the windows are damaged: an empty run")
    if numbers and numbers[-2] + numbers[-1] > WINDOW_SIZE:
        raise IndexFormatError("the windows are damaged: a run reaches past its window")
    return numbers
