"""The span fetcher: one fetch for many readers, retries, wrong bytes, read-ahead, the pool, a full disk."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shim import log
from shim.cache import faultpoint
from shim.cache.fetch import LazyLayer
from shim.cache.layer import ABSENT, ON_DISK
from shim.cache.pool import FetchPool, Workers
from shim.cache.readahead import Readahead
from shim.cache.store import LayerCache
from shim.errors import IntegrityError, NotFoundError, RegistryError, ShimError
from shim.index.model import Compression, Restart
from shim.layers.inflate import compressed_range
from tests.support.lazylayers import SampleLayer, Source, sample_layer

SIZE = 4 << 20


@dataclass
class Clock:
    """Time that passes only when somebody pauses."""

    now: float = 1000.0
    pauses: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@dataclass
class Bench:
    """One lazy layer over a source, with its cache."""

    lazy: LazyLayer
    source: Source
    clock: Clock
    cache: LayerCache
    pool: FetchPool

    @property
    def sample(self) -> SampleLayer:
        return self.source.layer

    def start(self, offset: int, size: int) -> Future[bytes]:
        """A read as the server does it."""
        future: Future[bytes] = Future()
        stamp = self.lazy.stamp(offset, size)
        if stamp >= 0:
            data = os.pread(self.lazy.data_fd, size, offset)
            if self.lazy.epoch == stamp:
                future.set_result(data)
                return future
        cached = self.lazy.read_cached(offset, size)
        if cached is not None:
            future.set_result(bytes(cached))
            return future

        def done(result: object) -> None:
            if isinstance(result, ShimError):
                future.set_exception(result)
            else:
                future.set_result(bytes(result))  # type: ignore[call-overload]

        self.lazy.read_missing(offset, size, done)
        return future

    def read(self, offset: int, size: int) -> bytes:
        return self.start(offset, size).result(20)

    def check(self, offset: int, size: int) -> None:
        assert self.read(offset, size) == self.sample.data[offset : offset + size].ljust(size, b"\0")

    def close(self) -> None:
        self.source.gate.set()
        self.lazy.close()
        self.pool.close()
        self.cache.close()


def runs(sample: SampleLayer) -> list[int]:
    """The first span of each run."""
    return [i for i in range(sample.spans.count) if sample.spans.kind(i) != Restart.CONTINUE]


Make = Callable[..., Bench]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Bench] = []

    def build(
        sample: SampleLayer | None = None,
        *,
        readahead: int = 0,
        threads: int = 4,
        memory: int = 64 << 20,
        **source: object,
    ) -> Bench:
        sample = sample or sample_layer(SIZE)
        cache = LayerCache(tmp_path / f"cache{len(made)}", memory_bytes=memory)
        pool, clock = FetchPool(threads), Clock()
        origin = Source(sample, **source)  # type: ignore[arg-type]
        cached = cache.layer(sample.diff_id, sample.spans)
        lazy = LazyLayer(
            node_id=20,
            name=b"x",
            compression=sample.compression,
            cached=cached,
            open_range=origin.open_range,
            pool=pool,
            source="registry.test",
            readahead=readahead,
            clock=clock,
            pause=clock.pause,
        )
        made.append(Bench(lazy, origin, clock, cache, pool))
        return made[-1]

    yield build
    faultpoint.hook = None
    for bench in made:
        bench.close()


KINDS = [
    (Compression.GZIP, True),
    (Compression.ZSTD, True),
    (Compression.ZSTD, False),
    (Compression.NONE, True),
]


@pytest.mark.parametrize(("compression", "points"), KINDS)
def test_every_byte_is_right_under_random_reads(make: Make, compression: Compression, points: bool) -> None:
    sample = sample_layer(SIZE + 77, compression, points=points)
    bench = make(sample, readahead=1 << 20)
    seen: list[BaseException] = []

    def reader(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(60):
                size = rng.choice((1, 4096, 65536, 300_000))
                bench.check(rng.randrange(0, bench.lazy.size - size), size)
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            seen.append(error)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not seen
    bench.check(bench.lazy.size - 600, 600)
    stats = bench.lazy.stats()
    assert stats.demand + stats.readahead == sum(1 for state in bench.lazy.cached.states if state)  # none twice


def test_an_empty_layer_is_an_empty_file(make: Make) -> None:
    assert make(sample_layer(0, Compression.NONE)).lazy.size == 0


def test_readers_of_one_span_make_one_request(make: Make) -> None:
    bench = make()
    bench.source.gate.clear()
    futures = [bench.start(1000 + i, 500) for i in range(50)]
    bench.source.gate.set()
    for i, future in enumerate(futures):
        assert future.result(20) == bench.sample.data[1000 + i : 1500 + i]
    assert len(bench.source.requests) == 1
    bench.check(1000, 500)
    assert bench.lazy.stats().hits >= 1
    assert len(bench.source.requests) == 1


def test_a_read_over_many_spans_is_one_request_for_just_those_bytes(make: Make) -> None:
    bench = make()
    spans = bench.sample.spans
    first, last, stop = (runs(bench.sample)[i] for i in (10, 15, 16))
    bench.check(spans.ustart(first) + 5, spans.ustart(last) - spans.ustart(first))
    assert bench.source.requests == [(spans.cstart(first), spans.cstart(stop) + (spans.bit(stop) > 0))]
    assert bench.lazy.stats().fetched_bytes <= spans.cstart(stop) - spans.cstart(first) + 1


def test_waiters_are_answered_span_by_span(make: Make) -> None:
    bench = make()
    spans = bench.sample.spans
    stop = threading.Event()
    bench.source.chunk = 1 << 14
    whole = bench.start(0, spans.ustart(12))
    first = bench.start(10, 10)

    def change(chunk: bytes) -> bytes:
        if first.done():
            stop.wait(20)
        return chunk

    bench.source.change = change
    assert first.result(20) == bench.sample.data[10:20]
    stop.set()
    assert whole.result(20) == bench.sample.data[: spans.ustart(12)]


def test_a_layer_without_restart_points_is_streamed_once(make: Make) -> None:
    bench = make(sample_layer(SIZE, Compression.ZSTD, points=False))
    bench.source.gate.clear()
    futures = [(offset, bench.start(offset, 100)) for offset in (SIZE - 100, 0, SIZE // 2)]
    bench.source.gate.set()
    for offset, future in futures:
        assert future.result(20) == bench.sample.data[offset : offset + 100]
    assert bench.source.requests == [(0, len(bench.sample.blob))]


def test_a_queued_job_grows_instead_of_a_second_request(make: Make) -> None:
    bench = make(threads=1)
    spans = bench.sample.spans
    bench.source.gate.clear()
    first = runs(bench.sample)
    busy = bench.start(spans.ustart(first[40]), 10)
    while len(bench.source.requests) < 1:
        pass
    waiting = [bench.start(spans.ustart(first[i]), 10) for i in (3, 4, 5)]
    bench.source.gate.set()
    assert busy.result(20)
    assert all(future.result(20) for future in waiting)
    assert len(bench.source.requests) == 2


def test_a_retryable_error_is_retried_with_growing_pauses(make: Make) -> None:
    bench = make()

    def before(number: int, _start: int, _end: int) -> None:
        if number < 4:
            raise RegistryError("connection refused", retryable=True)

    bench.source.before = before
    bench.check(0, 100)
    assert bench.clock.pauses == [0.1, 0.2, 0.4, 0.8]
    assert bench.lazy.trouble() == ""


def test_a_broken_stream_goes_on_where_it_broke(make: Make) -> None:
    bench = make()
    spans = bench.sample.spans

    def change(chunk: bytes) -> bytes:
        if len(bench.source.requests) == 1 and bench.lazy.stats().demand >= 3:
            raise RegistryError("connection reset", retryable=True)
        return chunk

    bench.source.change = change
    bench.source.chunk = 1 << 14
    bench.check(0, spans.ustart(10))
    assert len(bench.source.requests) == 2
    assert bench.source.requests[1][0] >= spans.cstart(3)


def test_after_the_deadline_all_waiters_get_the_error_and_the_next_read_tries_again(make: Make) -> None:
    bench = make()
    down = True

    def before(_number: int, _start: int, _end: int) -> None:
        if down:
            raise RegistryError("no route to host", retryable=True)

    bench.source.gate.clear()
    hold = threading.Event()
    faultpoint.hook = lambda name: hold.wait(20) and None if name == "fetch.open" else None
    bench.source.before = before
    futures = [bench.start(offset, 10) for offset in (0, 5, 10)]
    hold.set()
    for future in futures:
        with pytest.raises(RegistryError, match="no route"):
            future.result(20)
    assert 50 < sum(bench.clock.pauses) <= 60
    assert max(bench.clock.pauses) == 5.0
    down = False
    bench.source.gate.set()
    bench.check(0, 100)


def test_a_refusal_is_not_retried(make: Make) -> None:
    bench = make()

    def before(number: int, _start: int, _end: int) -> None:
        if number == 0:
            raise NotFoundError("no such blob")

    bench.source.before = before
    with pytest.raises(NotFoundError):
        bench.read(0, 10)
    assert bench.clock.pauses == []
    bench.check(0, 10)


def test_wrong_bytes_are_fetched_once_more(make: Make) -> None:
    bench = make()
    bench.source.change = lambda chunk: chunk if len(bench.source.requests) > 1 else b"\xff" * len(chunk)
    bench.check(0, 100_000)
    assert len(bench.source.requests) == 2


def test_wrong_bytes_twice_fail_their_run_only(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(log, "error", lambda event, **_: lines.append(event))
    bench = make(sample_layer(SIZE, Compression.NONE))
    spans = bench.sample.spans
    run = runs(bench.sample)
    bad = spans.ustart(run[5])
    bench.source.change = lambda chunk: chunk.replace(bench.sample.data[bad : bad + 100], bytes(100))
    bench.source.gate.clear()
    whole = bench.start(spans.ustart(run[4]), spans.ustart(run[8]) - spans.ustart(run[4]))
    parts = {i: bench.start(spans.ustart(run[i]), 100) for i in (4, 5, 6, 7)}
    bench.source.gate.set()
    with pytest.raises(IntegrityError):
        whole.result(20)
    with pytest.raises(IntegrityError):
        parts[5].result(20)
    for i in (4, 6, 7):
        assert parts[i].result(20) == bench.sample.data[spans.ustart(run[i]) : spans.ustart(run[i]) + 100]
    assert lines == ["a layer's bytes are wrong"]
    assert bench.lazy.cached.states[run[5]] == ABSENT


def test_a_defect_in_the_source_is_an_error_not_a_hang(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "exception", lambda *_, **__: None)
    bench = make()

    def before(_number: int, _start: int, _end: int) -> None:
        raise ZeroDivisionError

    bench.source.before = before
    with pytest.raises(ShimError, match="fetching failed"):
        bench.read(0, 10)


def test_sequential_reads_are_fetched_ahead_and_scattered_ones_are_not(make: Make) -> None:
    bench = make(readahead=1 << 20)
    spans = bench.sample.spans
    for run in (30, 3, 12, 24, 9):
        bench.check(spans.ustart(runs(bench.sample)[run]), 100)
    assert len(bench.source.requests) <= 5 + 2  # a quarter of five runs, and one, may be guessed
    bench = make(readahead=1 << 20)
    for offset in range(0, SIZE, 65536):
        bench.check(offset, 65536)
    stats = bench.lazy.stats()
    assert stats.readahead > 0
    assert stats.requests < len(runs(bench.sample)) // 3
    assert stats.demand + stats.readahead == spans.count


def test_readahead_windows_double_up_to_the_limit() -> None:
    ahead = Readahead(1000, 8)
    assert list(ahead.seen(4, 4)) == []
    assert list(ahead.seen(4, 4)) == []
    assert list(ahead.seen(5, 5)) == []
    assert list(ahead.seen(6, 6)) == [7]
    assert list(ahead.seen(7, 7)) == [8, 9]
    assert list(ahead.seen(8, 8)) == [10, 11, 12, 13]
    assert list(ahead.seen(10, 10)) == [14, 15, 16, 17]
    assert list(ahead.seen(14, 15)) == [18, 19, 20, 21]
    assert list(ahead.seen(500, 500)) == []
    assert list(ahead.seen(998, 999)) == []
    assert list(ahead.seen(18, 18)) == [22, 23, 24, 25]  # other readers in between do no harm
    assert list(Readahead(10, 0).seen(1, 2)) == []
    off = Readahead(10, 0)
    assert [list(off.seen(run, run)) for run in range(4)] == [[]] * 4


def test_a_reader_of_another_layer_is_never_kept_waiting_by_a_stalled_one() -> None:
    pool = Workers(2, extra=4)
    gate, ran = threading.Event(), threading.Event()
    for _ in range(10):
        pool.submit("stalled", lambda: gate.wait(20) and None)
    pool.submit("other", ran.set)
    assert ran.wait(5)
    gate.set()
    pool.close()


def test_jobs_that_come_together_all_get_threads() -> None:
    """Also when there is an idle thread that each of them might count on."""
    for _ in range(50):
        pool = Workers(4, extra=0)
        warm = threading.Event()
        pool.submit("layer", warm.set)
        assert warm.wait(5)
        together = threading.Barrier(4)
        passed = threading.Semaphore(0)
        for _ in range(4):
            pool.submit("layer", lambda b=together, p=passed: b.wait(5) >= 0 and p.release())  # type: ignore[misc]
        for _ in range(4):
            assert passed.acquire(timeout=5)
        pool.close()


def test_the_pool_keeps_its_number_and_puts_waiting_readers_first() -> None:
    pool = Workers(2, extra=0)
    gate, order, running, most = threading.Event(), [], [0], [0]
    lock, done = threading.Lock(), threading.Semaphore(0)

    def job(name: str) -> Callable[[], None]:
        def run() -> None:
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
                order.append(name)
            gate.wait(20)
            with lock:
                running[0] -= 1
            done.release()

        return run

    names = ["first", "second", "ahead", "urgent"]
    for name in names:
        pool.submit("layer", job(name), urgent=name != "ahead")
    gate.set()
    for _ in names:
        assert done.acquire(timeout=10)
    assert most[0] <= 2
    assert order.index("urgent") < order.index("ahead")
    pool.close()
    assert not pool.submit("layer", gate.set)


def test_spans_left_on_disk_are_hashed_and_a_wrong_one_is_fetched_again(tmp_path: Path, make: Make) -> None:
    bench = make()
    spans = bench.sample.spans
    bench.check(0, spans.ustart(8))
    path = bench.lazy.cached.path
    bench.lazy.close()
    bench.cache.close_layer(bench.lazy.cached)
    with open(path / "data", "r+b") as file:
        file.seek(spans.ustart(2) + 9)
        file.write(b"!")
    cached = bench.cache.layer(bench.sample.diff_id, spans)
    assert cached.states[2] == ON_DISK
    bench.source.requests.clear()
    bench.lazy = LazyLayer(
        node_id=20,
        name=b"x",
        compression=bench.sample.compression,
        cached=cached,
        open_range=bench.source.open_range,
        pool=bench.pool,
        readahead=0,
    )
    bench.check(0, spans.ustart(8))
    assert bench.source.requests == [compressed_range(spans, spans.restart(2), spans.run_end(2))]
    assert bench.lazy.stats().demand == 1


def test_hashing_what_is_on_disk_does_not_wait_for_a_stalled_registry(make: Make) -> None:
    bench = make(threads=1)
    spans = bench.sample.spans
    bench.check(0, 100)
    bench.lazy.cached.states[0] = ON_DISK
    bench.source.gate.clear()
    stalled = [bench.start(spans.ustart(runs(bench.sample)[i]), 10) for i in (10, 20, 30)]
    assert bench.start(0, 100).result(5) == bench.sample.data[:100]
    assert not any(future.done() for future in stalled)
    assert "registry.test" in bench.lazy.trouble()


@pytest.mark.parametrize("memory", [64 << 20, 100_000, 10])
def test_a_disk_that_fills_up_in_the_middle_is_not_noticed_by_readers(
    make: Make, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    """Also when memory holds one span, or none: those who wait get the bytes all the same."""
    monkeypatch.setattr(log, "error", lambda *_, **__: None)
    bench = make(memory=memory)
    written = [0]

    def hook(name: str) -> None:
        if name == "publish.write":
            written[0] += 1
            if written[0] > 3:
                raise OSError(errno.ENOSPC, "full")

    faultpoint.hook = hook
    futures = [(offset, bench.start(offset, 500_000)) for offset in range(0, 3_000_000, 250_000)]
    for offset, future in futures:
        assert future.result(20) == bench.sample.data[offset : offset + 500_000]
    bench.check(100, 500_000)
    bench.check(bench.lazy.size - 600, 600)


def test_a_reader_that_comes_while_a_span_is_published_is_answered(make: Make) -> None:
    bench = make()
    late: list[Future[bytes]] = []

    def hook(name: str) -> None:
        if name == "publish.set" and not late:  # written, not yet to be seen: it must join the flight
            late.append(bench.start(20, 30))

    faultpoint.hook = hook
    bench.check(0, 10)
    assert late[0].result(20) == bench.sample.data[20:50]
    assert len(bench.source.requests) == 1


def test_a_reader_that_comes_while_an_error_is_delivered_is_answered(make: Make) -> None:
    bench = make()
    late: list[Future[bytes]] = []
    bench.source.before = lambda number, _s, _e: (_ for _ in ()).throw(NotFoundError("gone")) if number == 0 else None

    def hook(name: str) -> None:
        if name == "fetch.failed" and not late:
            late.append(bench.start(20, 30))

    faultpoint.hook = hook
    with pytest.raises(NotFoundError):
        bench.read(0, 10)
    with pytest.raises(NotFoundError):
        late[0].result(20)
    bench.check(20, 30)


def test_spans_dropped_between_landing_and_answer_are_fetched_again(make: Make) -> None:
    bench = make()
    drops = [2]

    def hook(name: str) -> None:
        if name == "read.copied" and drops[0]:
            drops[0] -= 1
            bench.lazy.cached.drop([0])

    faultpoint.hook = hook
    bench.check(0, 10)
    assert len(bench.source.requests) == 3


def test_close_answers_everyone(make: Make) -> None:
    bench = make()
    bench.source.gate.clear()
    future = bench.start(0, 10)
    bench.lazy.close()
    with pytest.raises(ShimError, match="stopping"):
        future.result(5)
    with pytest.raises(ShimError, match="stopping"):
        bench.read(0, 10)
