"""Threads that fetch: a shared number of them, and always one for a layer that has none."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from shim import log

_IDLE_SECONDS = 20.0
EXTRA = 24


@dataclass(slots=True)
class _Queue:
    """One key's jobs: what somebody waits for goes before what somebody may want."""

    urgent: deque[Callable[[], None]] = field(default_factory=deque)
    later: deque[Callable[[], None]] = field(default_factory=deque)
    running: int = 0

    def __bool__(self) -> bool:
        return bool(self.urgent or self.later)

    def pop(self) -> Callable[[], None]:
        return self.urgent.popleft() if self.urgent else self.later.popleft()


class Workers:
    """Runs jobs, each under a key (a layer), in at most `threads` threads; a key none of whose jobs runs may take one
    more, up to `extra` beyond: a layer whose registry does not answer can hold every shared thread, and still never
    keeps another layer from fetching. Keys take turns.

    Threads are started when needed and end after 20 idle seconds. One lock, held for queue work only.
    """

    def __init__(self, threads: int, *, extra: int = EXTRA, name: str = "fetch") -> None:
        self._threads = max(1, threads)
        self._extra = extra
        self._name = name
        self._wake = threading.Condition()
        self._queues: OrderedDict[Hashable, _Queue] = OrderedDict()
        self._running = 0
        self._idle = 0
        self._count = 0
        self._closed = False

    def submit(self, key: Hashable, job: Callable[[], None], *, urgent: bool = True) -> bool:
        """Queue a job; False after `close`. A job handles its own errors: what it raises is logged as a defect."""
        with self._wake:
            if self._closed:
                return False
            queue = self._queues.setdefault(key, _Queue())
            (queue.urgent if urgent else queue.later).append(job)
            self._call_worker()
            return True

    def close(self) -> None:
        """Take no more jobs and drop the queued ones. Running ones go on; their threads end after them."""
        with self._wake:
            self._closed = True
            self._queues.clear()
            self._wake.notify_all()

    def _call_worker(self) -> None:
        """Wake or start one thread, if there is a job that may begin. Whoever takes a job calls again: two jobs that
        came while one idle thread was waking up need two threads."""
        if self._next() is None:
            return
        if self._idle:
            self._wake.notify()
        else:
            self._count += 1
            threading.Thread(target=self._work, name=f"{self._name}-{self._count}", daemon=True).start()

    def _startable(self, queue: _Queue) -> bool:
        if not queue:
            return False
        return self._running < self._threads or (not queue.running and self._running < self._threads + self._extra)

    def _next(self) -> tuple[Hashable, _Queue] | None:
        return next(((key, queue) for key, queue in self._queues.items() if self._startable(queue)), None)

    def _work(self) -> None:
        while True:
            with self._wake:
                while (found := self._next()) is None:
                    if self._closed:
                        return
                    self._idle += 1
                    woken = self._wake.wait(_IDLE_SECONDS)
                    self._idle -= 1
                    if not woken and self._next() is None:
                        return
                key, queue = found
                self._queues.move_to_end(key)
                job = queue.pop()
                queue.running += 1
                self._running += 1
                self._call_worker()
            try:
                job()
            except Exception:  # noqa: BLE001 - a defect in one job must not cost a thread
                log.exception("a fetch job failed unexpectedly")
            del job
            with self._wake:
                queue.running -= 1
                self._running -= 1
                if not queue and not queue.running and self._queues.get(key) is queue:
                    del self._queues[key]


class FetchPool:
    """The threads that all layers share. `remote`: may wait for registries; `local`: only for the disk and the CPU."""

    def __init__(self, threads: int) -> None:
        self.remote = Workers(threads, name="fetch")
        self.local = Workers(2, extra=0, name="local")

    def close(self) -> None:
        """Take no more jobs; running ones end by themselves."""
        self.remote.close()
        self.local.close()
