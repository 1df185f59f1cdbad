"""What to take out of the cache: a plan made of facts (sizes, last use, who uses what), without touching anything.

Three reasons, in this order:
    age     nobody has used it for `max_age`, as far as the clock can be believed (clock.py); only what nobody uses now
    size    everything together takes more than `max_bytes`
    space   the disk has less than `free_low` free (or refused a write): until `free_high` is free

Least recently used first; what is pinned, never. What is in use is never removed. As the last resort the *spans* of a
layer in use are dropped, which its containers fetch again when they read them: for `size`, and for `space` only as far
as `free_low`; and only where a registry answered lately (`can_refetch`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from shim import log
from shim.errors import ShimError

FULL_BYTES = 256 << 20  # what is freed at least when the disk refused a write


@dataclass(frozen=True, slots=True)
class Limits:
    """0 stands for no limit. Bytes, seconds, and shares (0 … 1) of the file system that should be free."""

    max_bytes: int = 0
    max_age: float = 0.0
    free_low: float = 0.0
    free_high: float = 0.0
    age_from: float = 0.0  # what was used before this time counts as used then, for max_age
    asked: bool = False  # a person gave max_age, and means it by the clock as it is
    full: bool = False  # the disk refused a write: FULL_BYTES are freed whatever statvfs says


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system that the cache is on, in bytes: `free` for unprivileged users, as df shows it."""

    size: int
    free: int


@dataclass(frozen=True, slots=True)
class Item:
    """Something that is kept. kind: "layer", "tree", "index" or "tag". `size`: bytes it takes on disk; `last_used`:
    seconds since the epoch; `what`: for people."""

    kind: str
    name: str
    size: int
    last_used: float
    in_use: bool = False
    pinned: bool = False
    can_refetch: bool = False
    what: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One removal. `size`: bytes it frees, about. whole: the item; otherwise that much of a layer in use."""

    item: Item
    size: int
    reason: str
    whole: bool


def disk_of(path: Path) -> Disk:
    """Raises OSError."""
    info = os.statvfs(path)
    return Disk(info.f_blocks * info.f_frsize, info.f_bavail * info.f_frsize)


def plan(items: Sequence[Item], limits: Limits, now: float, disk: Disk) -> list[Step]:
    """The steps, in the order in which they are to be taken."""
    return _Planner(items, limits, now, disk).steps


class _Planner:
    def __init__(self, items: Sequence[Item], limits: Limits, now: float, disk: Disk) -> None:
        self.steps: list[Step] = []
        self._used = sum(item.size for item in items)
        self._free = disk.free
        oldest_first = sorted((item for item in items if not item.pinned), key=lambda item: item.last_used)
        idle = [item for item in oldest_first if not item.in_use]
        busy = [item for item in oldest_first if item.in_use and item.kind == "layer" and item.can_refetch]
        low, high = self._watermarks(limits, disk)
        for item in list(idle):
            if limits.max_age and now - max(item.last_used, limits.age_from) > limits.max_age:
                self._take(item, item.size, "age")
                idle.remove(item)
        for item in idle:
            if item.kind == "tag":
                continue  # it takes no space
            if limits.max_bytes and self._used > limits.max_bytes:
                self._take(item, item.size, "size")
            elif self._free < high:
                self._take(item, item.size, "space")
        for item in busy:
            over = self._used - limits.max_bytes if limits.max_bytes else 0
            reason = "size" if over >= low - self._free else "space"
            need = min(item.size, max(over, low - self._free))
            if need > 0:
                self._take(item, need, reason, whole=False)

    def _watermarks(self, limits: Limits, disk: Disk) -> tuple[int, int]:
        """(free bytes below which spans in use go, free bytes that idle things go for)."""
        low = int(limits.free_low * disk.size)
        high = max(low, int(limits.free_high * disk.size)) if disk.free < low else 0
        if limits.full:
            low = max(low, disk.free + FULL_BYTES)
            high = max(high, low)
        return low, high

    def _take(self, item: Item, size: int, reason: str, *, whole: bool = True) -> None:
        self.steps.append(Step(item, size, reason, whole))
        self._used -= size
        self._free += size


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did (or, dry, would do): `done` with the bytes that each step freed. Bytes of the cache and of the
    disk's free space as they are afterwards."""

    done: tuple[Step, ...]
    skipped: tuple[Step, ...]  # taken into use meanwhile, or the disk refused
    cache_bytes: int
    free_bytes: int
    dry_run: bool

    @property
    def freed(self) -> int:
        return sum(step.size for step in self.done)


class Shelf(Protocol):
    """Where things are kept, as the cleaner sees it. One for the daemon, one for when none runs."""

    def items(self) -> list[Item]:
        """Everything that is kept."""

    def remove(self, item: Item) -> bool:
        """Delete an item that nobody uses; False, and nothing done, if somebody does by now."""

    def shrink(self, item: Item, size: int) -> int:
        """Drop about `size` bytes of spans of a layer in use; returns the bytes freed."""


def clean(shelf: Shelf, limits: Limits, now: float, root: Path, *, dry_run: bool) -> Report:
    """Make a plan and carry it out; what cannot be removed is skipped. `root`: a directory on the disk that is to have
    space. Raises OSError: that cannot be looked at."""
    items = shelf.items()
    steps = plan(items, limits, now, disk_of(root))
    done: list[Step] = []
    skipped: list[Step] = []
    for step in steps:
        freed = step.size if dry_run else _carry_out(shelf, step)
        (skipped if freed is None else done).append(replace(step, size=freed or 0))
    freed = sum(step.size for step in done)
    free = disk_of(root).free + (freed if dry_run else 0)
    return Report(tuple(done), tuple(skipped), sum(item.size for item in items) - freed, free, dry_run)


def _carry_out(shelf: Shelf, step: Step) -> int | None:
    """Bytes that became free; None: nothing was done."""
    try:
        if not step.whole:
            return shelf.shrink(step.item, step.size) or None
        return step.size if shelf.remove(step.item) else None
    except (OSError, ShimError) as error:
        log.warning("not cleaned", item=step.item.kind, name=step.item.name, error=str(error))
        return None
