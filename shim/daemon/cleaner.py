"""The cleaner: carries out plans of shim/cache/clean.py, in the daemon or, when none runs, without one."""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from shim import log
from shim.cache import clock, discard
from shim.cache import layer as states
from shim.cache.clean import Item, Limits, Report, clean, disk_of
from shim.cache.layer import CachedLayer
from shim.cache.pins import Pins
from shim.cache.store import cleaners_turn, entries, take_lock
from shim.daemon.control import Answer, Session
from shim.daemon.indexfile import touch
from shim.daemon.keptindexes import KeptIndexes
from shim.daemon.layers import Layers
from shim.daemon.overlays import is_used, overlays
from shim.daemon.prepare import read_meta
from shim.daemon.served import ServedLayer
from shim.daemon.trees import Trees
from shim.errors import DaemonError, ShimError
from shim.mount import mountinfo
from shim.settings import Settings

_ASKED_SECONDS = 1800.0  # how long whoever asked waits
PERIOD = 300.0  # seconds between looks at the limits
_LEAST = 1e-3
_TREE = re.compile(r"[0-9a-f]{64}")
_STAMP_SECONDS = 3600.0  # what is in use gets a new time of last use this often
_TRUST_SECONDS = 60.0  # after a registry failed, spans that would have to come from it stay
_PIECE = 64 << 20  # dropped at once: readers are told, and writers wait, once for each


def limits(settings: Settings, given: Mapping[str, float], *, full: bool = False) -> Limits:
    """What the settings say. given: `max_bytes`, `max_age` of a person, who means nothing at all by 0, not no limit."""
    asked = {key: max(value, _LEAST) for key, value in given.items()}
    return Limits(
        max_bytes=math.ceil(asked.get("max_bytes", settings["cache.max_bytes"])),
        max_age=asked.get("max_age", settings["cache.max_age"]),
        free_low=settings["cache.free_low"],
        free_high=settings["cache.free_high"],
        asked="max_age" in given,
        full=full,
    )


def _by_the_clock(settings: Settings, wanted: Limits, *, dry_run: bool) -> Limits:
    """The lock of the cache is held, by the daemon or us."""
    believed = clock.look(settings.state_dir / "cache", settings["cache.max_age"], note=not dry_run)
    return wanted if wanted.asked else replace(wanted, age_from=believed)


def as_json(report: Report) -> dict[str, Any]:
    """The report as `cache clean --json` shows it."""

    def rows(steps: Iterable[Any]) -> list[dict[str, Any]]:
        return [
            {
                "kind": step.item.kind,
                "name": step.item.name,
                "what": step.item.what,
                "bytes": step.size,
                "reason": step.reason,
                "part": not step.whole,
                "last_used": step.item.last_used,
            }
            for step in steps
        ]

    return {
        "dry_run": report.dry_run,
        "freed_bytes": report.freed,
        "removed": rows(report.done),
        "skipped": rows(report.skipped),
        "cache_bytes": report.cache_bytes,
        "free_bytes": report.free_bytes,
    }


def kept_trees(trees: Path, pins: Iterable[str], used: Callable[[Path], bool]) -> tuple[list[Item], dict[str, Item]]:
    """(the trees that are kept, blob name → an item that says how the layer stands by the trees that have it: in use,
    pinned, for which image)."""
    items: list[Item] = []
    blobs: dict[str, Item] = {}
    pinned = set(pins)
    for path in sorted(trees.iterdir()):
        if not _TREE.fullmatch(path.name):
            continue
        when = _last_used(path)
        meta = read_meta(path) or {}
        what = str(meta.get("image", ""))
        is_pinned = not pinned.isdisjoint({f"sha256:{path.name}", meta.get("digest")})
        item = Item("tree", path.name, discard.allocated(path), when, used(path), is_pinned, what=what)
        items.append(item)
        for layer in meta.get("layers", ()):
            other = blobs.get(layer["blob"])
            blobs[layer["blob"]] = Item(
                "layer",
                layer["blob"],
                0,
                0.0,
                in_use=item.in_use or (other is not None and other.in_use),
                pinned=is_pinned or (other is not None and other.pinned),
                what=what if other is None else other.what,
            )
    return items, blobs


def _last_used(tree: Path) -> float:
    """The time of meta.json, or of the directory where that was never written; 0 if both are gone."""
    for path in (tree / "meta.json", tree):
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return 0.0


class DaemonShelf:
    """What a running daemon keeps: it knows what it serves, and can drop spans that are in use."""

    def __init__(self, layers: Layers, trees: Trees, pins: Pins, state_dir: Path) -> None:
        self._layers = layers
        self._trees = trees
        self._pins = pins
        self._state = state_dir
        self.indexes = KeptIndexes(state_dir)

    def items(self) -> list[Item]:
        users = set(self._trees.in_use()) | self._trees.users()
        pins = self._pins.read()
        trees, blobs = kept_trees(self._state / "trees", pins, lambda path: is_used(path, users))
        layers = []
        for entry in self._layers.cache.entries():
            known = blobs.get(entry.name) or Item("layer", entry.name, 0, 0.0)
            with self._layers.held(entry.name) as served:
                refetch = served is not None and _can_refetch(served)
            known = replace(known, size=entry.allocated, last_used=entry.last_used)
            layers.append(replace(known, in_use=entry.is_open, can_refetch=refetch))
        return trees + layers + self.indexes.items(trees, pins)

    def remove(self, item: Item) -> bool:
        if item.kind == "layer":
            return self._layers.cache.remove(item.name)
        return self._trees.remove(item.name) if item.kind == "tree" else self.indexes.remove(item)

    def shrink(self, item: Item, size: int) -> int:
        with self._layers.held(item.name) as served:
            if served is None or not _can_refetch(served):
                return 0
            return drop_spans(served.lazy.cached, size)


def _can_refetch(served: ServedLayer) -> bool:
    now = time.monotonic()
    return any(not source.failed or now - source.failed > _TRUST_SECONDS for source in list(served.sources))


def drop_spans(cached: CachedLayer, size: int) -> int:
    """Drop spans of an open layer until its file is about `size` bytes smaller; returns by how much it became so.

    First those that nobody has read since the layer was opened, then the others, from the end.
    """
    before = discard.allocated(cached.path)
    state = cached.states
    unread = [span for span in range(cached.count) if state[span] in (states.ON_DISK, states.MARKED)]
    read = [span for span in reversed(range(cached.count)) if state[span] == states.VERIFIED]
    piece: list[int] = []
    dropped = piece_bytes = 0
    for span in unread + read:
        if dropped + piece_bytes >= size:
            break
        piece.append(span)
        piece_bytes += cached.span_length(span)
        if piece_bytes >= _PIECE:
            dropped += cached.drop(piece)
            piece, piece_bytes = [], 0
    if piece:
        cached.drop(piece)
    return max(0, before - discard.allocated(cached.path))


class OfflineShelf:
    """What is kept while no daemon runs: see `clean_offline`. Trees in use are asked of the kernel; the layers of those
    are left alone, since nobody is here who could tell their readers. What is removed is only set aside."""

    def __init__(self, state_dir: Path) -> None:
        self._state = state_dir
        self._indexes = KeptIndexes(state_dir)

    def _users(self) -> set[str]:
        return {hex_ for hex_, _ in overlays(mountinfo.read())}

    def items(self) -> list[Item]:
        users = self._users()
        pins = Pins(self._state).read()
        trees, blobs = kept_trees(self._state / "trees", pins, lambda path: is_used(path, users))
        layers = []
        for entry in entries(self._state / "cache"):
            known = blobs.get(entry.name) or Item("layer", entry.name, 0, 0.0)
            layers.append(replace(known, size=entry.allocated, last_used=entry.last_used))
        return trees + layers + self._indexes.items(trees, pins)

    def remove(self, item: Item) -> bool:
        if item.kind not in ("layer", "tree"):
            return self._indexes.remove(item)
        directory = self._state / ("cache" if item.kind == "layer" else "trees") / item.name
        if item.kind == "tree" and is_used(directory, self._users()):
            return False
        return discard.set_aside(directory) is not None

    def shrink(self, _item: Item, _size: int) -> int:
        return 0


def clean_offline(settings: Settings, wanted: Limits, *, dry_run: bool) -> Report:
    """Clean while no daemon runs. A daemon that starts meanwhile waits until everything is set aside, which is soon.

    Raises CacheError: a daemon has the cache.
    """
    state = settings.state_dir
    for directory in (state / "cache", state / "trees"):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    shelf = OfflineShelf(state)
    with ExitStack() as held:
        held.enter_context(cleaners_turn(state / "cache"))
        lock = take_lock(state / "cache")
        held.callback(os.close, lock)
        wanted = _by_the_clock(settings, wanted, dry_run=dry_run)
        report = clean(shelf, wanted, time.time(), state / "cache", dry_run=dry_run)
    if dry_run:
        return report
    for directory in (state / "cache", state / "trees"):
        discard.sweep(directory)
    return replace(report, free_bytes=disk_of(state / "cache").free)


class Cleaner:
    """The daemon's: looks at the limits every PERIOD, when the disk is full, and when it is asked to.

    One thread of its own; `_turn` lets one run at a time. It takes no lock of others while it holds one of theirs: what
    it planned may have been taken into use since, and whoever removes looks again under the right lock.
    """

    def __init__(self, settings: Settings, layers: Layers, trees: Trees) -> None:
        self._settings = settings
        self._state = settings.state_dir
        self._shelf = DaemonShelf(layers, trees, Pins(self._state), self._state)
        self._turn = threading.Lock()

    def run(self, wanted: Limits, *, dry_run: bool = False) -> Report:
        """Clean now. Raises CacheError (pins that cannot be read), OSError."""
        with self._turn:
            if not dry_run:
                discard.sweep(self._state / "cache")
                discard.sweep(self._state / "trees")
                self._shelf.indexes.sweep()
                self._stamp()
            wanted = _by_the_clock(self._settings, wanted, dry_run=dry_run)
            report = clean(self._shelf, wanted, time.time(), self._state / "cache", dry_run=dry_run)
        if report.done and not dry_run:
            log.info("cache cleaned", freed=report.freed, items=len(report.done), cache_bytes=report.cache_bytes)
        return report

    def room(self) -> int:
        """Bytes that the cache may grow by before the cleaner would take some away again. Raises OSError."""
        wanted = limits(self._settings, {})
        disk = disk_of(self._state / "cache")
        room = disk.free - int((wanted.free_high if wanted.free_low else 0) * disk.size)
        if wanted.max_bytes:
            room = min(room, wanted.max_bytes - sum(item.size for item in self._shelf.items()))
        return room

    def asked(self, session: Session, request: dict[str, Any], _fds: list[int]) -> Answer:
        """`{"max_bytes": …, "max_age": …, "dry_run": …}`, each of them optional: `clip-shim cache clean`."""
        given: dict[str, float] = {key: request[key] for key in ("max_bytes", "max_age") if key in request}
        for key, value in given.items():
            if type(value) is not int or value < 0:
                raise DaemonError(f"`{key}` must be a whole number")
        session.announce(_ASKED_SECONDS)
        return as_json(self.run(limits(self._settings, given), dry_run=bool(request.get("dry_run"))))

    def _stamp(self) -> None:
        """What is in use counts as used, also when its containers read nothing: after a reboot it is not stale. What
        was used in the future, when the clock was wrong, was used by now."""
        now = time.time()
        for item in self._shelf.items():
            ago = now - item.last_used
            is_kept = item.kind in ("layer", "tree")
            if ago < -_STAMP_SECONDS and not is_kept:
                self._shelf.indexes.touch(item)
            elif ago < -_STAMP_SECONDS or (is_kept and item.in_use and ago > _STAMP_SECONDS):
                touch(self._state / ("cache" if item.kind == "layer" else "trees") / item.name)
            elif item.kind == "index":
                self._shelf.indexes.follow(item)

    def loop(self, full: threading.Event, stopping: threading.Event) -> None:
        """Run until `stopping`; `full` is set when the disk refused a write, and when the daemon stops."""
        try:
            with self._turn:  # at boot the clock may be wrong still: noted before anything is used by it
                clock.look(self._state / "cache", self._settings["cache.max_age"], note=True)
        except OSError as error:
            log.warning("the clock could not be looked at", error=str(error))
        while not stopping.is_set():
            is_full = full.wait(PERIOD)
            if stopping.is_set():
                return
            full.clear()
            try:
                self.run(limits(self._settings, {}, full=is_full))
            except (ShimError, OSError) as error:
                log.warning("the cache could not be cleaned", error=str(error))
            except Exception:  # noqa: BLE001  the next round may be better
                log.exception("cleaning failed")
