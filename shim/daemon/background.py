"""Completing what is in use, so that it stops depending on its registry: slowly, or at once for `clip-shim drain`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shim import log
from shim.cache import layer as states
from shim.cache.layer import CachedLayer
from shim.daemon.cleaner import Cleaner
from shim.daemon.layers import Layers
from shim.daemon.trees import Trees
from shim.settings import Settings

_LOOK = 5.0  # seconds between looks at what is in use
_LOOK_DRAIN = 0.5  # the same while somebody waits for it
_WAIT = 0.5  # and while somebody reads
_BUSY = 0.05  # how often a drain, or a transfer that stands still, looks again
_PIECE = 16 << 20  # uncompressed bytes in one job
_YOUNG = 5.0  # a read that waits for longer does so because of its registry, not of us
_BACK_OFF = 60.0  # seconds after a failure, doubling …
_BACK_OFF_MAX = 1800.0  # … up to this
_DRAIN_TRIES = 2  # each of which the registry client tries several times
_DRAIN_PAUSE = 0.5  # seconds, doubling


@dataclass(slots=True)
class _Watched:
    """A layer in use. misses, since: how many reads had to wait, and when that last changed. Times: the clock's."""

    misses: int
    since: float
    again: float = 0.0  # not before
    failures: int = 0  # in a row
    error: str = ""
    checked: bool = False  # what a former process left was hashed, for a drain
    said: bool = False  # that it is complete


class Background:
    """Fetches the rest of the layers in use, one request at a time.

    A layer's turn comes when no read of it had to wait for `background.after`, its image is not larger than
    `background.max_image`, the cleaner would not take the bytes away again, and nobody waits for a read. Bytes come at
    `background.rate`; as soon as any read waits, no more are taken until it is answered (unless it waits for these).
    A drain has none of these limits; it is over when nothing is missing, or what is missing failed _DRAIN_TRIES times.
    Bytes that a former process left are hashed first: what the disk has changed is missing too.

    One thread runs `step`, and fetches in it; control connections call the methods of drains. `_lock` guards `_drains`
    and what `progress` reads of `_watched`, and is held for no I/O.
    """

    def __init__(
        self,
        settings: Settings,
        layers: Layers,
        trees: Trees,
        cleaner: Cleaner,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        """clock and pause(seconds): replaced by tests."""
        self._after: float = settings["background.after"]
        self._rate: int = settings["background.rate"]
        self._max_image: int = settings["background.max_image"]
        self._enabled: bool = settings["background.enabled"]
        self._layers = layers
        self._trees = trees
        self._cleaner = cleaner
        self._clock = clock
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._pause = pause or self._stopping.wait
        self._lock = threading.Lock()
        self._drains = 0
        self._watched: dict[str, _Watched] = {}
        self._next = 0.0  # when the next byte may come
        self._wanted: dict[str, list[dict[str, Any]]] = {}  # layer in use → the metas of its trees
        self._look_at = 0.0
        self._room = (0.0, 0)  # (until when this holds, bytes that the cache may grow by)

    def loop(self) -> None:
        """Until `close`."""
        while not self._stopping.is_set():
            try:
                delay = self.step()
            except Exception:  # noqa: BLE001  the next round may be better
                log.exception("background work failed")
                delay = _LOOK
            self._wake.wait(delay)
            self._wake.clear()

    def close(self) -> None:
        self._stopping.set()
        self._wake.set()

    # One thread

    def step(self) -> float:
        """Do what there is to do; returns the seconds until there may be more."""
        now = self._clock()
        if now >= self._look_at:
            self._look_at = now + (_LOOK_DRAIN if self._drains else min(_LOOK, max(_BUSY, self._after / 2)))
            self._look(now)
        if not self._drains and not self._enabled:
            return _LOOK
        if not self._drains and self._someone_reads():
            return _WAIT
        for name in self._candidates(now):
            if self._fetch(name):
                return 0.0
        return _BUSY if self._drains else min(_LOOK, max(_BUSY, self._after / 2))

    def _look(self, now: float) -> None:
        """Notice what is in use and which layers were read, and forget the others."""
        wanted: dict[str, list[dict[str, Any]]] = {}
        self._wanted = wanted
        for meta in self._trees.in_use().values():
            for layer in meta["layers"]:
                wanted.setdefault(layer["blob"], []).append(meta)
        for name in wanted:
            with self._layers.held(name) as served:
                if served is None:
                    continue
                misses = served.lazy.counters.misses
                watched = self._watched.get(name)
                if watched is None or watched.misses != misses:
                    fresh = watched or _Watched(misses, now)
                    fresh.misses, fresh.since = misses, now
                    with self._lock:
                        self._watched[name] = fresh
        with self._lock:
            for name in self._watched.keys() - wanted.keys():
                del self._watched[name]

    def _someone_reads(self) -> bool:
        return any(read.age < _YOUNG for read in self._layers.waiting())

    def _candidates(self, now: float) -> list[str]:
        """Layers that may be fetched now, those first that lack least."""
        draining = self._drains > 0
        missing = {}
        for name, watched in self._watched.items():
            ripe = draining or (now - watched.since >= self._after and self._is_small(name))
            if ripe and now >= watched.again and not (draining and watched.failures >= _DRAIN_TRIES):
                with self._layers.held(name) as served:
                    if served is not None and (draining or lacks(served.lazy.cached)):
                        missing[name] = missing_bytes(served.lazy.cached)
        if not draining and missing:
            if now >= self._room[0]:
                self._room = (now + _LOOK, self._cleaner.room())
            room = self._room[1]
            missing = {name: size for name, size in missing.items() if size <= room}
        return sorted(missing, key=lambda name: missing[name])

    def _is_small(self, name: str) -> bool:
        """Whether an image in use that has the layer is small enough."""
        sizes = [sum(int(layer.get("size", 0)) for layer in meta["layers"]) for meta in self._wanted[name]]
        return not self._max_image or min(sizes) <= self._max_image

    def _fetch(self, name: str) -> bool:
        """Get the next piece of a layer; False if there was nothing to get."""
        watched = self._watched[name]
        with self._layers.held(name) as served:
            if served is None:
                return False
            cached = served.lazy.cached
            if self._drains and not watched.checked:
                self._check(cached)
                watched.checked = True
            before = missing_bytes(cached)
            job = served.lazy.fetch_ahead(missing_spans(cached, _PIECE), self.pace)
            left = missing_bytes(cached)
            if job is None and (not left or served.lazy.is_busy):
                return False  # all is here, or coming for somebody
        error = "" if job is None else job.error
        if error or left >= before:
            self._failed(watched, error or "the cache cannot be written")
        else:
            with self._lock:
                watched.error, watched.failures = "", 0
            if not left and not watched.said:
                watched.said = True
                log.info("a layer is complete: it needs no registry any more", layer=name)
        return job is not None

    def _check(self, cached: CachedLayer) -> None:
        """Hash what a former process left: what the disk has changed is missing too."""
        for span in range(cached.count):
            if cached.states[span] == states.ON_DISK and not self._stopping.is_set():
                cached.verify(span)

    def _failed(self, watched: _Watched, error: str) -> None:
        first, longest = (_DRAIN_PAUSE, _BACK_OFF) if self._drains else (_BACK_OFF, _BACK_OFF_MAX)
        with self._lock:
            watched.error = error
            watched.failures += 1
            watched.again = self._clock() + min(first * 2 ** min(watched.failures - 1, 10), longest)
        log.debug("a layer could not be completed", error=error)

    def pace(self, size: int, is_wanted: Callable[[], bool]) -> None:
        """`size` bytes came: return when more may, or when somebody waits for these."""

        def is_free() -> bool:
            return self._stopping.is_set() or self._drains > 0 or is_wanted()

        while self._someone_reads() and not is_free():
            self._pause(_BUSY)
        if self._rate:
            self._next = max(self._next, self._clock()) + size / self._rate
            while (early := self._next - self._clock()) > 0 and not is_free():
                self._pause(min(early, _BUSY))

    # Control connections

    def begin_drain(self) -> None:
        """From now on, until `end_drain`, everything in use is fetched as fast as it comes."""
        with self._lock:
            self._drains += 1
            for watched in self._watched.values():
                watched.again, watched.failures, watched.error, watched.checked = 0.0, 0, "", False
            self._look_at = 0.0
        self._wake.set()

    def end_drain(self) -> None:
        with self._lock:
            self._drains -= 1

    def progress(self) -> list[dict[str, Any]]:
        """For each image in use: what it still lacks. `pending`: more may come by itself, or is coming."""
        with self._lock:
            troubles = {name: (watched.failures, watched.error) for name, watched in self._watched.items()}
            unchecked = {name for name, watched in self._watched.items() if not watched.checked}
        rows = []
        for hex_, meta in self._trees.in_use().items():
            size = missing = 0
            pending, errors = False, set()
            for layer in meta["layers"]:
                with self._layers.held(layer["blob"]) as served:
                    if served is None:
                        continue
                    lacking = missing_bytes(served.lazy.cached)
                    size += served.lazy.cached.length
                failures, error = troubles.get(layer["blob"], (0, ""))
                missing += lacking
                is_open = lacking > 0 or layer["blob"] not in troubles or layer["blob"] in unchecked
                pending |= is_open and failures < _DRAIN_TRIES
                errors |= {error} if lacking and error else set()
            rows.append(
                {
                    "index": f"sha256:{hex_}",
                    "image": meta["image"],
                    "size": size,
                    "missing_bytes": missing,
                    "pending": pending,
                    "errors": sorted(errors),
                }
            )
        return rows


def missing_spans(cached: CachedLayer, limit: int) -> list[int]:
    """The first spans that are not here, about `limit` bytes of them."""
    found, size = [], 0
    span = cached.states.find(states.ABSENT)
    while span >= 0 and size < limit:
        found.append(span)
        size += cached.span_length(span)
        span = cached.states.find(states.ABSENT, span + 1)
    return found


def lacks(cached: CachedLayer) -> bool:
    return states.ABSENT in cached.states or states.IN_MEMORY in cached.states


def missing_bytes(cached: CachedLayer) -> int:
    """Uncompressed bytes of a layer that are not on disk."""
    state = cached.states
    gone = (states.ABSENT, states.IN_MEMORY)
    return sum(cached.span_length(i) for i in range(cached.count) if state[i] in gone) if lacks(cached) else 0
