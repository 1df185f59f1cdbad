"""The layer cache: states of spans, crash rules, the cleaner's drop against readers, a disk that refuses."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shim import log
from shim.cache import bitmap, faultpoint
from shim.cache.layer import ABSENT, IN_MEMORY, MARKED, ON_DISK, VERIFIED, CachedLayer
from shim.cache.store import LayerCache
from shim.errors import CacheError
from tests.support.lazylayers import SampleLayer, sample_layer


@pytest.fixture
def sample() -> SampleLayer:
    return sample_layer(3_000_001)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[LayerCache]:
    cache = LayerCache(tmp_path / "cache")
    yield cache
    faultpoint.hook = None
    cache.close()


def span_bytes(sample: SampleLayer, span: int) -> bytes:
    return sample.data[sample.spans.ustart(span) : sample.spans.ustart(span + 1)]


def fill(layer: CachedLayer, sample: SampleLayer) -> None:
    for span in range(layer.count):
        assert layer.publish(span, span_bytes(sample, span))


def failing_writes(code: int) -> Callable[[str], None]:
    def hook(name: str) -> None:
        if name == "publish.write":
            raise OSError(code, os.strerror(code))

    return hook


def test_published_spans_are_read_back(cache: LayerCache, sample: SampleLayer) -> None:
    layer = cache.layer(sample.diff_id, sample.spans)
    assert layer.size % 512 == 0
    assert 0 <= layer.size - len(sample.data) < 512
    assert layer.stamp(0, 10) < 0
    assert layer.read(0, 10) is None
    assert layer.publish(0, span_bytes(sample, 0))
    stamp = layer.stamp(5, 100)
    assert stamp == layer.epoch
    assert os.pread(layer.data_fd, 100, 5) == sample.data[5:105]
    edge = sample.spans.ustart(1)
    assert layer.stamp(edge - 1, 2) < 0  # the next span is not there
    fill(layer, sample)
    assert layer.read(edge - 700, 1400) == sample.data[edge - 700 : edge + 700]
    tail = layer.size - 1000
    assert layer.stamp(tail, 1000) >= 0
    assert layer.read(tail, 1000) == sample.data[tail:].ljust(1000, b"\0")
    assert layer.cached_bytes == len(sample.data)


def test_a_reopened_layer_hashes_each_span_before_its_first_use(tmp_path: Path, sample: SampleLayer) -> None:
    cache = LayerCache(tmp_path)
    layer = cache.layer(sample.diff_id, sample.spans)
    fill(layer, sample)
    path = layer.path
    cache.close()
    position = sample.spans.ustart(3) + 1000
    with open(path / "data", "r+b") as file:  # a flipped bit on the disk
        file.seek(position)
        file.write(bytes([sample.data[position] ^ 4]))
    cache = LayerCache(tmp_path)
    layer = cache.layer(sample.diff_id, sample.spans)
    assert set(layer.states) == {ON_DISK}
    assert layer.stamp(0, 10) < 0
    assert layer.read(0, 10) is None
    assert layer.verify(0)
    assert layer.read(0, 10) == sample.data[:10]
    assert not layer.verify(3)
    assert layer.states[3] == ABSENT
    cache.close()
    cache = LayerCache(tmp_path)
    layer = cache.layer(sample.diff_id, sample.spans)
    assert layer.states[3] == ABSENT  # that is remembered
    assert layer.states[4] == ON_DISK
    cache.close()


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "shorten-data", "empty", "longer"])
def test_a_torn_bitmap_or_data_file_counts_as_empty(tmp_path: Path, sample: SampleLayer, damage: str) -> None:
    cache = LayerCache(tmp_path)
    layer = cache.layer(sample.diff_id, sample.spans)
    fill(layer, sample)
    path = layer.path
    cache.close()
    raw = bytearray((path / "bitmap").read_bytes())
    if damage == "truncate":
        (path / "bitmap").write_bytes(raw[:-1])
    elif damage == "flip":
        raw[50] ^= 1
        (path / "bitmap").write_bytes(raw)
    elif damage == "remove":
        (path / "bitmap").unlink()
    elif damage == "shorten-data":
        os.truncate(path / "data", layer.size - 512)
    elif damage == "empty":
        (path / "bitmap").write_bytes(b"")
    else:
        (path / "bitmap").write_bytes(raw + b"x")
    cache = LayerCache(tmp_path)
    layer = cache.layer(sample.diff_id, sample.spans)
    assert set(layer.states) == {ABSENT}
    assert (path / "data").stat().st_size == layer.size
    assert (path / "data").stat().st_blocks == 0
    cache.close()


def test_another_table_for_the_same_diff_id_has_its_own_files(cache: LayerCache, sample: SampleLayer) -> None:
    other = sample_layer(3_000_001, seed=2)
    first = cache.layer(sample.diff_id, sample.spans)
    second = cache.layer(sample.diff_id, other.spans)
    assert first.path != second.path
    with pytest.raises(CacheError, match="open already"):
        cache.layer(sample.diff_id, sample.spans)
    with pytest.raises(CacheError, match="no diff id"):
        cache.layer("sha256:../../etc", sample.spans)


def test_bits_of_a_bitmap_of_another_table_are_not_believed(tmp_path: Path) -> None:
    bitmap.store(tmp_path / "b", b"\1\0\1\1\0\0\0\0\1", b"d" * 32)
    assert bitmap.load(tmp_path / "b", 9, b"d" * 32) == bytearray(b"\1\0\1\1\0\0\0\0\1")
    assert bitmap.load(tmp_path / "b", 9, b"e" * 32) is None
    assert bitmap.load(tmp_path / "b", 10, b"d" * 32) is None


def test_data_is_on_disk_before_its_bit(cache: LayerCache, sample: SampleLayer) -> None:
    """What is published while a flush runs is not in the bitmap that flush writes."""
    layer = cache.layer(sample.diff_id, sample.spans)
    layer.publish(0, span_bytes(sample, 0))

    def hook(name: str) -> None:
        if name == "flush.synced":
            faultpoint.hook = None
            layer.publish(1, span_bytes(sample, 1))

    faultpoint.hook = hook
    layer.flush()
    flags = bitmap.load(layer.path / "bitmap", layer.count, sample.spans.table_digest())
    assert flags is not None
    assert (flags[0], flags[1]) == (1, 0)
    layer.flush()
    flags = bitmap.load(layer.path / "bitmap", layer.count, sample.spans.table_digest())
    assert flags is not None
    assert (flags[0], flags[1]) == (1, 1)


def test_the_flusher_makes_bits_durable_by_itself(cache: LayerCache, sample: SampleLayer) -> None:
    layer = cache.layer(sample.diff_id, sample.spans)
    synced = threading.Event()
    faultpoint.hook = lambda name: synced.set() if name == "flush.synced" else None
    layer.publish(0, span_bytes(sample, 0))
    assert synced.wait(10)


def test_a_killed_daemon_leaves_a_cache_that_tells_the_truth(tmp_path: Path) -> None:
    script = """
import os, signal, sys
from pathlib import Path
from shim.cache.store import LayerCache
from tests.support.lazylayers import sample_layer
s = sample_layer(1_000_000)
layer = LayerCache(Path(sys.argv[1])).layer(s.diff_id, s.spans)
def put(i): layer.publish(i, s.data[s.spans.ustart(i):s.spans.ustart(i + 1)])
put(0); put(1); layer.flush(); put(2)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=Path.cwd()).returncode == -9
    sample = sample_layer(1_000_000)
    cache = LayerCache(tmp_path)  # the kernel gave the lock back
    layer = cache.layer(sample.diff_id, sample.spans)
    assert list(layer.states[:4]) == [ON_DISK, ON_DISK, ABSENT, ABSENT]
    assert layer.verify(0)
    assert layer.verify(1)
    cache.close()


def test_two_daemons_cannot_share_a_cache(cache: LayerCache) -> None:
    with pytest.raises(CacheError, match="another daemon"):
        LayerCache(cache.root)


def test_drop_gives_space_back_and_is_fetched_again(cache: LayerCache, sample: SampleLayer) -> None:
    layer = cache.layer(sample.diff_id, sample.spans)
    fill(layer, sample)
    os.fdatasync(layer.data_fd)
    before = os.fstat(layer.data_fd).st_blocks
    stamp = layer.stamp(0, 100)
    assert layer.drop(range(layer.count - 1)) > 2_500_000
    assert os.fstat(layer.data_fd).st_blocks < before / 2
    assert layer.epoch != stamp
    assert layer.stamp(0, 100) < 0
    last = sample.spans.ustart(layer.count - 1)
    assert layer.read(last, 100) == sample.data[last : last + 100]
    flags = bitmap.load(layer.path / "bitmap", layer.count, sample.spans.table_digest())
    assert flags is not None
    assert sum(flags) == 1
    layer.publish(0, span_bytes(sample, 0))
    assert layer.read(0, 100) == sample.data[:100]


def test_a_reader_between_clearing_and_punching_sees_it(cache: LayerCache, sample: SampleLayer) -> None:
    layer = cache.layer(sample.diff_id, sample.spans)
    fill(layer, sample)

    def hook(name: str) -> None:
        if name == "read.copied":
            faultpoint.hook = None
            layer.drop([0])

    faultpoint.hook = hook
    assert layer.read(0, 100) is None


def test_a_span_published_while_it_is_dropped_keeps_its_bytes(cache: LayerCache, sample: SampleLayer) -> None:
    layer = cache.layer(sample.diff_id, sample.spans)
    fill(layer, sample)
    publisher: list[threading.Thread] = []

    def hook(name: str) -> None:
        if name == "drop.cleared":
            thread = threading.Thread(target=layer.publish, args=(0, span_bytes(sample, 0)))
            thread.start()
            thread.join(0.2)  # it must wait for the hole
            assert layer.states[0] == ABSENT
            publisher.append(thread)

    faultpoint.hook = hook
    layer.drop([0])
    publisher[0].join()
    assert layer.stamp(0, 1000) >= 0
    assert os.pread(layer.data_fd, 1000, 0) == sample.data[:1000]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_leaves_reads_in_memory(
    tmp_path: Path, sample: SampleLayer, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[int] = []
    lines: list[str] = []
    monkeypatch.setattr(log, "error", lambda event, **_: lines.append(event))
    cache = LayerCache(tmp_path, memory_bytes=40_000, on_full=lambda: woken.append(1))
    layer = cache.layer(sample.diff_id, sample.spans)
    layer.publish(0, span_bytes(sample, 0))
    faultpoint.hook = failing_writes(code)
    for span in (1, 2, 3, 4):
        assert layer.publish(span, span_bytes(sample, span))
    edge = sample.spans.ustart(4)
    assert layer.read(edge, 50) == sample.data[edge : edge + 50]
    assert layer.states[4] == IN_MEMORY
    assert layer.states[1] == ABSENT  # pushed out: memory is bounded
    assert cache.memory.used <= 40_000
    assert len(woken) == (code == errno.ENOSPC)
    faultpoint.hook = None
    assert layer.publish(1, span_bytes(sample, 1))
    assert layer.states[1] == VERIFIED
    cache.close()
    assert lines == ["the layer cache cannot be written; reads go on from memory"]


def test_a_disk_that_fails_to_sync(cache: LayerCache, sample: SampleLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync(2) says once that it lost something, and the page cache still has it: what was not synced is given up, what
    was stays, and new spans go to memory."""
    monkeypatch.setattr(log, "error", lambda *_, **__: None)
    layer = cache.layer(sample.diff_id, sample.spans)
    layer.publish(0, span_bytes(sample, 0))
    cache.flush()
    layer.publish(1, span_bytes(sample, 1))
    epoch = layer.epoch

    def hook(name: str) -> None:
        if name == "flush.sync":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    faultpoint.hook = hook
    cache.flush()
    faultpoint.hook = None
    assert list(layer.states[:2]) == [VERIFIED, ABSENT]
    assert layer.epoch > epoch
    cache.flush()
    assert list(bitmap.load(layer.path / "bitmap", layer.count, sample.spans.table_digest()) or b"")[:2] == [1, 0]
    assert layer.publish(1, span_bytes(sample, 1))
    assert layer.states[1] == IN_MEMORY
    assert layer.read(sample.spans.ustart(1), 100) == span_bytes(sample, 1)[:100]


def test_a_real_full_disk(tmp_path: Path, sample: SampleLayer) -> None:
    """RLIMIT_FSIZE makes write(2) fail half way through a span, as a full disk does."""
    script = """
import resource, signal, sys
from pathlib import Path
from shim.cache.layer import IN_MEMORY, VERIFIED
from shim.cache.store import LayerCache
from tests.support.lazylayers import sample_layer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
s = sample_layer(3_000_001)
cache = LayerCache(Path(sys.argv[1]))
layer = cache.layer(s.diff_id, s.spans)
half = s.spans.ustart(5) + 10_000
resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))
for i in range(8):
    assert layer.publish(i, s.data[s.spans.ustart(i):s.spans.ustart(i + 1)])
assert list(layer.states[:8]) == [VERIFIED] * 5 + [IN_MEMORY] * 3, list(layer.states[:8])
low, high = s.spans.ustart(4) + 7, s.spans.ustart(7) + 9
assert layer.read(low, high - low) == s.data[low:high]
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=Path.cwd(), check=True)


def test_without_a_directory_everything_lives_in_memory(tmp_path: Path, sample: SampleLayer) -> None:
    cache = LayerCache(tmp_path / "cache")
    name = f"{sample.diff_id[7:]}-{sample.spans.table_digest().hex()[:16]}"
    (tmp_path / "cache" / name).write_text("in the way")
    layer = cache.layer(sample.diff_id, sample.spans)
    assert layer.publish(0, span_bytes(sample, 0))
    assert layer.stamp(0, 10) < 0
    assert layer.read(0, 10) == sample.data[:10]
    cache.close()


def test_marks_are_taken_once(cache: LayerCache, sample: SampleLayer) -> None:
    layer = cache.layer(sample.diff_id, sample.spans)
    layer.mark(0)
    assert layer.states[0] == ABSENT
    layer.publish(0, span_bytes(sample, 0))
    layer.mark(0)
    assert layer.states[0] == MARKED
    assert layer.stamp(0, 10) < 0
    assert layer.read(0, 10) == sample.data[:10]
    assert layer.unmark(0)
    assert not layer.unmark(0)
    assert layer.stamp(0, 10) >= 0


def test_a_data_file_that_cannot_be_read_back_is_fetched_again(cache: LayerCache, sample: SampleLayer) -> None:
    layer = cache.layer(sample.diff_id, sample.spans)
    fill(layer, sample)
    os.ftruncate(layer.data_fd, 1000)
    assert layer.read(500, 1000) is None
    assert layer.states[0] == ABSENT


def test_entries_and_removal(cache: LayerCache, sample: SampleLayer) -> None:
    layer = cache.layer(sample.diff_id, sample.spans)
    fill(layer, sample)
    layer.flush()
    (entry,) = cache.entries()
    assert entry.is_open
    assert entry.allocated >= len(sample.data)
    assert not cache.remove(entry.name)
    cache.close_layer(layer)
    assert cache.remove(entry.name)
    assert cache.entries() == []
    with pytest.raises(CacheError):
        cache.remove("../somewhere")
