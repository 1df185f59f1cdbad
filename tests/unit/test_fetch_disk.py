"""Spans left on disk, a full disk, and readers that come at the worst moment."""

from __future__ import annotations

import errno
from concurrent.futures import Future
from pathlib import Path

import pytest

from shim import log
from shim.cache import faultpoint
from shim.cache.fetch import LazyLayer
from shim.cache.layer import ON_DISK
from shim.errors import NotFoundError, ShimError
from shim.layers.inflate import compressed_range
from tests.support.fetchbench import Make, make, runs

__all__ = ["make"]


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
    bench.source.before = lambda *_: (_ for _ in ()).throw(NotFoundError("gone")) if not late else None

    def hook(name: str) -> None:
        if name == "fetch.failed" and not late:
            late.append(bench.start(20, 30))

    faultpoint.hook = hook
    with pytest.raises(NotFoundError):
        bench.read(0, 10)
    with pytest.raises(NotFoundError):
        late[0].result(20)
    bench.check(20, 30)


def test_spans_dropped_between_landing_and_answer_are_fetched_again_once(make: Make) -> None:
    bench = make()
    drops = [9]  # as often as somebody looks

    def hook(name: str) -> None:
        if name == "read.copied" and drops[0]:
            drops[0] -= 1
            bench.lazy.cached.drop([0])

    faultpoint.hook = hook
    bench.check(0, 10)
    assert len(bench.source.requests) == 2


def test_close_answers_everyone(make: Make) -> None:
    bench = make()
    bench.source.gate.clear()
    future = bench.start(0, 10)
    bench.lazy.close()
    with pytest.raises(ShimError, match="stopping"):
        future.result(5)
    with pytest.raises(ShimError, match="stopping"):
        bench.read(0, 10)
