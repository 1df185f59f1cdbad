"""What the cleaner plans, what it leaves when it is killed, and the pins."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from shim.cache import discard, faultpoint
from shim.cache.clean import FULL_BYTES, Disk, Item, Limits, Step, clean, plan
from shim.cache.layer import ABSENT
from shim.cache.pins import Pins
from shim.cache.store import LayerCache, cleaners_turn, take_lock
from shim.daemon.cleaner import drop_spans
from shim.errors import CacheError
from tests.support.lazylayers import sample_layer

GIB = 1 << 30
NOW = 1_000_000.0
PLENTY = Disk(1000 * GIB, 900 * GIB)


def layer(name: str, size: int, age: float, **more: bool) -> Item:
    return Item("layer", name, size, NOW - age, **more)


def names(steps: list[Step]) -> list[str]:
    return [step.item.name for step in steps]


def test_by_age() -> None:
    items = [layer("new", GIB, 10), layer("old", GIB, 100), layer("used", GIB, 200, in_use=True, can_refetch=True)]
    items.append(layer("pinned", GIB, 300, pinned=True))
    steps = plan(items, Limits(max_age=50), NOW, PLENTY)
    assert names(steps) == ["old"]
    assert steps[0].reason == "age"
    assert plan(items, Limits(), NOW, PLENTY) == []


def test_by_size_the_least_recently_used_go_first() -> None:
    items = [
        layer("a", 3 * GIB, 10),
        layer("b", 2 * GIB, 30),
        layer("c", GIB, 20),
        layer("pinned", GIB, 99, pinned=True),
    ]
    assert plan(items, Limits(max_bytes=7 * GIB), NOW, PLENTY) == []
    assert names(plan(items, Limits(max_bytes=6 * GIB), NOW, PLENTY)) == ["b"]
    assert names(plan(items, Limits(max_bytes=4 * GIB + 1), NOW, PLENTY)) == ["b", "c"]
    assert names(plan(items, Limits(max_bytes=1), NOW, PLENTY)) == ["b", "c", "a"]  # and never what is pinned


def test_what_a_tag_meant_is_not_forgotten_for_space() -> None:
    """It takes none, and without it an image does not start while its registry is away."""
    items = [Item("tag", "tag", 0, NOW - 100), Item("index", "index", GIB, NOW - 20), layer("layer", GIB, 10)]
    assert names(plan(items, Limits(max_bytes=1), NOW, PLENTY)) == ["index", "layer"]
    assert names(plan(items, Limits(free_low=0.2), NOW, Disk(100 * GIB, 0))) == ["index", "layer"]
    assert names(plan(items, Limits(max_age=50), NOW, PLENTY)) == ["tag"]


def test_between_the_watermarks() -> None:
    items = [layer(str(age), 10 * GIB, age) for age in range(5)]
    limits = Limits(free_low=0.2, free_high=0.25)
    assert plan(items, limits, NOW, Disk(100 * GIB, 20 * GIB)) == []
    assert names(plan(items, limits, NOW, Disk(100 * GIB, 19 * GIB))) == ["4"]
    assert names(plan(items, limits, NOW, Disk(100 * GIB, 1 * GIB))) == ["4", "3", "2"]


def test_spans_in_use_are_the_last_resort() -> None:
    used = layer("used", 10 * GIB, 50, in_use=True, can_refetch=True)
    items = [used, layer("idle", 2 * GIB, 1), Item("tree", "t", GIB, NOW - 60, in_use=True)]
    steps = plan(items, Limits(max_bytes=8 * GIB), NOW, PLENTY)
    assert steps == [Step(items[1], 2 * GIB, "size", True), Step(used, 3 * GIB, "size", False)]
    limits = Limits(free_low=0.2, free_high=0.5)
    steps = plan(items, limits, NOW, Disk(100 * GIB, 15 * GIB))
    assert steps[1:] == [Step(used, 3 * GIB, "space", False)]  # only as far as the lower mark
    lost = replace(used, can_refetch=False)
    assert plan([lost], Limits(max_bytes=1), NOW, PLENTY) == []


def test_a_full_disk_whatever_it_says_itself() -> None:
    items = [layer("a", FULL_BYTES // 2, 3), layer("b", FULL_BYTES, 2), layer("c", GIB, 1)]
    assert names(plan(items, Limits(full=True), NOW, PLENTY)) == ["a", "b"]


def test_what_cannot_be_removed_is_skipped(tmp_path: Path) -> None:
    class Stubborn:
        def items(self) -> list[Item]:
            return [layer("stuck", GIB, 30), layer("used", GIB, 20), layer("gone", GIB, 10)]

        def remove(self, item: Item) -> bool:
            if item.name == "stuck":
                raise PermissionError(1, "Operation not permitted")
            return item.name == "gone"

        def shrink(self, _item: Item, _size: int) -> int:
            raise AssertionError("nothing is in use")

    report = clean(Stubborn(), Limits(max_age=1), NOW, tmp_path, dry_run=False)
    assert (names(list(report.done)), names(list(report.skipped))) == (["gone"], ["stuck", "used"])
    assert (report.freed, report.cache_bytes) == (GIB, 2 * GIB)


def _killed_at(point: str, work: str, directory: str) -> None:
    def hook(name: str) -> None:
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)

    faultpoint.hook = hook
    if work == "remove":
        LayerCache(Path(directory)).remove(f"{1:064x}-{1:016x}")
    else:
        sample = sample_layer(3_000_001)
        cached = LayerCache(Path(directory)).layer(sample.diff_id, sample.spans)
        for span in range(cached.count):
            start, end = sample.spans.ustart(span), sample.spans.ustart(span + 1)
            cached.publish(span, sample.data[start:end])
        cached.flush()
        drop_spans(cached, 1 << 20)


@pytest.mark.parametrize("point", ["discard.begin", "discard.renamed", "discard.deleted"])
def test_killed_while_a_layer_is_removed(tmp_path: Path, point: str) -> None:
    """It is there or gone, and what is left the next run deletes."""
    victim = tmp_path / f"{1:064x}-{1:016x}"
    victim.mkdir()
    (victim / "data").write_bytes(bytes(100_000))
    (victim / "meta.json").write_text("{}")
    _in_a_child(point, "remove", tmp_path)
    cache = LayerCache(tmp_path)  # the lock went with it
    there = [entry.name for entry in cache.entries()]
    assert there == ([victim.name] if point == "discard.begin" else [])
    assert len(list(victim.iterdir())) == 2 if there else not victim.exists()
    discard.sweep(tmp_path)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    cache.close()


def test_killed_while_spans_are_dropped(tmp_path: Path) -> None:
    """The bitmap says less than the file holds; the next drop gives that space back too."""
    _in_a_child("drop.cleared", "drop", tmp_path)
    sample = sample_layer(3_000_001)
    cache = LayerCache(tmp_path)
    cached = cache.layer(sample.diff_id, sample.spans)
    absent = [span for span in range(cached.count) if cached.states[span] == ABSENT]
    assert absent
    assert discard.allocated(cached.path) > 2_900_000
    assert all(cached.verify(span) for span in range(cached.count) if span not in absent)
    lost = sum(cached.span_length(span) for span in absent)
    one = cached.span_length(next(span for span in range(cached.count) if span not in absent))
    assert drop_spans(cached, 1) >= lost + one - 8192
    cache.close()


def _in_a_child(point: str, work: str, directory: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_killed_at, args=(point, work, str(directory)))
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL


def test_a_daemon_waits_for_a_cleaner_and_for_nobody_else(tmp_path: Path) -> None:
    import threading

    opened: list[LayerCache] = []
    with cleaners_turn(tmp_path):
        lock = take_lock(tmp_path)
        opener = threading.Thread(target=lambda: opened.append(LayerCache(tmp_path)))
        opener.start()
        opener.join(0.2)
        assert opener.is_alive()
        os.close(lock)
    opener.join(10)
    assert len(opened) == 1
    with pytest.raises(CacheError, match="another daemon uses the cache"):
        LayerCache(tmp_path)
    opened[0].close()


def test_pins(tmp_path: Path) -> None:
    pins = Pins(tmp_path / "state")
    assert pins.read() == {}
    digest = "sha256:" + "ab" * 32
    assert pins.add(digest, "an image\nof two lines")
    assert not pins.add(digest, "other name")
    assert pins.add("sha256:" + "cd" * 32, "")
    assert Pins(tmp_path / "state").read() == {digest: "other name", "sha256:" + "cd" * 32: ""}
    assert pins.remove(digest)
    assert not pins.remove(digest)
    (tmp_path / "state" / "pins").write_text("# comment\n\nnonsense\n")
    with pytest.raises(CacheError, match="line 3"):
        pins.read()
