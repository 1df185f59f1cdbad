"""When to fetch ahead: recognises sequential readers of one layer, span by span.

A reader is sequential once it goes from the last span it was seen in to the next. Then the window doubles, from one
span to the limit, each time it enters what was fetched ahead; scattered reads never fetch anything but their spans.
Hits do not come here (they are answered without Python looking twice), so the first span of each stretch is *marked*,
and the reader that reaches a mark is seen.
"""

from __future__ import annotations

from collections import deque

_STREAMS = 16


class _Stream:
    __slots__ = ("ahead", "last", "window")

    def __init__(self, last: int) -> None:
        self.last = last  # the last span the reader was seen in
        self.ahead = last  # the last span that is wanted for it
        self.window = 0  # spans


class Readahead:
    """The sequential readers of one layer. Not thread-safe: the caller holds its lock.

    limit: spans in the largest window (0 turns read-ahead off); count: spans in the layer.
    """

    def __init__(self, count: int, limit: int) -> None:
        self._count = count
        self._limit = limit
        self._streams: deque[_Stream] = deque(maxlen=_STREAMS)  # the most recently seen last

    def seen(self, first: int, last: int) -> range:
        """A reader needs spans first..last. Returns the spans to fetch ahead, empty when it is not sequential."""
        for stream in self._streams:
            if stream.last <= last and first <= stream.ahead + 1 and first >= stream.last:
                self._streams.remove(stream)
                self._streams.append(stream)
                return self._advance(stream, last) if last > stream.last else range(0)
        self._streams.append(_Stream(last))
        return range(0)

    def _advance(self, stream: _Stream, last: int) -> range:
        stream.last = last
        stream.window = min(max(1, 2 * stream.window), self._limit)
        first = max(stream.ahead, last) + 1
        stop = min(last + 1 + stream.window, self._count)
        if stop <= first:
            return range(0)
        stream.ahead = stop - 1
        return range(first, stop)
