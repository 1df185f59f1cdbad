"""The streaming scan: digests, span tables, restart points, bounds, damage."""

from __future__ import annotations

import gzip
import hashlib
import random
import struct
import threading
import zlib

import pytest

from shim.errors import LayerError
from shim.index.model import WINDOW_SIZE, Compression, Restart, SpanTable
from shim.layers.scan import LayerScanner
from shim.layers.spans import SPANS_A_POINT
from tests.support.layerdata import (
    SPACING,
    STREAMS,
    deflate,
    flushed,
    ignore,
    members,
    one_block,
    sample,
    scan,
    skippable,
    zstd,
    zstd_chunked,
    zstd_stream,
)


def as_tuple(table: SpanTable) -> tuple[object, ...]:
    return (
        list(table.ustarts),
        list(table.cstarts),
        bytes(table.bits),
        bytes(table.kinds),
        bytes(table.digests),
        list(table.windows),
    )


def points(table: SpanTable) -> list[int]:
    """Uncompressed offsets of the restart points."""
    return [table.ustart(i) for i in range(table.count) if table.kind(i) != Restart.CONTINUE]


@pytest.mark.parametrize("name", STREAMS)
def test_digests_and_spans_of_every_kind_of_stream(name: str) -> None:
    compression, pack = STREAMS[name]
    data = sample()
    stream = pack(data)
    result = scan(stream)
    assert result.compression == compression
    assert result.digest == "sha256:" + hashlib.sha256(stream).hexdigest()
    assert result.diff_id == "sha256:" + hashlib.sha256(data).hexdigest()
    assert (result.size, result.uncompressed_size) == (len(stream), len(data))
    table = result.spans
    count = table.count
    assert table.ustarts[0] == table.cstarts[0] == 0
    assert (table.ustarts[count], table.cstarts[count]) == (len(data), len(stream))
    assert len(table.bits) == len(table.windows) == len(table.ustarts) - 1 == len(table.cstarts) - 1 == count
    assert table.kinds[0] == Restart.STREAM
    for i in range(count):
        start, end = table.ustart(i), table.ustart(i + 1)
        assert 0 < end - start <= SPACING // SPANS_A_POINT
        assert table.digest(i) == hashlib.sha256(data[start:end]).digest()
        assert table.cstart(i) <= table.cstart(i + 1)
        if i and table.kind(i) != Restart.CONTINUE:
            assert start - table.ustart(table.restart(i - 1)) >= SPACING
        assert len(table.window(i)) == (WINDOW_SIZE if table.window(i) else 0)
        assert table.kind(i) == Restart.DEFLATE or not (table.window(i) or table.bit(i))


@pytest.mark.parametrize("name", STREAMS)
def test_table_does_not_depend_on_how_the_input_is_cut(name: str) -> None:
    rnd = random.Random(7)
    smallest = 1 if name in ("zlib-small-blocks", "zstd-chunked") else 17
    for size, pieces in ((140_000, [smallest]), (800_000, [rnd.randint(200, 20_000) for _ in range(4)])):
        stream = STREAMS[name][1](sample(size, seed=5))
        whole = as_tuple(scan(stream).spans)
        for piece in pieces:
            assert as_tuple(scan(stream, piece=piece).spans) == whole


def test_a_point_is_the_first_block_end_that_is_due() -> None:
    """A flush at exactly `spacing` bytes gives a point exactly there, a byte earlier gives the one after it."""
    data = sample()
    for size, expected in ((SPACING, SPACING), (SPACING - 1, 2 * (SPACING - 1))):
        table = scan(flushed(data, size)).spans
        starts = [table.ustart(i) for i in range(table.count) if table.kind(i) == Restart.DEFLATE]
        assert min(starts) <= expected
        blocks = [start for start in starts if start % size == 0]
        assert blocks
    table = scan(flushed(bytes(1 << 20), SPACING)).spans
    assert points(table) == list(range(0, 1 << 20, SPACING))


def test_members_give_stream_points() -> None:
    table = scan(members(sample(), SPACING)).spans
    assert set(table.kinds) == {Restart.STREAM, Restart.CONTINUE}
    assert points(table) == list(range(0, 3 << 20, SPACING))


def test_a_giant_block_is_cut_into_continue_spans() -> None:
    data = sample()
    table = scan(one_block(data)).spans
    assert bytes(table.kinds) == bytes([Restart.STREAM]) + bytes(table.count - 1)
    assert list(table.ustarts) == [*range(0, len(data), SPACING // SPANS_A_POINT), len(data)]
    assert set(table.cstarts[:-1]) == {0}


def test_plain_layers_are_cut_exactly() -> None:
    data = b"\0" * 1000 + sample(300_000)
    table = scan(data).spans
    assert list(table.ustarts) == [*range(0, len(data), SPACING // SPANS_A_POINT), len(data)]
    assert points(table) == list(range(0, len(data), SPACING))
    assert set(table.kinds) == {Restart.STREAM, Restart.CONTINUE}
    assert all(table.cstart(i) == table.ustart(table.restart(i)) for i in range(table.count))


def test_zstd_frames_give_points_at_their_magic() -> None:
    data = sample()
    stream = zstd_chunked(data, 50_000)
    table = scan(stream).spans
    assert set(table.kinds) == {Restart.STREAM, Restart.CONTINUE}
    assert len(points(table)) > 20
    starts = set(table.cstarts[:-1]) - {0}  # the first one begins with a skippable frame
    assert all(stream[start:][:4] == b"\x28\xb5\x2f\xfd" for start in starts)
    assert set(scan(zstd(data)).spans.kinds[1:]) == {Restart.CONTINUE}


@pytest.mark.parametrize(
    ("stream", "compression"),
    [(b"", Compression.NONE), (gzip.compress(b"") * 2, Compression.GZIP), (zstd(b""), Compression.ZSTD)],
)
def test_empty_layers(stream: bytes, compression: Compression) -> None:
    result = scan(stream)
    assert (result.compression, result.uncompressed_size, result.spans.count) == (compression, 0, 0)
    assert (list(result.spans.ustarts), list(result.spans.cstarts)) == ([0], [len(stream)])
    assert result.diff_id == "sha256:" + hashlib.sha256(b"").hexdigest()


def test_a_point_at_the_very_end_is_dropped() -> None:
    data = sample(2 * SPACING, seed=3)
    stream = flushed(data, SPACING)  # the last block is empty and begins at the end of the data
    table = scan(stream).spans
    assert list(table.ustarts) == list(range(0, 2 * SPACING + 1, SPACING // SPANS_A_POINT))
    assert points(table) == [0, SPACING]
    assert len(table.digests) == 2 * SPANS_A_POINT * 32


@pytest.mark.parametrize("name", STREAMS)
def test_callbacks_see_every_byte(name: str) -> None:
    data = sample(700_000, seed=9)
    stream = STREAMS[name][1](data)
    seen = bytearray()
    spans: list[tuple[int, bytes]] = []

    def on_span(i: int, view: memoryview) -> None:
        assert view.readonly
        spans.append((i, bytes(view)))

    def on_data(view: memoryview) -> None:
        assert view.readonly
        seen.extend(view)

    with LayerScanner(None, SPACING, on_data, on_span) as scanner:
        scanner.feed(bytearray(stream[:1000]))
        scanner.feed(memoryview(stream)[1000:])
        table = scanner.finish().spans
    assert seen == data
    assert spans == [(i, data[table.ustart(i) : table.ustart(i + 1)]) for i in range(table.count)]


@pytest.mark.parametrize("name", [name for name in STREAMS if name != "plain"])
def test_truncation_anywhere_is_an_error(name: str) -> None:
    data = sample(200_000, seed=2)
    stream = STREAMS[name][1](data)
    rnd = random.Random(name)
    whole = stream.rstrip(b"\0") if name == "padded" else stream
    cuts = [*range(1, 12), *(len(whole) - n for n in range(1, 12)), *(rnd.randrange(12, len(whole)) for _ in range(15))]
    for cut in cuts:
        try:
            result = scan(stream[:cut], compression=STREAMS[name][0])
        except LayerError:
            continue
        # Only where a member or frame ends: then it is a shorter, whole stream.
        assert hashlib.sha256(data[: result.uncompressed_size]).hexdigest() == result.diff_id[7:]
        assert "members" in name or "decorated" in name or "chunked" in name


@pytest.mark.parametrize("name", [name for name in STREAMS if name != "plain"])
def test_random_damage_is_an_error_or_the_same_bytes(name: str) -> None:
    data = sample(150_000, seed=4)
    stream = STREAMS[name][1](data)
    diff_id = "sha256:" + hashlib.sha256(data).hexdigest()
    rnd = random.Random(name)
    for _ in range(40):
        damaged = bytearray(stream)
        for _ in range(rnd.randint(1, 3)):
            damaged[rnd.randrange(len(damaged))] ^= 1 << rnd.randrange(8)
        try:
            result = scan(bytes(damaged), compression=STREAMS[name][0])
        except LayerError:
            continue
        if name not in ("zstd", "zstd-chunked"):  # zstd without a checksum notices only damaged structure
            assert result.diff_id == diff_id


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (deflate(b"x" * 1000) + b"garbage!!!garbage", "no gzip member"),
        (deflate(b"x" * 1000) + bytes(100) + b"x", "garbage after"),
        (deflate(b"x" * 1000)[:-8] + bytes(8), "checksum"),
        (deflate(b"x" * 1000)[:-4] + b"\1\0\0\0", "checksum"),
        (b"\x1f\x8b\x08\xe0" + bytes(30), "no gzip member"),
        (b"\x1f\x8b\x08\x02" + bytes(6) + b"\xff\xff" + bytes(30), "match its checksum"),
        (b"\x1f\x8b\x08\x08" + bytes(6) + b"n" * 70_000, "endless name"),
        (b"\x1f\x8b\x08\x00" + bytes(6) + b"\x07" * 30, "not valid deflate"),
        (zstd(b"x" * 1000) + b"garbage", "no zstd frame"),
        (b"\x28\xb5\x2f\xfd\x00\xff" + bytes(9), "window"),
        (b"\x28\xb5\x2f\xfd\x01\x00\x05" + bytes(9), "dictionary"),
        (b"\x28\xb5\x2f\xfd\x08\x00" + bytes(9), "reserved"),
        (b"\x28\xb5\x2f\xfd\x00\x00\x07\x00\x00" + bytes(9), "damaged block"),
        (b"\x28\xb5\x2f\xfd\x00\x00\xff\xff\xff" + bytes(9), "damaged block"),
        (b"BZh91AY&SY", "bzip2"),
        (b"\xfd7zXZ\0", "xz"),
    ],
)
def test_damage_is_named(stream: bytes, message: str) -> None:
    with pytest.raises(LayerError, match=message):
        scan(stream)


def test_declared_compression_must_be_right() -> None:
    for wrong, stream in (
        (Compression.GZIP, b"plain" * 200),
        (Compression.ZSTD, deflate(b"x")),
        (Compression.GZIP, b""),
    ):
        with pytest.raises(LayerError):
            scan(stream, compression=wrong)
    assert scan(deflate(b"x"), compression=Compression.NONE).uncompressed_size == len(deflate(b"x"))


def test_zstd_window_limit_of_single_segment_frames() -> None:
    header = b"\x28\xb5\x2f\xfd" + bytes([0xE0]) + struct.pack("<Q", 1 << 40)
    with pytest.raises(LayerError, match="window of 1048576 MiB"):
        scan(header + bytes(100))


@pytest.mark.parametrize("pack", [deflate, zstd_stream, bytes])
def test_size_limit(pack: object) -> None:
    assert callable(pack)
    stream = pack(bytes(3_000_000))
    for limit, fits in ((3_000_000, True), (2_999_999, False)):
        with LayerScanner(None, SPACING, ignore, max_uncompressed=limit) as scanner:
            if fits:
                scanner.feed(stream)
                assert scanner.finish().uncompressed_size == limit
            else:
                with pytest.raises(LayerError, match="more than 2999999 bytes"):  # noqa: PT012 - either call may see it
                    scanner.feed(stream)
                    scanner.finish()


@pytest.mark.parametrize(
    "unit",
    [gzip.compress(b""), skippable(b""), zstd(b"")],
    ids=["members", "skippable-frames", "frames"],
)
def test_endless_empty_parts_are_refused(unit: bytes) -> None:
    with pytest.raises(LayerError, match="endless empty parts"):
        scan(unit * 100_010)


def test_endless_empty_blocks_are_refused() -> None:
    raw = zlib.compressobj(0, zlib.DEFLATED, -15)
    start = raw.compress(bytes(SPACING - 1)) + raw.flush(zlib.Z_SYNC_FLUSH)
    with pytest.raises(LayerError, match="endless empty parts"):
        scan(gzip.compress(b"")[:10] + start + b"\0\0\0\xff\xff" * 120_000, piece=50_000)


def test_errors_of_callbacks_come_out() -> None:
    class OwnError(Exception):
        pass

    def fail(_: memoryview) -> None:
        raise OwnError

    data = sample()
    with LayerScanner(None, SPACING, fail) as scanner, pytest.raises(OwnError):  # noqa: PT012 - either call may see it
        for _ in range(20):
            scanner.feed(data)
        scanner.finish()


@pytest.mark.timeout(30)
def test_feed_does_not_wait_for_a_decoder_that_failed() -> None:
    """While `feed` waits for room, the decoder, busy with much output, meets garbage."""
    stream = deflate(bytes(100 << 20)) + b"garbage" * (2 << 20)
    with LayerScanner(None, SPACING, ignore) as scanner, pytest.raises(LayerError, match="no gzip member"):
        scanner.feed(stream)


def test_no_thread_is_left() -> None:
    before = set(threading.enumerate())
    with LayerScanner(None, SPACING, ignore) as scanner:
        scanner.feed(deflate(sample())[:100_000])
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before
    scanner.close()
    with pytest.raises(ValueError, match="finished"):
        scanner.feed(b"x")
    with pytest.raises(ValueError, match="finished"):
        scanner.finish()
    with pytest.raises(LayerError):
        scan(b"\x1f\x8b" + bytes(100) * 100_000)
    assert set(threading.enumerate()) == before


def test_spacing_is_bounded() -> None:
    for spacing in (0, -1, WINDOW_SIZE, 1 << 30):
        with pytest.raises(ValueError, match="spacing"):
            LayerScanner(None, spacing, ignore)
