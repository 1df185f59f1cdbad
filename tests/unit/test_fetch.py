"""The span fetcher: one fetch for many readers, retries, wrong bytes, read-ahead."""

from __future__ import annotations

import random
import threading

import pytest

from shim import log
from shim.cache import faultpoint
from shim.cache.layer import ABSENT
from shim.errors import IntegrityError, NotFoundError, RegistryError, ShimError
from shim.index.model import Compression
from tests.support.fetchbench import SIZE, Make, make, runs
from tests.support.lazylayers import sample_layer

__all__ = ["make"]

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


def test_a_refusal_is_waited_for_too_with_longer_pauses(make: Make) -> None:
    bench = make()

    def before(number: int, _start: int, _end: int) -> None:
        if number < 3:
            raise NotFoundError("no such blob")

    bench.source.before = before
    bench.check(0, 10)
    assert bench.clock.pauses == [1, 2, 4]


def test_a_refusal_that_stays_is_the_readers_error(make: Make) -> None:
    bench = make()

    def before(_number: int, _start: int, _end: int) -> None:
        raise NotFoundError("no such blob")

    bench.source.before = before
    with pytest.raises(NotFoundError):
        bench.read(0, 10)
    assert 45 <= sum(bench.clock.pauses) < 60
    assert len(bench.source.requests) < 10


def test_wrong_bytes_that_pass_are_waited_for(make: Make) -> None:
    bench = make()
    bench.source.change = lambda chunk: chunk if len(bench.source.requests) > 5 else b"\xff" * len(chunk)
    bench.check(0, 1000)
    assert len(bench.source.requests) == 6
    assert bench.clock.pauses == [2, 4, 8, 15]


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
