"""Spans that could not be written to disk, kept in memory: least recently used first out, bounded for all layers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

Evict = Callable[[int], None]


class MemorySpans:
    """Verified spans by (layer, span). `limit` in bytes; one span larger than that is not kept. Thread-safe.

    When a span is pushed out, its layer's `evict(span)` is called under this class's lock, so it must take no lock.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._spans: OrderedDict[tuple[int, int], tuple[bytes, Evict]] = OrderedDict()
        self._bytes = 0

    def put(self, layer: object, span: int, data: bytes, evict: Evict) -> bool:
        """Keep a span; False if it is too large."""
        if len(data) > self.limit:
            return False
        with self._lock:
            self._pop((id(layer), span))
            self._spans[id(layer), span] = (data, evict)
            self._bytes += len(data)
            while self._bytes > self.limit:
                oldest = next(iter(self._spans))
                dropped = self._pop(oldest)
                if dropped is not None:
                    dropped[1](oldest[1])
        return True

    def get(self, layer: object, span: int) -> bytes | None:
        with self._lock:
            found = self._spans.get((id(layer), span))
            if found is None:
                return None
            self._spans.move_to_end((id(layer), span))
            return found[0]

    def discard(self, layer: object, span: int | None = None) -> None:
        """Forget one span of a layer, or all of them, without telling it."""
        with self._lock:
            keys = [(id(layer), span)] if span is not None else [key for key in self._spans if key[0] == id(layer)]
            for key in keys:
                self._pop(key)

    @property
    def used(self) -> int:
        """Bytes kept now."""
        return self._bytes

    def _pop(self, key: tuple[int, int]) -> tuple[bytes, Evict] | None:
        found = self._spans.pop(key, None)
        if found is not None:
            self._bytes -= len(found[0])
        return found
