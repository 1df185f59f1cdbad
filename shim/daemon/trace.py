"""What one container's start read, and when: a bounded record for `clip-shim report`.

Nothing is recorded, and nothing is paid, for reads of layers that no start is watching: only while one does, its
layers' blobs in the FUSE server are replaced by a `WatchedBlob`.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shim.errors import ShimError
from shim.fuse.blob import Blob, Buffer, Done

MAX_EVENTS = 8192  # of one start; 32 bytes each
_JOIN_SECONDS = 0.02  # reads of consecutive bytes, this close in time and none of them waiting, are one event

Listener = Callable[[str, int, int, float, float], None]  # blob name, offset, size, when it was asked, seconds waited


class WatchedBlob:
    """A Blob that tells a listener of every read. `watchers` may change at any time: it is replaced, never altered."""

    def __init__(self, blob: Blob) -> None:
        self.blob = blob
        self.node_id = blob.node_id
        self.name = blob.name
        self.size = blob.size
        self.watchers: tuple[Listener, ...] = ()
        self._text = blob.name.decode()

    @property
    def data_fd(self) -> int:
        return self.blob.data_fd

    @property
    def epoch(self) -> int:
        return self.blob.epoch

    def trouble(self) -> str:
        return self.blob.trouble()

    def stamp(self, offset: int, size: int) -> int:
        stamp = self.blob.stamp(offset, size)
        if stamp >= 0:
            self._tell(offset, size, time.monotonic(), 0.0)
        return stamp

    def read_cached(self, offset: int, size: int) -> Buffer | None:
        data = self.blob.read_cached(offset, size)
        if data is not None:
            self._tell(offset, size, time.monotonic(), 0.0)
        return data

    def read_missing(self, offset: int, size: int, done: Done) -> None:
        asked = time.monotonic()

        def answered(result: Buffer | ShimError) -> None:
            done(result)
            self._tell(offset, size, asked, time.monotonic() - asked)

        self.blob.read_missing(offset, size, answered)

    def _tell(self, offset: int, size: int, asked: float, waited: float) -> None:
        for watcher in self.watchers:
            watcher(self._text, offset, size, asked, waited)


@dataclass(slots=True)
class Trace:
    """The reads of some layers from `begin` (monotonic) on, for `seconds`: columns, in the order of their answers.

    layers: blob names; an event's `number` is the place in it. Reads beyond MAX_EVENTS are only counted. Called from
    any thread; one lock, held for the appending.
    """

    layers: list[str]
    begin: float
    seconds: float
    reads: int = 0
    waited: int = 0  # reads that were not answered from the cache
    lost: int = 0
    numbers: array[int] = field(default_factory=lambda: array("H"))
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("Q"))
    asked: array[float] = field(default_factory=lambda: array("f"))  # ms after `begin`
    waits: array[float] = field(default_factory=lambda: array("f"))  # ms
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _places: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._places = {name: number for number, name in enumerate(self.layers)}

    def add(self, blob: str, offset: int, size: int, asked: float, waited: float) -> None:
        """A Listener."""
        number = self._places.get(blob)
        after = asked - self.begin
        if number is None or not 0 <= after <= self.seconds:
            return
        with self._lock:
            self.reads += 1
            self.waited += waited > 0
            if self._joins(number, offset, after, waited):
                self.sizes[-1] += size
            elif len(self.numbers) >= MAX_EVENTS:
                self.lost += 1
            else:
                self.numbers.append(number)
                self.offsets.append(offset)
                self.sizes.append(size)
                self.asked.append(after * 1000)
                self.waits.append(waited * 1000)

    def _joins(self, number: int, offset: int, after: float, waited: float) -> bool:
        return (
            bool(self.numbers)
            and not waited
            and not self.waits[-1]
            and self.numbers[-1] == number
            and self.offsets[-1] + self.sizes[-1] == offset
            and after * 1000 - self.asked[-1] < _JOIN_SECONDS * 1000
        )

    def is_over(self) -> bool:
        return time.monotonic() - self.begin > self.seconds

    def events(self) -> list[list[float]]:
        """[layer number, offset, bytes, ms after the begin, ms waited], in the order they were asked."""
        with self._lock:
            columns = zip(self.numbers, self.offsets, self.sizes, self.asked, self.waits, strict=True)
            rows = [[n, o, s, round(a, 2), round(w, 2)] for n, o, s, a, w in columns]
        return sorted(rows, key=lambda row: row[3])

    def needed(self) -> int:
        """Uncompressed bytes that were asked for, each once."""
        with self._lock:
            spans = sorted(zip(self.numbers, self.offsets, self.sizes, strict=True))
        total, layer, end = 0, -1, 0
        for number, offset, size in spans:
            if number != layer:
                layer, end = number, 0
            total += max(0, offset + size - max(offset, end))
            end = max(end, offset + size)
        return total

    def summary(self) -> dict[str, Any]:
        slowest = max(self.waits, default=0.0)
        return {
            "reads": self.reads,
            "waited": self.waited,
            "needed_bytes": self.needed(),
            "slowest_ms": round(slowest, 1),
        }
