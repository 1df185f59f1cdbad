"""A deadline for sockets: a read timeout alone never fires for a peer that drips a byte now and then.

One thread for the process, started with the first watch; when a watch's time is over its socket is shut down, and
whoever is blocked in it gets end-of-file at once.
"""

from __future__ import annotations

import heapq
import itertools
import os
import socket
import threading
import time
from dataclasses import dataclass, field


@dataclass(order=True, slots=True)
class Watch:
    """One socket under watch. `expired` is true once its time was over."""

    at: float
    order: int
    sock: socket.socket | None = field(compare=False)
    expired: bool = field(default=False, compare=False)


class Watchdog:
    """Thread-safe. `add` costs a lock and a heap push; nothing polls."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._heap: list[Watch] = []
        self._order = itertools.count()
        self._running = False
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        """In a forked child: the thread is gone, its lock may be held for ever, the sockets are the parent's."""
        self._wake = threading.Condition()
        self._heap = []
        self._running = False

    def add(self, sock: socket.socket, seconds: float) -> Watch:
        """Shut `sock` down after `seconds` unless `cancel` comes first."""
        watch = Watch(time.monotonic() + max(0.0, seconds), next(self._order), sock)
        with self._wake:
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="registry-watchdog", daemon=True).start()
            heapq.heappush(self._heap, watch)
            if self._heap[0] is watch:
                self._wake.notify()
        return watch

    def cancel(self, watch: Watch) -> None:
        """End a watch; the entry is dropped when its time comes, or when many such have gathered."""
        with self._wake:
            watch.sock = None
            if len(self._heap) > 256 and sum(w.sock is None for w in self._heap) > len(self._heap) // 2:
                self._heap = [w for w in self._heap if w.sock is not None]
                heapq.heapify(self._heap)

    def _run(self) -> None:
        with self._wake:
            while True:
                wait = self._heap[0].at - time.monotonic() if self._heap else None
                if wait is None or wait > 0:
                    self._wake.wait(wait)
                    continue
                watch = heapq.heappop(self._heap)
                if watch.sock is None:
                    continue
                watch.expired = True
                try:
                    # not SSLSocket.shutdown: that one forgets the TLS object another thread is reading from
                    socket.socket.shutdown(watch.sock, socket.SHUT_RDWR)
                except OSError:
                    pass  # closed already
                watch.sock = None
