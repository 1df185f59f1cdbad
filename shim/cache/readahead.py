"""When to fetch ahead: recognises sequential readers of one layer, run by run (a run is what one restart point gives).

A reader is sequential once it went twice from the last run it was seen in to the next (programs that start touch
neighbouring runs by chance: after one step a fifth of what was fetched was for nothing). Then it gets the next run, and
each time it enters what was fetched ahead, twice as much behind that, up to half the limit: while it reads one stretch
the next is on its way, and what lies ahead of it never exceeds the limit. Scattered reads fetch nothing but their runs.
Hits do not come here (they are answered without a second look), so the first span of each stretch is *marked*, and the
reader that reaches a mark is seen.
"""

from __future__ import annotations

from collections import deque

_STREAMS = 16
_STEPS = 2


class _Stream:
    __slots__ = ("ahead", "last", "steps", "window")

    def __init__(self, last: int) -> None:
        self.last = last  # the last run the reader was seen in
        self.ahead = last  # the last run that is wanted for it
        self.steps = 0
        self.window = 0  # runs


class Readahead:
    """The sequential readers of one layer. Not thread-safe: the caller holds its lock.

    limit: the most runs ahead of a reader (0 turns read-ahead off); count: runs in the layer.
    """

    def __init__(self, count: int, limit: int) -> None:
        self._count = count
        self._batch = limit if limit < 2 else limit // 2
        self._streams: deque[_Stream] = deque(maxlen=_STREAMS)  # the most recently seen last

    def seen(self, first: int, last: int) -> range:
        """A reader needs runs first..last. Returns the runs to fetch ahead, empty when it is not sequential."""
        for stream in self._streams:
            if stream.last <= last and first <= stream.ahead + 1 and first >= stream.last:
                self._streams.remove(stream)
                self._streams.append(stream)
                return self._advance(stream, last) if last > stream.last else range(0)
        self._streams.append(_Stream(last))
        return range(0)

    def _advance(self, stream: _Stream, last: int) -> range:
        stream.last = last
        stream.steps += 1
        if stream.steps < _STEPS:
            stream.ahead = last
            return range(0)
        stream.window = min(max(1, 2 * stream.window), self._batch)
        first = max(stream.ahead, last) + 1
        stop = min(first + stream.window, self._count)
        if stop <= first or not self._batch:
            return range(0)
        stream.ahead = stop - 1
        return range(first, stop)
