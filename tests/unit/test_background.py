"""Completing layers in the background: when, how fast, for whom not. The clock is the test's."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shim import settings
from shim.cache import faultpoint
from shim.cache.fetch import LazyLayer
from shim.cache.layer import ON_DISK
from shim.cache.pool import FetchPool
from shim.cache.store import LayerCache
from shim.daemon.background import Background, missing_bytes
from shim.errors import RegistryError
from tests.support.fetchbench import SIZE, Bench, Make, make
from tests.support.lazylayers import sample_layer

__all__ = ["make"]


@dataclass
class Rig:
    """One layer in use by one image, and what the parts around it say."""

    bench: Bench
    image_size: int = 1 << 20
    room: int = 1 << 40
    reads: list[SimpleNamespace] = field(default_factory=list)
    in_use: bool = True

    def background(self, **values: Any) -> Background:
        loaded = settings.load(
            env={"CLIP_SHIM_CONFIG": "/dev/null"}, flags={f"background.{k}": v for k, v in values.items()}
        )
        meta = {"image": "registry.test/image", "layers": [{"blob": "x", "size": self.image_size}]}
        layers = SimpleNamespace(held=self._held, waiting=lambda: self.reads)
        trees = SimpleNamespace(in_use=lambda: {"ab": meta} if self.in_use else {})
        cleaner = SimpleNamespace(room=lambda: self.room)
        clock = self.bench.clock
        return Background(loaded, layers, trees, cleaner, clock=clock, pause=clock.pause)  # type: ignore[arg-type]

    @contextmanager
    def _held(self, name: str) -> Iterator[SimpleNamespace | None]:
        yield SimpleNamespace(lazy=self.bench.lazy) if name == "x" else None

    @property
    def missing(self) -> int:
        return missing_bytes(self.bench.lazy.cached)

    def run(self, background: Background, rounds: int = 40) -> None:
        """Rounds of its thread, each a second later."""
        for _ in range(rounds):
            while background.step() == 0:
                pass
            self.bench.clock.now += 1


def test_after_a_quiet_time_the_rest_is_fetched(make: Make) -> None:
    rig = Rig(make())
    background = rig.background(rate="0")
    rig.run(background, 30)
    rig.bench.check(0, 1000)  # somebody waited for the registry
    rig.run(background, 58)
    assert rig.missing > 3 << 20
    rig.run(background, 10)
    assert rig.missing == 0
    requests = len(rig.bench.source.requests)
    assert requests <= 3
    rig.run(background, 100)
    assert len(rig.bench.source.requests) == requests
    rig.bench.check(0, SIZE)


@pytest.mark.parametrize("why", ["off", "large", "no room", "not in use"])
def test_when_it_does_not(make: Make, why: str) -> None:
    rig = Rig(make(), room=SIZE // 2 if why == "no room" else 1 << 40, in_use=why != "not in use")
    limit = rig.image_size - (why == "large")
    rig.run(rig.background(enabled=why != "off", max_image=str(limit)), 200)
    assert rig.bench.source.requests == []
    assert rig.missing == SIZE


def test_it_keeps_to_its_rate(make: Make) -> None:
    """By the bytes that come from the registry."""
    rig = Rig(make(sample_layer(8 << 20)))
    background = rig.background(rate="1M", after="1s")
    rig.run(background, 30)
    assert rig.missing == 0
    assert sum(rig.bench.clock.pauses) == pytest.approx(len(rig.bench.sample.blob) / (1 << 20), rel=0.1)


def test_it_yields_to_readers(make: Make) -> None:
    rig = Rig(make())
    background = rig.background(after="1s", rate="0")
    read = SimpleNamespace(age=0.1)
    rig.reads = [read]
    rig.run(background, 20)
    assert rig.bench.source.requests == []  # nothing is begun
    read.age = 30.0  # that one waits for its registry, not for us
    paused: list[float] = []

    def pause(seconds: float) -> None:
        paused.append(seconds)
        if len(paused) == 50:
            rig.reads = []

    background._pause = pause

    def somebody_reads(_number: int, _start: int, _end: int) -> None:
        rig.reads = [SimpleNamespace(age=0.0)]

    rig.bench.source.before = somebody_reads
    rig.run(background, 5)
    assert len(paused) >= 50  # it stood still in the middle of its transfer until they had their bytes
    assert rig.missing == 0


def test_a_reader_who_waits_for_these_bytes_is_not_held_up(make: Make) -> None:
    """One stream without restart points, slow: whoever reads in it gets it at full speed."""
    rig = Rig(make())
    background = rig.background(after="1s", rate="1K")
    clock = rig.bench.clock
    reads: list[Future[bytes]] = []
    answered: list[float] = []

    def pause(seconds: float) -> None:
        if not reads:
            reads.append(rig.bench.start(SIZE - 1000, 1000))
            reads[0].add_done_callback(lambda _: answered.append(clock.now))
            rig.reads = [SimpleNamespace(age=0.0)]
        elif answered:
            rig.reads = []
        clock.pause(seconds)

    background._pause = pause
    begin = clock.now
    rig.run(background, 4)
    assert reads[0].result(20) == rig.bench.sample.data[-1000:]
    assert answered[0] - begin < 10
    assert clock.now - begin > 10


def test_failures_are_tried_again_later_and_later(make: Make) -> None:
    rig = Rig(make())
    times: list[float] = []

    def away(_number: int, _start: int, _end: int) -> None:
        times.append(rig.bench.clock.now)
        raise RegistryError("away", retryable=True)

    rig.bench.source.before = away
    background = rig.background(after="1s")
    rig.run(background, 500)
    gaps = [round(b - a) for a, b in itertools.pairwise(times)]
    assert 2 <= len(gaps) <= 5
    assert gaps[0] >= 60
    assert gaps == sorted(gaps)
    rig.bench.source.before = lambda *_: None
    rig.run(background, 1800)
    assert rig.missing == 0


def test_a_drain_waits_for_nothing_and_says_what_is_left(make: Make) -> None:
    rig = Rig(make(), image_size=1 << 50, room=0)
    background = rig.background(enabled=False)
    background.step()
    background.begin_drain()
    (row,) = background.progress()
    assert (row["missing_bytes"], row["pending"]) == (SIZE, True)
    rig.bench.source.before = lambda *_: (_ for _ in ()).throw(RegistryError("away", retryable=True))
    rig.run(background, 40)
    (row,) = background.progress()
    assert row == {
        "index": "sha256:ab",
        "image": "registry.test/image",
        "size": SIZE,
        "missing_bytes": SIZE,
        "pending": False,
        "errors": ["away"],
    }
    background.end_drain()
    rig.bench.source.before = lambda *_: None
    background.begin_drain()
    rig.run(background, 20)
    (row,) = background.progress()
    assert (row["missing_bytes"], row["pending"], row["errors"]) == (0, False, [])


def test_a_drain_hashes_what_is_on_disk(make: Make, tmp_path: Path) -> None:
    first = make()
    first.check(0, SIZE)
    first.cache.flush()
    shutil.copytree(first.cache.root, tmp_path / "copy")
    with open(tmp_path / "copy" / first.lazy.cached.path.name / "data", "r+b") as file:
        file.seek(1_500_000)
        file.write(b"changed")
    cache, pool = LayerCache(tmp_path / "copy"), FetchPool(2)
    lazy = LazyLayer(
        node_id=1,
        name=b"x",
        compression=first.sample.compression,
        cached=cache.layer(first.sample.diff_id, first.sample.spans),
        open_range=first.source.open_range,
        pool=pool,
    )
    first.source.requests.clear()
    again = Bench(lazy, first.source, first.clock, cache, pool)
    rig = Rig(again)
    background = rig.background()
    background.begin_drain()
    rig.run(background, 20)
    assert rig.missing == 0
    assert len(again.source.requests) == 1
    assert ON_DISK not in lazy.cached.states
    again.check(1_400_000, 200_000)
    again.close()


def test_a_cache_that_cannot_be_written_is_no_endless_loop(make: Make) -> None:
    rig = Rig(make(memory=0))

    def full(name: str) -> None:
        if name == "publish.write":
            raise OSError(28, "No space left on device")

    faultpoint.hook = full
    background = rig.background(after="1s")
    rig.run(background, 300)
    assert 1 <= len(rig.bench.source.requests) <= 5
    background.begin_drain()
    rig.run(background, 30)
    (row,) = background.progress()
    assert row["errors"] == ["the cache cannot be written"]
    assert not row["pending"]
