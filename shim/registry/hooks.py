"""What the registry client takes from the world, in one place, so that a test can give it another; and its counters.

Standard library only.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_log = logging.getLogger("shim.registry")


def _no_fault(point: str, detail: str) -> None:
    """Nothing goes wrong by itself."""


@dataclass(slots=True)
class Hooks:
    """Time, chance and fault points.

    clock: monotonic seconds, the base of all deadlines; wall: seconds since the epoch, for HTTP dates; sleep: waits
    that many seconds; random: [0, 1). fault(point, detail) is called at "send" (detail: method and host), "chunk"
    (host), and "token" (host): it may raise a RegistryError. warn gets one line that holds no secret.
    """

    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    random: Callable[[], float] = random.random
    fault: Callable[[str, str], None] = _no_fault
    warn: Callable[[str], None] = _log.warning


@dataclass(slots=True)
class Count:
    """What went over the wire for one (host, kind)."""

    requests: int = 0
    bytes: int = 0  # of bodies, as they came (compressed)
    errors: int = 0  # answers of 400 and above, and attempts without an answer
    retries: int = 0


@dataclass(slots=True)
class Counters:
    """Thread-safe counts by host and by kind: "manifest", "blob", "config", "token", "check"."""

    _lock: threading.Lock = field(default_factory=threading.Lock)
    _counts: dict[tuple[str, str], Count] = field(default_factory=dict)

    def add(self, host: str, kind: str, *, requests: int = 0, size: int = 0, errors: int = 0, retries: int = 0) -> None:
        with self._lock:
            count = self._counts.setdefault((host, kind), Count())
            count.requests += requests
            count.bytes += size
            count.errors += errors
            count.retries += retries

    def snapshot(self) -> dict[tuple[str, str], Count]:
        """A copy: (host, kind) -> Count."""
        with self._lock:
            return {
                key: Count(count.requests, count.bytes, count.errors, count.retries)
                for key, count in self._counts.items()
            }

    def total(self, *kinds: str) -> Count:
        """The sum over all hosts, of `kinds` or of everything."""
        total = Count()
        for (_, kind), count in self.snapshot().items():
            if not kinds or kind in kinds:
                total.requests += count.requests
                total.bytes += count.bytes
                total.errors += count.errors
                total.retries += count.retries
        return total
