"""Fetching what a start profile names, in its order, before anybody asks for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise

from shim.cache.fetch import LazyLayer
from shim.index.model import Spans

_THREADS = 2  # requests at a time: what comes first should be here first
_NICENESS = 10  # the container that reads, and the threads that answer it, go first
_STRETCH = 16 << 20  # compressed bytes of one request, at most about
_GAP = 2 << 20  # compressed bytes that may be thrown away to save a request …
_WASTE = 1 / 12  # … as long as all of them are no more than this part of what is wanted
_APART = 64 << 20  # compressed bytes of the profile that may lie between the reads of what is got by one request


Hold = Callable[[LazyLayer], AbstractContextManager[bool]]
"""While inside, the layer is not closed; False: it is already."""


@dataclass(slots=True)
class Stretch:
    """What one request gets: spans of one layer, which lie in its compressed bytes [start, end).

    `first`, `last`: when it is wanted, by the compressed bytes that the profile names before it.
    """

    layer: LazyLayer
    start: int
    end: int
    spans: list[int]
    first: int
    last: int

    def joined(self, other: Stretch) -> Stretch | None:
        """Both and what lies between them, if that makes a reasonable request; `other` begins behind this one."""
        first, last = min(self.first, other.first), max(self.last, other.last)
        if last - first > _APART or other.end - self.start > _STRETCH:
            return None
        return Stretch(self.layer, self.start, other.end, self.spans + other.spans, first, last)


def plan(layers: Sequence[LazyLayer], profile: Sequence[tuple[int, int]]) -> list[Stretch]:
    """What to fetch for a profile of (layer number, span), in the order of the first reads.

    Runs that lie near each other and are wanted at about the same time are got by one request, the nearest first: a
    request costs a registry some 6 ms of CPU, and a client a round trip. Everything in `profile` must be there
    (index/profile.check).
    """
    runs: dict[tuple[int, int], list[int]] = {}  # (layer, first span of the run) -> spans wanted of it
    for number, span in profile:
        runs.setdefault((number, layers[number].spans.restart(span)), []).append(span)
    wanted = 0
    parts: dict[tuple[int, int], Stretch] = {}
    for (number, run), spans in runs.items():
        start, end = _reach(layers[number].spans, run)
        parts[number, run] = Stretch(layers[number], start, end, spans, wanted, wanted)
        wanted += end - start
    order = sorted(parts)
    gaps = sorted(
        (parts[behind].start - parts[before].end, before, behind)
        for before, behind in pairwise(order)
        if before[0] == behind[0]
    )
    heads = {run: run for run in order}  # any run -> one that is in the same stretch; `parts` has it for the first
    budget = _WASTE * wanted
    for gap, before, behind in gaps:
        if gap > min(_GAP, budget):
            break
        head = before
        while heads[head] != head:
            head = heads[head]
        both = parts[head].joined(parts[behind])
        if both is not None:
            parts[head] = both
            del parts[behind]
            heads[behind] = head
            budget -= gap
    return sorted(parts.values(), key=lambda stretch: stretch.first)


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
