"""Counts of how long things took, as Prometheus wants them. Standard library only."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """How many durations fell below each bound of SECONDS, and their sum, since the start.

    `add` takes no lock: it belongs to callers that hold one of their own. Reading never blocks; a value that is being
    added meanwhile may be missing.
    """

    __slots__ = ("_counts", "sum")

    def __init__(self) -> None:
        self._counts = [0] * (len(SECONDS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds

    @property
    def count(self) -> int:
        return sum(self._counts)

    def buckets(self) -> Iterator[tuple[float, int]]:
        """(bound in seconds, how many took that long or less), cumulative; the last bound is infinite."""
        total = 0
        for bound, count in zip((*SECONDS, float("inf")), list(self._counts), strict=True):
            total += count
            yield bound, total
