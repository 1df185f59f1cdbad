"""Which compressed bytes a job needs, and how they are read out of one stream. Pure but for the stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from shim.errors import LayerError
from shim.index.model import Spans
from shim.layers.inflate import compressed_range

_SLACK = 1.15  # a part of a run is compressed about as well as the whole …
_MARGIN = 32 << 10  # … within these


def pieces_of(spans: Spans, wanted: Iterable[int]) -> list[tuple[int, int]]:
    """What to inflate for the wanted spans: (restart point, one past the last span of it that is wanted), ascending;
    runs side by side are one piece."""
    pieces: list[tuple[int, int]] = []
    for span in sorted(wanted):
        run = spans.restart(span)
        last = pieces[-1][1] - 1 if pieces else -1
        if pieces and (spans.restart(last) == run or spans.run_end(last) == run):
            pieces[-1] = (pieces[-1][0], span + 1)
        else:
            pieces.append((run, span + 1))
    return pieces


def ranges_of(spans: Spans, pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The compressed bytes [start, end) to ask for, in turn, for all the pieces and what lies between them.

    Where the last piece ends inside a run, nobody knows the exact offset: the first range should do, the second is the
    rest of the run.
    """
    first, stop = pieces[-1]
    start, end = spans.cstart(pieces[0][0]), compressed_range(spans, first, stop)[1]
    run, run_end = spans.restart(stop - 1), spans.run_end(stop - 1)
    if stop == run_end:
        return [(start, end)]
    low, whole = spans.ustart(run), spans.ustart(run_end) - spans.ustart(run)
    begin = spans.cstart(run)
    likely = begin + _MARGIN + int(_SLACK * (end - begin) * (spans.ustart(stop) - low) / whole)
    return [(start, likely), (likely, end)] if likely < end else [(start, end)]


class Feed:
    """One stream of compressed bytes, read from several offsets that ascend; what lies between is thrown away.

    chunks: the bytes from `start` on. Where an inflater stopped inside a chunk, the next offset may lie in that chunk.
    """

    def __init__(self, chunks: Iterator[bytes], start: int) -> None:
        self._chunks = chunks
        self._chunk = b""
        self._end = start  # the offset behind `_chunk`

    def at(self, offset: int) -> Iterator[bytes]:
        """The bytes from `offset` on. Raises LayerError when they have gone by."""
        while True:
            if offset < self._end - len(self._chunk):
                raise LayerError(f"compressed byte {offset} of the layer is asked for behind byte {self._end}")
            if offset < self._end:
                yield self._chunk[offset - self._end :]
                offset = self._end
            chunk = next(self._chunks, None)
            if chunk is None:
                return
            self._chunk = chunk
            self._end += len(chunk)
