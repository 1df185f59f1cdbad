"""Carrying out one fetch: the request, the verified spans, and what happens when it fails."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from shim import log
from shim.cache.faultpoint import fault
from shim.cache.layer import CachedLayer
from shim.cache.ranges import Feed, pieces_of, ranges_of
from shim.errors import DaemonError, IntegrityError, LayerError, RegistryError, ShimError, StoreError
from shim.fuse.blob import Done
from shim.index.model import Compression
from shim.layers.inflate import inflate_spans

# called with the size of each chunk that came, and how to see whether somebody waits; returns when the next may come
Pace = Callable[[int, Callable[[], bool]], None]
OpenRange = Callable[[int, int], AbstractContextManager[Iterable[bytes]]]

_PAUSES = (0.1, 5.0)  # seconds between attempts: the first, doubling, and the longest
_LONG_PAUSES = (1.0, 15.0)  # the same for refusals and wrong bytes: asking often may lock an account
_WRONG = (IntegrityError, LayerError)


@dataclass(slots=True, eq=False)
class Waiter:
    """A read that waits. `missing`: spans not there yet; `pieces`: bytes of spans that could not be kept anywhere."""

    offset: int
    size: int
    done: Done
    deadline: float
    missing: set[int] = field(default_factory=set)
    pieces: dict[int, bytes] = field(default_factory=dict)
    tries: int = 0

    def collect(self, cached: CachedLayer) -> bytes | None:
        """The bytes of a read that lacks nothing; None if some were taken away meanwhile."""
        if not self.pieces:
            return cached.read(self.offset, self.size)
        end = self.offset + self.size
        parts = []
        for span in cached.span_range(self.offset, self.size):
            low = max(self.offset, cached.spans.ustart(span))
            part = self.pieces.get(span)
            if part is None:
                part = cached.read(low, min(end, cached.spans.ustart(span + 1)) - low)
            if part is None:
                return None
            parts.append(part)
        return b"".join(parts).ljust(self.size, b"\0")  # the padding of the last block


@dataclass(slots=True)
class LayerStats:
    """Counters since the layer was opened. Bytes: `size` and `cached_bytes` uncompressed, `fetched_bytes` compressed.

    `demand` and `readahead` count spans fetched because somebody waited for their run, or was expected to; the bytes of
    both are uncompressed.
    """

    diff_id: str
    size: int
    cached_bytes: int = 0
    fetched_bytes: int = 0
    requests: int = 0
    demand: int = 0
    readahead: int = 0
    hits: int = 0
    misses: int = 0
    failures: int = 0
    demand_bytes: int = 0
    ahead_bytes: int = 0


@dataclass(slots=True, eq=False)
class Job:
    """One stretch [first, stop) of whole runs to get in one request. `left`: spans of it that are this job's to get."""

    first: int
    stop: int
    left: set[int]
    ahead: bool  # nobody waited when it was made
    local: bool = False  # hashes what is on disk; fetches nothing
    marks: set[int] = field(default_factory=set)  # spans whose first reader asks for more
    pace: Pace | None = None  # for background work
    error: str = ""  # why it gave spans up


class Board(Protocol):
    """Who waits for spans: implemented by LazyLayer. All calls come from pool threads, without locks."""

    def landed(self, job: Job, span: int, data: bytes, kept: bool) -> None:
        """A span was verified and given to the cache; kept: it can be read there."""

    def failed(self, job: Job, error: ShimError, spans: Iterable[int]) -> None:
        """The job gives these spans up."""

    def patience(self, job: Job) -> float:
        """The latest deadline of those who wait for what is left of the job; 0 if nobody does."""


class Transfer:
    """Runs a layer's jobs, any number at once. `lock` guards `stats` and `error`, the last error since bytes came."""

    def __init__(
        self,
        cached: CachedLayer,
        compression: Compression,
        open_range: OpenRange,
        source: str,
        board: Board,
        *,
        lock: threading.Lock,
        closed: threading.Event,
        clock: Callable[[], float],
        pause: Callable[[float], object],
    ) -> None:
        self.stats = LayerStats(cached.diff_id, cached.length)
        self.error = ""
        self._cached = cached
        self._spans = cached.spans
        self._compression = compression
        self._open_range = open_range
        self._source = source
        self._board = board
        self._lock = lock
        self._closed = closed
        self._clock = clock
        self._pause = pause

    def count(self, size: int, ahead: bool) -> None:
        """One span of `size` bytes came; the caller has the lock."""
        stats = self.stats
        if ahead:
            stats.readahead += 1
            stats.ahead_bytes += size
        else:
            stats.demand += 1
            stats.demand_bytes += size

    def run(self, job: Job) -> None:
        """Get a job's spans, trying again as LazyLayer describes. Ends with nothing left in the job."""
        todo = deque([(job.first, job.stop)])  # a run with wrong bytes is put behind what waits for others
        failures, suspect = 0, -1
        while todo and not self._closed.is_set():
            position, stop = todo.popleft()
            before = len(job.left)
            try:
                self._stream(job, position, stop)
                continue
            except ShimError as caught:
                error = caught
            except Exception as caught:  # noqa: BLE001 - whatever it is, waiters must hear of it
                log.exception("fetching a layer failed unexpectedly", layer=self._cached.diff_id)
                error = DaemonError(f"fetching failed: {caught}")
            with self._lock:
                self.error = str(error)
                self.stats.failures += 1
            left = [span for span in job.left if position <= span < stop]
            if not left:
                continue
            position = self._spans.restart(min(left))
            failures = 1 if len(job.left) < before else failures + 1
            end = self._spans.run_end(position) if isinstance(error, _WRONG) else stop
            if end < stop and suspect == position:
                todo.extend([(end, stop), (position, end)])
            elif (isinstance(error, _WRONG) and suspect != position) or self._worth_retrying(job, error, failures):
                todo.appendleft((position, stop))
            else:
                self._give_up(job, error, position, end)
                todo.append((end, stop))
            suspect = position
        self._board.failed(job, DaemonError("the daemon is stopping"), list(job.left))

    def _give_up(self, job: Job, error: ShimError, first: int, stop: int) -> None:
        if isinstance(error, _WRONG):
            log.error("a layer's bytes are wrong", layer=self._cached.diff_id, source=self._source, error=str(error))
        job.error = str(error)
        self._board.failed(job, error, [span for span in job.left if first <= span < stop])

    def _worth_retrying(self, job: Job, error: ShimError, failures: int) -> bool:
        """Pause before the next attempt, if there is time for one."""
        if not isinstance(error, (RegistryError, StoreError, *_WRONG)):
            return False
        passing = isinstance(error, RegistryError | StoreError) and error.retryable
        first, longest = _PAUSES if passing else _LONG_PAUSES
        left = self._board.patience(job) - self._clock()
        if left <= first:
            return False
        self._pause(min(first * 2 ** min(failures - 1, 10), longest, 0.75 * left))  # and time for the attempt itself
        return True

    def _stream(self, job: Job, first: int, stop: int) -> None:
        """One request for [first, stop), span by span into the cache."""
        pieces = pieces_of(self._spans, [span for span in job.left if first <= span < stop])
        if not pieces:
            return
        fault("fetch.open")
        with ExitStack() as stack:
            parts: list[Iterator[bytes]] = []

            def chunks() -> Iterator[bytes]:
                for low, high in ranges_of(self._spans, pieces):
                    with self._lock:
                        self.stats.requests += 1
                    parts.append(self._counted(job, stack.enter_context(self._open_range(low, high))))
                    yield from parts[-1]

            feed = Feed(chunks(), self._spans.cstart(pieces[0][0]))
            for begin, end in pieces:
                stream = feed.at(self._spans.cstart(begin))
                for span, data in inflate_spans(self._spans, self._compression, begin, stream, end):
                    if self._closed.is_set():
                        return
                    if span in job.left:
                        self._board.landed(job, span, data, self._cached.publish(span, data))
            for _ in parts[-1]:  # a connection whose answer was read to its end can be used again
                pass

    def _counted(self, job: Job, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            with self._lock:
                self.stats.fetched_bytes += len(chunk)
                self.error = ""
            yield chunk
            if job.pace is not None:
                job.pace(len(chunk), lambda: self._board.patience(job) > 0)
