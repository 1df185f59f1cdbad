"""The mapped span file says what the table in memory says, and notices damage."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest

from shim.errors import CacheError, IndexFormatError
from shim.index.model import Compression, Layer, Restart, Spans
from shim.index.spanfile import SpanFile, write_span_file
from shim.index.sparse import SparseWindows, records_of
from tests.support.indexes import digest, sample_layers, spans, window


def _large(points: int) -> Layer:
    rows = [(0, 0, 0, Restart.STREAM, b"")]
    rows += [(i << 21, i << 19, i % 8, Restart.DEFLATE, window(i, 200)) for i in range(1, points)]
    table = spans(points << 19, points << 21, rows)
    return Layer(digest("x"), digest("y"), points << 19, points << 21, "a/b", Compression.GZIP, table)


@pytest.mark.parametrize("number", range(4))
def test_says_what_the_table_says(tmp_path: Path, number: int) -> None:
    layer = sample_layers()[number]
    write_span_file(tmp_path / "spans", layer)
    table: Spans = layer.spans
    with SpanFile(tmp_path / "spans") as mapped:
        same: Spans = mapped
        assert same.count == table.count
        assert (mapped.size, mapped.uncompressed_size) == (layer.size, layer.uncompressed_size)
        assert (mapped.blob_digest, mapped.diff_id) == (layer.digest, layer.diff_id)
        assert mapped.compression is layer.compression
        assert same.table_digest() == table.table_digest()
        for i in range(table.count + 1):
            assert (same.ustart(i), same.cstart(i)) == (table.ustart(i), table.cstart(i))
        for i in range(table.count):
            assert (same.kind(i), same.bit(i), same.digest(i)) == (table.kind(i), table.bit(i), table.digest(i))
            assert same.window(i) == table.window(i)
            assert (same.restart(i), same.run_end(i)) == (table.restart(i), table.run_end(i))
            for offset in (table.ustart(i), table.ustart(i + 1) - 1):
                assert same.find(offset) == table.find(offset) == i


def _same_crc(wanted: int, data: bytes) -> bytes:
    """`data` with its last four bytes changed so that its CRC-32 is `wanted`: CRCs are linear, so this is easy."""
    body = data[:-4]
    base = zlib.crc32(body + bytes(4))
    rows = [(zlib.crc32(body + (1 << bit).to_bytes(4, "little")) ^ base, 1 << bit) for bit in range(32)]
    need, patch = wanted ^ base, 0
    for bit in reversed(range(32)):  # Gauss
        pivot = next(row for row in rows if row[0] >> bit == 1)
        rows = [(a ^ pivot[0], b ^ pivot[1]) if a >> bit & 1 else (a, b) for a, b in rows if (a, b) != pivot]
        if need >> bit & 1:
            need, patch = need ^ pivot[0], patch ^ pivot[1]
    return body + patch.to_bytes(4, "little")


def test_another_window_of_the_same_crc_is_another_identity(tmp_path: Path) -> None:
    """Or an index could make another's fetches fail, by windows that nothing else in the table speaks of."""
    layer, forged = sample_layers()[0], sample_layers()[0]
    record = records_of(layer.spans.windows)[1]
    false = _same_crc(zlib.crc32(record), record[:-8] + b"forged!!")
    assert zlib.crc32(false) == zlib.crc32(record)
    forged.spans.windows = SparseWindows(records=[*records_of(layer.spans.windows)])
    forged.spans.windows.records[1] = false
    write_span_file(tmp_path / "true", layer)
    write_span_file(tmp_path / "false", forged)
    with SpanFile(tmp_path / "true") as one, SpanFile(tmp_path / "false") as other:
        assert one.window(1) != other.window(1)
        assert one.table_digest() == other.table_digest()
        assert one.identity != other.identity


def test_invalid_layer_is_not_written(tmp_path: Path) -> None:
    layer = sample_layers()[0]
    layer.spans.kinds[0] = Restart.CONTINUE
    with pytest.raises(IndexFormatError, match="no start of a stream"):
        write_span_file(tmp_path / "spans", layer)
    assert os.listdir(tmp_path) == []


def test_write_failure_is_a_cache_error(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="cannot write span file"):
        write_span_file(tmp_path / "none" / "spans", sample_layers()[0])


def test_absent_or_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="cannot map"):
        SpanFile(tmp_path / "none")
    with pytest.raises(CacheError, match="cannot map"):
        SpanFile(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CacheError, match="damaged"):
        SpanFile(tmp_path / "fifo")


def test_every_torn_or_flipped_byte_is_noticed(tmp_path: Path) -> None:
    layer = sample_layers()[0]
    path = tmp_path / "spans"
    write_span_file(path, layer)
    good = path.read_bytes()
    for length in range(0, len(good), 13):
        path.write_bytes(good[:length])
        with pytest.raises(CacheError, match="damaged"):
            SpanFile(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(CacheError, match="damaged"):
        SpanFile(path)
    opened = 0  # the table is whole, so a window is not

    def read_all() -> None:
        nonlocal opened
        with SpanFile(path) as mapped:
            opened += 1
            for i in range(mapped.count):
                mapped.window(i)

    path.write_bytes(good)
    read_all()
    for at in range(0, len(good), 7):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        with pytest.raises(CacheError, match="damaged"):
            read_all()
    assert opened > 10


def test_closed(tmp_path: Path) -> None:
    write_span_file(tmp_path / "spans", sample_layers()[0])
    mapped = SpanFile(tmp_path / "spans")
    mapped.close()
    mapped.close()
    with pytest.raises(ValueError, match="released"):
        mapped.ustart(0)


def test_windows_stay_on_disk(tmp_path: Path) -> None:
    """5,000 points (10 GiB of layer), over 10 MiB of file: opening and one look cost a process next to nothing."""
    write_span_file(tmp_path / "spans", _large(5000))
    assert (tmp_path / "spans").stat().st_size > 10 << 20
    code = (
        "import re, sys\nfrom shim.index.spanfile import SpanFile\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak()\n"
        "spans = SpanFile(sys.argv[1])\n"
        "assert len(spans.window(spans.find(5 << 30))) == 32768\n"
        "print(peak() - before)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "spans")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 6 << 10  # KiB; the windows alone take 10 MiB


def test_threads_share_one(tmp_path: Path) -> None:
    layer = _large(64)
    write_span_file(tmp_path / "spans", layer)
    expected = [hashlib.sha256(layer.spans.window(i)).digest() for i in range(64)]
    wrong: list[int] = []
    with SpanFile(tmp_path / "spans") as mapped:

        def read() -> None:
            got = [hashlib.sha256(mapped.window(mapped.find(i << 21))).digest() for i in range(64)]
            wrong.extend(i for i in range(64) if got[i] != expected[i])

        threads = [threading.Thread(target=read) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
