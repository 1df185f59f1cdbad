"""The containers that were started: one log line each with timings and bytes, and what each one read."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from shim import log
from shim.counters import Histogram
from shim.daemon.control import Answer, Session
from shim.daemon.layers import Layers
from shim.daemon.served import Traffic
from shim.daemon.trace import Trace
from shim.errors import DaemonError

_KEPT = 32  # starts whose trace is kept
_STEPS = ("resolve", "mount", "overlay", "verify", "exec")
_TEXT = 256  # characters of what a wrapper says


@dataclass(slots=True)
class Start:
    """One acquire for a container. `before`: the layers' traffic before it; `steps`: ms, once the wrapper told."""

    container: str
    root: str
    source: str
    answer: Answer  # to the acquire: index, image, tree, tier, timings
    when: float  # seconds since the epoch
    begin: float  # monotonic
    before: dict[str, Traffic]
    trace: Trace
    steps: dict[str, float] = field(default_factory=dict)
    running: bool = True  # its reads are recorded
    after: dict[str, Traffic] = field(default_factory=dict)

    def traffic(self, now: dict[str, Traffic]) -> Traffic:
        """What its layers fetched since the start began."""
        ends = self.after or now
        total = Traffic()
        for name in self.trace.layers:
            total = total + (ends.get(name, Traffic()) - self.before.get(name, Traffic()))
        return total


class Starts:
    """Knows the last starts. One lock for the list and counters; the traces have their own.

    seconds: how long the reads of a start are recorded (setting `report.seconds`); 0 records none.
    """

    def __init__(self, layers: Layers, seconds: float) -> None:
        self._layers = layers
        self._seconds = seconds
        self._lock = threading.Lock()
        self._starts: deque[Start] = deque(maxlen=_KEPT)
        self.durations = Histogram()  # whole starts, as the wrapper measured them
        self.mounts = Histogram()  # acquires, as the daemon did
        self.failures = 0

    def asked(self, session: Session) -> float:
        """An acquire begins: notes what was fetched before it. Returns the time, monotonic."""
        session.notes["before"] = self._layers.traffic_by_layer()
        return time.monotonic()

    def acquired(
        self, session: Session, request: dict[str, Any], begin: float, answer: Answer, blobs: list[str]
    ) -> None:
        """A tree was acquired for a container: from here on its reads are recorded. Mounts of people are not starts."""
        with self._lock:
            self.mounts.add(time.monotonic() - begin)
        container = request.get("container")
        if not isinstance(container, dict):
            return
        start = Start(
            container=str(container.get("id"))[:_TEXT],
            root=str(container.get("root"))[:_TEXT],
            source=str(request.get("source")),
            answer=answer,
            when=time.time() - (time.monotonic() - begin),
            begin=begin,
            before=session.notes.pop("before", {}),
            trace=Trace(blobs, begin, self._seconds),
        )
        if self._seconds:
            self._layers.watch(blobs, start.trace.add)
        with self._lock:
            gone = self._starts[0] if len(self._starts) == _KEPT else None
            self._starts.append(start)
        if gone is not None:
            self._finish(gone)
        session.notes["start"] = start
        session.on_close.append(lambda: self._closed(start))

    def started(self, session: Session, request: dict[str, Any], _fds: list[int]) -> Answer:
        """The wrapper's last word before it becomes the runtime: `timings_us`, microseconds by step."""
        start = session.notes.get("start")
        told = request.get("timings_us")
        if start is None or not isinstance(told, dict):
            raise DaemonError("`started` comes after `acquire`, with timings")
        steps = {name: round(told[name] / 1000, 2) for name in _STEPS if isinstance(told.get(name), int)}
        start.steps = steps
        total = sum(steps.values())
        with self._lock:
            self.durations.add(total / 1000)
        traffic = start.traffic(self._layers.traffic_by_layer(start.trace.layers))
        log.info(
            "container started",
            container=start.container,
            image=start.answer["image"],
            index=start.answer["index"],
            source=start.source,
            tier=start.answer["tier"],
            total_ms=round(total, 1),
            **{f"{name}_ms": ms for name, ms in steps.items()},
            fetched_bytes=traffic.fetched,
            requests=traffic.requests,
        )
        return {}

    def _closed(self, start: Start) -> None:
        if not start.steps:
            with self._lock:
                self.failures += 1
            log.warning(
                "container not started: the wrapper gave up or was killed",
                container=start.container,
                image=start.answer["image"],
            )

    def tick(self) -> None:
        """Called every few seconds: stop recording starts that are over."""
        with self._lock:
            over = [start for start in self._starts if start.running and start.trace.is_over()]
        for start in over:
            self._finish(start)

    def _finish(self, start: Start) -> None:
        with self._lock:
            running, start.running = start.running, False
        if not running:
            return
        self._layers.unwatch(start.trace.layers, start.trace.add)
        start.after = self._layers.traffic_by_layer(start.trace.layers)
        traffic = start.traffic({})
        if self._seconds and start.steps:
            log.info(
                "container read",
                container=start.container,
                image=start.answer["image"],
                seconds=self._seconds,
                fetched_bytes=traffic.fetched,
                requests=traffic.requests,
                **start.trace.summary(),
            )

    def report(self, _session: Session, request: dict[str, Any], _fds: list[int]) -> Answer:
        """The newest start of a container, whose ID is given or begins as given. DaemonError if there is none."""
        wanted = str(request.get("container"))[:_TEXT]
        with self._lock:
            starts = list(reversed(self._starts))
        found = next((s for s in starts if s.container == wanted), None)
        found = found or next((s for s in starts if wanted and s.container.startswith(wanted)), None)
        if found is None:
            known = ", ".join(dict.fromkeys(s.container[:20] for s in starts)) or "none"
            raise DaemonError(
                f"no start of a container {wanted!r} is on record",
                hint=f"the daemon remembers its last {_KEPT} starts: {known}",
            )
        traffic = found.traffic(self._layers.traffic_by_layer(found.trace.layers))
        return {
            "container": found.container,
            "image": found.answer["image"],
            "index": found.answer["index"],
            "tier": found.answer["tier"],
            "source": found.source,
            "started": datetime.fromtimestamp(found.when, UTC).isoformat(timespec="milliseconds"),
            "seconds": min(self._seconds, time.monotonic() - found.begin),
            "recording": found.running and bool(self._seconds),
            "timings_ms": found.steps,
            "mount_ms": found.answer["timings"],
            "layers": found.trace.layers,
            "fetched_bytes": traffic.fetched,
            "requests": traffic.requests,
            "demand_bytes": traffic.demand,
            "ahead_bytes": traffic.ahead,
            **found.trace.summary(),
            "lost": found.trace.lost,
            "shared": self._is_shared(found),
            "events": found.trace.events(),
        }

    def _is_shared(self, start: Start) -> bool:
        """Whether another container of the same layers was started while this one was recorded."""
        with self._lock:
            return any(
                other is not start
                and abs(other.begin - start.begin) < self._seconds
                and not set(other.trace.layers).isdisjoint(start.trace.layers)
                for other in self._starts
            )
