"""A layer, its cache, a source that fails at will, a clock that stands still: what tests of fetching share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from shim.cache import faultpoint
from shim.cache.fetch import LazyLayer
from shim.cache.pool import FetchPool
from shim.cache.store import LayerCache
from shim.errors import ShimError
from shim.index.model import Restart
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
