"""Which compressed bytes a job asks for, and how several pieces are read out of one stream."""

from __future__ import annotations

from array import array

import pytest

from shim.cache.ranges import Feed, pieces_of, ranges_of
from shim.errors import LayerError
from shim.index.model import Compression, Restart, SpanTable
from shim.layers.inflate import inflate_spans
from tests.support.lazylayers import sample_layer

C, D, S = Restart.CONTINUE, Restart.DEFLATE, Restart.STREAM


def table() -> SpanTable:
    """Runs of 4, 4, 1 and 3 spans of 1,000 bytes; runs 0.4, 1.2, 0.1 and 3 MB compressed."""
    kinds = [S, C, C, C, D, C, C, C, D, D, C, C]
    cstarts = [0] * 4 + [400_000] * 4 + [1_600_000] + [1_700_000] * 3 + [4_700_000]
    bits = bytearray(12)
    bits[4] = 3
    return SpanTable(
        array("Q", range(0, 13_000, 1000)), array("Q", cstarts), bits, bytearray(kinds), bytearray(12 * 32), [b""] * 12
    )


@pytest.mark.parametrize(
    ("wanted", "pieces"),
    [
        ({0}, [(0, 1)]),
        ({2, 1}, [(0, 3)]),
        ({3, 4}, [(0, 5)]),  # side by side: one piece, the end of run 0 read over
        ({1, 5}, [(0, 6)]),
        ({1, 8}, [(0, 2), (8, 9)]),  # run 1 lies between
        ({1, 8, 11}, [(0, 2), (8, 12)]),
        ({9}, [(9, 10)]),
    ],
)
def test_pieces(wanted: set[int], pieces: list[tuple[int, int]]) -> None:
    assert pieces_of(table(), wanted) == pieces


def test_ranges_are_exact_where_a_run_ends() -> None:
    assert ranges_of(table(), [(0, 4)]) == [(0, 400_001)]  # the next point lies inside a byte
    assert ranges_of(table(), [(4, 8)]) == [(400_000, 1_600_000)]
    assert ranges_of(table(), [(0, 2), (8, 12)]) == [(0, 4_700_000)]


def test_a_part_of_a_run_is_asked_for_first_and_the_rest_behind_it() -> None:
    (start, likely), (again, end) = ranges_of(table(), [(9, 10)])
    assert (start, again, end) == (1_700_000, likely, 4_700_000)
    assert 1_000_000 < likely - start < 1_300_000
    assert ranges_of(table(), [(0, 3)]) == [(0, 377_768), (377_768, 400_001)]
    assert ranges_of(table(), [(8, 11)])[1][1] == 4_700_000


def test_a_feed_throws_away_what_lies_between() -> None:
    data = bytes(range(256)) * 8
    chunks = [data[at : at + 100] for at in range(1000, 2048, 100)]
    feed = Feed(iter(chunks), 1000)
    first = feed.at(1030)
    assert next(first) == data[1030:1100]
    assert next(first) == data[1100:1200]
    assert next(feed.at(1150)) == data[1150:1200]  # in the chunk that was given out last
    assert b"".join(feed.at(1777)) == data[1777:]
    assert list(feed.at(2048)) == []


def test_a_feed_does_not_go_back() -> None:
    feed = Feed(iter([b"a" * 100, b"b" * 100]), 0)
    assert len(list(feed.at(0))) == 2
    with pytest.raises(LayerError, match="asked for behind"):
        next(feed.at(99))


@pytest.mark.parametrize("compression", [Compression.GZIP, Compression.ZSTD, Compression.NONE])
@pytest.mark.parametrize("chunk", [1 << 10, 1 << 16, 1 << 20])
def test_pieces_of_a_real_layer_come_out_right(compression: Compression, chunk: int) -> None:
    sample = sample_layer(4 << 20, compression)
    spans = sample.spans
    wanted = {0, 1, 9, 14, 15, 16, 40, spans.count - 1}
    pieces = pieces_of(spans, wanted)
    assert len(pieces) > 2
    start = spans.cstart(pieces[0][0])
    feed = Feed((sample.blob[at : at + chunk] for at in range(start, len(sample.blob), chunk)), start)
    got = {}
    for first, stop in pieces:
        got |= dict(inflate_spans(spans, compression, first, feed.at(spans.cstart(first)), stop))
    assert wanted <= set(got)
    for span, data in got.items():
        assert data == sample.data[spans.ustart(span) : spans.ustart(span + 1)]
