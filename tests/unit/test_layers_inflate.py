"""Resuming from every restart point, sparse windows, exact ranges, and what hostile input does."""

from __future__ import annotations

import random
import zlib
from array import array
from collections.abc import Iterator

import pytest

from shim.errors import IntegrityError, LayerError
from shim.index.model import WINDOW_SIZE, Compression, Restart, SpanTable
from shim.layers import libz, resume
from shim.layers.inflate import compressed_range, inflate_spans
from shim.layers.resume import Begin, IsalInflater, LibzInflater
from shim.layers.scan import MAX_SPAN, ScanResult
from shim.layers.source import Source
from shim.layers.windows import MarkerProbe
from tests.support.layerdata import SPACING, STREAMS, deflate, flushed, sample, scan

SIZE = 1_200_000
ENGINES: dict[str, Begin] = {"isal": IsalInflater, "libz": LibzInflater}


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def restarts(table: SpanTable) -> list[int]:
    return [i for i in range(table.count) if table.kind(i) != Restart.CONTINUE]


def read(
    result: ScanResult, stream: bytes, first: int, stop: int, size: int = 1 << 20, begin: Begin | None = None
) -> bytes:
    """Spans first .. stop-1 from nothing but their compressed range."""
    start, end = compressed_range(result.spans, first, stop)
    parts = list(
        inflate_spans(result.spans, result.compression, first, pieces(stream[start:end], size), stop, begin=begin)
    )
    assert [i for i, _ in parts] == list(range(first, stop))
    return b"".join(data for _, data in parts)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", STREAMS)
def test_every_point_resumes(name: str, engine: str) -> None:
    data = sample(SIZE)
    stream = STREAMS[name][1](data)
    result = scan(stream)
    table = result.spans
    for first in restarts(table):
        stop = table.run_end(first)
        for size in (1 << 20, 777):
            got = read(result, stream, first, stop, size, ENGINES[engine])
            assert got == data[table.ustart(first) : table.ustart(stop)], (first, table.bit(first))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", STREAMS)
def test_reading_on_over_points_members_and_frames(name: str, engine: str) -> None:
    data = sample(SIZE)
    stream = STREAMS[name][1](data)
    result = scan(stream)
    table = result.spans
    rnd = random.Random(name)
    for first in rnd.sample(restarts(table), min(4, len(restarts(table)))):
        for stop in (rnd.randint(first + 1, table.count), table.count):
            got = read(result, stream, first, stop, rnd.randint(100, 50_000), ENGINES[engine])
            assert got == data[table.ustart(first) : table.ustart(stop)]


def test_all_bit_positions_and_stored_blocks_are_met() -> None:
    """The samples above would prove little if all points lay at the same bit, or before no stored block."""
    stream = deflate(sample(), 6, 1)
    table = scan(stream).spans
    assert {table.bit(i) for i in restarts(table)[1:]} == set(range(8))
    kinds = set()
    for i in restarts(table)[1:]:
        shift = -table.bit(i) % 8
        kinds.add(stream[table.cstart(i)] >> shift & 7 if table.bit(i) > 2 else -1)
    assert 0 in kinds  # a point right before a stored block


def test_prefixes_are_empty_blocks() -> None:
    table = resume.prefixes()
    assert table[0] == b""
    for k in range(1, 8):
        assert 0 < len(table[k]) <= 16
        assert table[k][-1] >> k == 0
        size = 8 * (len(table[k]) - 1) + k
        bits = int.from_bytes(table[k], "little") | 0b011 << size  # then a last, empty block with fixed codes, 10 bits
        inflater = zlib.decompressobj(-15)
        assert inflater.decompress(bits.to_bytes((size + 10 + 7) // 8, "little")) == b""
        assert inflater.eof
        assert inflater.unused_data == b""


def test_the_fast_inflater_is_used_here() -> None:
    assert resume.best_inflater() is IsalInflater


def test_a_misbehaving_inflater_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(IsalInflater):
        def __init__(self, bits: int, byte: int, window: bytes) -> None:
            super().__init__(bits, byte, window[:-1])

    resume.best_inflater.cache_clear()
    monkeypatch.setattr(resume, "IsalInflater", Wrong)
    assert resume.best_inflater() is LibzInflater
    resume.best_inflater.cache_clear()


def test_spans_come_as_soon_as_their_bytes_are_there() -> None:
    data = sample()
    stream = flushed(data, SPACING)
    result = scan(stream)
    taken = 0

    def source() -> Iterator[bytes]:
        nonlocal taken
        for piece in pieces(stream, 4096):
            taken += len(piece)
            yield piece

    table = result.spans
    early = 0
    for i, _ in inflate_spans(table, result.compression, 0, source()):
        end = table.cstart(table.run_end(i))
        assert taken <= end + 2 * 4096
        early += taken < end - 4096  # inside a run the first spans come before its last bytes are read
    assert i == table.count - 1
    assert early > table.count // 3


@pytest.mark.parametrize("engine", ENGINES)
def test_all_output_comes_before_more_input_is_wanted(engine: str) -> None:
    """Few compressed bytes give much: the range's last one is taken long before the last output."""
    data = bytes(12 << 20)
    stream = flushed(data, 4 << 20)
    result = scan(stream, 4 << 20)
    assert len(restarts(result.spans)) == 3
    for i in restarts(result.spans):
        assert read(result, stream, i, result.spans.run_end(i), begin=ENGINES[engine]) == bytes(4 << 20)


@pytest.mark.parametrize("engine", ENGINES)
def test_inflaters_say_when_they_need_input(engine: str) -> None:
    """Also where the last input byte is used up while a copy is half written."""
    for size in (*range(65_400, 65_900), 524_288, 524_500):
        stream = deflate(bytes(size))[10:-8]
        inflater, at, got = ENGINES[engine](0, 0, b""), 0, 0
        while not inflater.eof:
            assert at < len(stream) or not inflater.hungry
            output, at = inflater.inflate(stream, at)
            got += len(output)
        assert (got, at) == (size, len(stream))


def test_source_offsets() -> None:
    source = Source([b"abc", b"", b"defg", b"hi"], 100)
    assert source.take(2) == b"ab"
    assert (source.offset, source.peek(4), source.offset) == (102, b"cdef", 102)
    assert (source.take(5), source.offset) == (b"cdefg", 107)
    source.skip(1)
    assert (source.peek(9), source.take(1), source.offset, source.more()) == (b"i", b"i", 109, False)
    for take in (source.take, source.skip):
        with pytest.raises(LayerError, match="at byte 109"):
            take(1)


def test_ranges() -> None:
    result = scan(deflate(sample()))
    table = result.spans
    last = table.count
    assert compressed_range(table, 0, last) == (0, result.size)
    for i in restarts(table)[1:]:
        assert compressed_range(table, 0, i) == (0, table.cstart(i) + (table.bit(i) > 0))
        assert compressed_range(table, i, last) == (table.cstart(i), result.size)
    for first, stop in ((0, 0), (-1, 1), (1, 1), (0, last + 1)):
        with pytest.raises(ValueError, match="cannot be read"):
            compressed_range(table, first, stop)
        with pytest.raises(ValueError, match="cannot be read"):
            inflate_spans(table, Compression.GZIP, first, iter(()), stop)


def test_a_continue_span_cannot_be_begun_with() -> None:
    stream = STREAMS["one-block"][1](sample())
    table = scan(stream).spans
    with pytest.raises(ValueError, match="cannot be read"):
        compressed_range(table, 1, 2)
    with pytest.raises(ValueError, match="cannot be read"):
        inflate_spans(table, Compression.GZIP, 1, iter(()), 2)
    assert compressed_range(table, 0, 1) == (0, len(stream))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", STREAMS)
def test_damage_never_gives_wrong_bytes(name: str, engine: str) -> None:
    data = sample(400_000, seed=11)
    stream = STREAMS[name][1](data)
    result = scan(stream)
    table = result.spans
    rnd = random.Random(name)
    noticed = 0
    for _ in range(30):
        damaged = bytearray(stream)
        damaged[rnd.randrange(len(damaged))] ^= 1 << rnd.randrange(8)
        first = rnd.choice(restarts(table))
        chunks = pieces(bytes(damaged)[table.cstart(first) :], 10_000)
        try:
            for i, got in inflate_spans(table, result.compression, first, chunks, begin=ENGINES[engine]):
                assert got == data[table.ustart(i) : table.ustart(i + 1)]
        except (LayerError, IntegrityError):
            noticed += 1
    assert noticed > 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", STREAMS)
def test_truncation_is_an_error(name: str, engine: str) -> None:
    data = sample(400_000, seed=11)
    stream = STREAMS[name][1](data)
    result = scan(stream)
    end = stream.rstrip(b"\0") if name == "padded" else stream
    for cut in (0, 1, 5, len(end) // 3, len(end) // 2):
        with pytest.raises(LayerError):
            list(inflate_spans(result.spans, result.compression, 0, pieces(stream[:cut], 4096), begin=ENGINES[engine]))


def test_a_wrong_table_is_noticed() -> None:
    data = sample(1_000_000, seed=12)
    stream = deflate(data)
    good = scan(stream)
    point = next(i for i in restarts(good.spans) if good.spans.bit(i) and good.spans.window(i))

    def fails(table: SpanTable, first: int, *errors: type[Exception]) -> None:
        with pytest.raises(errors):
            list(inflate_spans(table, Compression.GZIP, first, pieces(stream[table.cstart(first) :], 4096), first + 1))

    table = scan(stream).spans
    table.digests[32 * point] ^= 1
    fails(table, point, IntegrityError)
    table = scan(stream).spans
    table.windows[point] = b""
    fails(table, point, IntegrityError)
    table = scan(stream).spans
    table.bits[point] = (table.bits[point] + 3) % 8
    fails(table, point, LayerError, IntegrityError)
    table = scan(stream).spans
    table.ustarts = array("Q", [0, MAX_SPAN + 1])
    del table.kinds[1:]
    fails(table, 0, LayerError)


def test_errors_of_the_source_pass_through() -> None:
    class OwnError(Exception):
        pass

    def source() -> Iterator[bytes]:
        yield stream[:10_000]
        raise OwnError

    stream = deflate(sample())
    result = scan(stream)
    with pytest.raises(OwnError):
        list(inflate_spans(result.spans, result.compression, 0, source()))


def test_window_keeps_exactly_what_is_used() -> None:
    """Three copies from known places in the window, one of them a copy of a copy, and literals in between."""
    rnd = random.Random(3)
    window = rnd.randbytes(WINDOW_SIZE)
    text = window[1_100:1_400] + b"!" + window[5_000:5_050] + rnd.randbytes(40) + window[1_120:1_200] + b"end"
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, window)
    stream = packer.compress(text) + packer.flush()
    for cut in (1, 7, len(stream)):
        probe = MarkerProbe()
        probe.start(0, 0)
        for piece in pieces(stream, cut):
            probe.feed(piece, 0, len(piece))
        sparse = probe.sparse(window)
        expected = bytearray(WINDOW_SIZE)
        expected[1_100:1_400], expected[5_000:5_050] = window[1_100:1_400], window[5_000:5_050]
        assert sum(a != b for a, b in zip(sparse, expected, strict=True)) <= 8  # a copy of a literal is not wrong
        assert zlib.decompressobj(-15, sparse).decompress(stream) == text


def test_no_window_where_nothing_is_used() -> None:
    table = scan(STREAMS["full-flush"][1](sample())).spans
    assert Restart.DEFLATE in table.kinds
    assert not any(table.windows)


def test_windows_are_sparse() -> None:
    table = scan(deflate(sample())).spans
    windows = [window for window in table.windows if window]
    assert windows
    assert sum(len(window) - window.count(0) for window in windows) < len(windows) * WINDOW_SIZE * 0.6


def test_zlib_and_zlib_ng_stop_at_the_same_blocks() -> None:
    """An index must not depend on which of the two a machine has."""
    other = libz.zlib_ng()
    assert other is not None, "zlib-ng is a dependency"
    stream = deflate(sample())

    def blocks(library: libz._Library) -> list[tuple[int, int, int]]:
        inflater = libz.RawInflate(library)
        output = bytearray(1 << 20)
        at, made, status, found = 10, 0, libz.Z_OK, []
        while status == libz.Z_OK:
            status, used, size, kind = inflater.inflate(
                libz.address_of(stream) + at,
                len(stream) - at,
                libz.address_of_buffer(output),
                len(output),
                libz.Z_BLOCK,
            )
            at, made = at + used, made + size
            if kind & libz.BLOCK_END:
                found.append((at, kind & libz.UNUSED_BITS, made))
        inflater.close()
        return found

    assert len(blocks(other)) > 10
    assert blocks(other) == blocks(libz.zlib())
