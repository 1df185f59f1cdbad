"""Fetching what a start profile names, in its order, before anybody asks for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from shim.cache.fetch import LazyLayer
from shim.index.model import Spans

_THREADS = 2  # requests at a time: what comes first should be here first
_NICENESS = 10  # the container that reads, and the threads that answer it, go first
_STRETCH = 4 << 20  # compressed bytes of one request, about
_GAP = 1 << 20  # compressed bytes that may be thrown away to save a request …
_WASTE = 1 / 12  # … as long as all of them are no more than this part of what is wanted
_RECENT = 16  # stretches that may still grow: what is read much later must not hold up what is read now


Hold = Callable[[LazyLayer], AbstractContextManager[bool]]
"""While inside, the layer is not closed; False: it is already."""


@dataclass(slots=True)
class Stretch:
    """What one request gets: spans of one layer, which lie in its compressed bytes [start, end)."""

    layer: LazyLayer
    start: int
    end: int
    spans: list[int] = field(default_factory=list)


def plan(layers: Sequence[LazyLayer], profile: Sequence[tuple[int, int]]) -> list[Stretch]:
    """What to fetch for a profile of (layer number, span), in the order of the first reads.

    Runs that lie near each other and are wanted at about the same time are got by one request. Everything in `profile`
    must be there (index/profile.check).
    """
    runs: dict[tuple[int, int], list[int]] = {}  # (layer, first span of the run) -> spans wanted of it
    for number, span in profile:
        runs.setdefault((number, layers[number].spans.restart(span)), []).append(span)
    parts = [
        Stretch(layers[number], *_reach(layers[number].spans, first), spans) for (number, first), spans in runs.items()
    ]
    budget = _WASTE * sum(part.end - part.start for part in parts)
    stretches: list[Stretch] = []
    for part in parts:
        for known in reversed(stretches[-_RECENT:]):
            start, end = min(known.start, part.start), max(known.end, part.end)
            gap = (end - start) - (known.end - known.start) - (part.end - part.start)
            if known.layer is part.layer and end - start <= _STRETCH and gap <= min(_GAP, budget):
                budget -= max(0, gap)  # below 0: it lies in a gap, which is made up for
                known.start, known.end = start, end
                known.spans += part.spans
                break
        else:
            stretches.append(part)
    return stretches


def _reach(spans: Spans, first: int) -> tuple[int, int]:
    """The compressed bytes of a run."""
    return spans.cstart(first), spans.cstart(spans.run_end(first))


class Prefetch:
    """Works a plan off with threads of its own, and ends.

    Threads: `_lock` guards the place in the plan. A stretch is looked at when its turn comes: what is there by then, or
    is being fetched for a reader, is left out, so nothing is fetched twice and no reader waits for a turn.
    """

    def __init__(self, stretches: Sequence[Stretch], hold: Hold) -> None:
        self._stretches = iter(stretches)
        self._hold = hold
        self._lock = threading.Lock()

    def start(self) -> None:
        """Return at once."""
        for number in range(_THREADS):
            threading.Thread(target=self._work, name=f"prefetch-{number}", daemon=True).start()

    def _work(self) -> None:
        # Linux: a thread has a nice value of its own, setpriority(2) under "C library/kernel differences"
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS)
        while True:
            with self._lock:
                stretch = next(self._stretches, None)
            if stretch is None:
                return
            with self._hold(stretch.layer) as usable:
                if usable:
                    stretch.layer.fetch_ahead(stretch.spans)
