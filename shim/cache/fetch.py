"""A layer as a blob file: cached spans at once, missing ones fetched once, whoever asks for them."""

from __future__ import annotations

import threading
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from shim import log
from shim.cache import layer as states
from shim.cache.faultpoint import fault
from shim.cache.layer import CachedLayer
from shim.cache.neighbours import Neighbours
from shim.cache.pool import FetchPool
from shim.cache.readahead import Readahead
from shim.cache.transfer import Job, LayerStats, OpenRange, Pace, Transfer, Waiter
from shim.errors import CacheError, DaemonError, ShimError
from shim.fuse.blob import Buffer, Done
from shim.index.model import Compression, Restart

READAHEAD_BYTES = 8 << 20
_JOB_BYTES = 32 << 20  # a queued job is not extended beyond this; a run without restart points may be longer
_TRIES = 4  # times a read starts over because its spans were taken away before it saw them


class LazyLayer:
    """One layer, read lazily: implements `fuse.blob.Blob` over a CachedLayer and a source of compressed bytes.

    open_range(start, end): a context manager that gives the compressed bytes [start, end) in chunks; it raises
    RegistryError (and so may its iterator). source: the host's name, for messages.

    The unit of fetching is the *run*: a restart point and the CONTINUE spans behind it. A job gets a stretch of runs
    with one request and publishes each span as soon as it is verified; a layer without restart points is one run, and
    its readers wait for the stream to come by.

    Who may do what
        `stamp`, `epoch`, `data_fd`   the cache's own, no lock: this is the hot path.
        `_lock`     guards `_flights` (span → the job that will answer for it), `_waiters` (span → reads that need it),
                    queued jobs, read-ahead and counters. Never held over I/O, `done` or a cache call that writes.
        jobs        run in the pools' threads: `remote` for fetching, `local` for hashing what is on disk already, so
                    that a stalled registry never keeps spans waiting that are here.
    Rules
        - A span is in `_flights` at most once: two readers of one span make one fetch. It leaves `_flights` under
          the lock together with its waiters, after it was published, so a reader either sees the span or is told.
        - A job that waits for a thread may still grow (a span right behind it joins it); one that began does not.
        - A read that has gone (deadline, SIGKILL) cancels nothing.
        - A registry's error, also a refusal, is retried with growing pauses for as long as a waiter's deadline allows:
          credentials come back, replicas catch up. Then every waiter of the job's remaining spans gets it, and the next
          read begins anew. Read-ahead that fails is given up at once.
        - Bytes that do not hash right are fetched again at once, then after what is behind them, then with pauses; in
          the end only their run's waiters get the error.
        - `done` is called exactly once, without locks, from a pool thread.
    Memory: a job holds one span and one chunk; spans go to the cache at once, and nothing is queued behind it.
    """

    def __init__(
        self,
        *,
        node_id: int,
        name: bytes,
        compression: Compression,
        cached: CachedLayer,
        open_range: OpenRange,
        pool: FetchPool,
        source: str = "",
        readahead: int = READAHEAD_BYTES,
        read_deadline: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        """readahead: uncompressed bytes, at most. clock and pause(seconds): replaced by tests."""
        self.node_id = node_id
        self.name = name
        self.size = cached.size
        self.stamp = cached.stamp
        self.cached = cached
        self.spans = self._spans = cached.spans
        self._pool = pool
        self._on_touch: Callable[[range], object] | None = None
        self._source = source
        self._read_deadline = read_deadline
        self._clock = clock
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._fetching = 0  # jobs that run
        self._using = 0  # threads that read the data file; `close` waits for them
        self._flights: dict[int, Job] = {}
        self._waiters: dict[int, list[Waiter]] = {}
        self._queued: list[Job] = []
        spans = cached.spans
        self._runs = array("Q", (i for i in range(cached.count) if spans.kind(i) != Restart.CONTINUE))
        average = max(1, cached.length // max(1, len(self._runs)))
        self._readahead = Readahead(len(self._runs), readahead // average)
        self._neighbours = Neighbours(len(self._runs) if readahead else 0)
        self._transfer = Transfer(
            cached,
            compression,
            open_range,
            source,
            self,
            lock=self._lock,
            closed=self._closed,
            clock=clock,
            pause=pause or self._closed.wait,
        )

    # Blob

    @property
    def data_fd(self) -> int:
        return self.cached.data_fd

    @property
    def epoch(self) -> int:
        return self.cached.epoch

    def read_cached(self, offset: int, size: int) -> Buffer | None:
        """Bytes at hand, also those in memory; where the reader passes a mark, what follows is fetched ahead."""
        cache = self.cached
        spans = cache.span_range(offset, size)
        if not all(cache.is_readable(span) for span in spans):
            return None
        for span in spans:
            if cache.states[span] == states.MARKED and cache.unmark(span):
                self._touched(spans)
                with self._lock:
                    self._fetch_ahead(spans)
        with self._use() as usable:
            return cache.read(offset, size) if usable else None

    def read_missing(self, offset: int, size: int, done: Done) -> None:
        waiter = Waiter(offset, size, done, self._clock() + self._read_deadline)
        with self._lock:
            self._transfer.stats.misses += 1
            ready = self._attend(waiter)
        self._touched(self.cached.span_range(offset, size))
        if ready and not self._pool.local.submit(self, lambda: self._deliver(waiter)):
            done(DaemonError("the daemon is stopping"))

    def fetch_ahead(self, spans: Iterable[int], pace: Pace | None = None) -> Job | None:
        """Fetch what is missing of `spans` with one request, in this thread; what is there, or coming, is left alone.

        Returns when they are there or have failed, which nobody hears of who does not wait for them: see the job's
        `error`. None: there was nothing to do.
        """
        with self._lock:
            mine = {i for i in spans if i not in self._flights and self.cached.states[i] == states.ABSENT}
            if not mine or self._closed.is_set():
                return None
            job = Job(self._spans.restart(min(mine)), max(mine) + 1, mine, ahead=True, pace=pace)
            self._flights.update(dict.fromkeys(mine, job))
        self._fetch(job)
        return job

    def listen(self, on_touch: Callable[[range], object] | None) -> None:
        """From now on call `on_touch` with the spans of first reads (and some others): any thread; it must be quick."""
        self._on_touch = on_touch
        self.cached.fresh = states.VERIFIED if on_touch is None else states.MARKED

    def _touched(self, spans: range) -> None:
        if self._on_touch is not None:
            self._on_touch(spans)

    @property
    def is_busy(self) -> bool:
        """Whether a fetch runs or is to come: it reads the span table, so this is no time to close that."""
        with self._lock:
            return bool(self._flights or self._fetching)

    def trouble(self) -> str:
        """What holds reads up: the source and the last error, "" when nothing waits or everything moves."""
        with self._lock:
            if not self._waiters:
                return ""
            return f"{self._source or 'the registry'}: {self._transfer.error or 'no bytes came yet'}"

    @property
    def counters(self) -> LayerStats:
        """The counters as they are, without `cached_bytes` and `hits`."""
        return self._transfer.stats

    def stats(self) -> LayerStats:
        """A copy of the counters. `hits` is counted without a lock, so it may be off by a few."""
        with self._lock:
            copy = replace(self._transfer.stats)
        copy.cached_bytes = self.cached.cached_bytes
        copy.hits = max(0, self.cached.uses - copy.misses)
        return copy

    def close(self) -> None:
        """Answer every waiter with an error and start nothing more; running transfers end by themselves.

        Only when the server has removed the blob or stopped. The CachedLayer may be closed afterwards.
        """
        with self._idle:
            self._closed.set()
            waiters = {id(w): w for group in self._waiters.values() for w in group}.values()
            self._waiters.clear()
            self._flights.clear()
            self._queued.clear()
            while self._using:
                self._idle.wait()
        for waiter in waiters:
            self._answer(waiter, DaemonError("the daemon is stopping"))

    # Planning. All under `_lock`.

    def _attend(self, waiter: Waiter) -> bool:
        """Register a waiter for what it lacks and see that it comes. True: it lacks nothing."""
        spans = self.cached.span_range(waiter.offset, waiter.size)
        lacking = [span for span in spans if not self.cached.is_readable(span) and span not in waiter.pieces]
        if self._closed.is_set():
            return True  # `_deliver` says so
        waiter.missing = set(lacking)
        for span in lacking:
            self._waiters.setdefault(span, []).append(waiter)
        self._launch(lacking, ahead=False)
        self._fetch_ahead(spans)
        return not lacking

    def _fetch_ahead(self, spans: range) -> None:
        runs = self._runs
        for run in range(bisect_right(runs, spans[0]) - 1, bisect_right(runs, spans[-1])):
            for guess in self._neighbours.read(run):
                self._guess(guess)
        more = self._readahead.seen(bisect_right(runs, spans[0]) - 1, bisect_right(runs, spans[-1]) - 1)
        if more and not self._closed.is_set():
            stop = runs[more.stop] if more.stop < len(runs) else self.cached.count
            self._launch(range(runs[more.start], stop), ahead=True)

    def _guess(self, run: int) -> None:
        """Fetch a whole run that nobody asked for yet, and have its readers seen (see Neighbours)."""
        first = self._runs[run]
        stop = self._spans.run_end(first)
        spans = range(first, stop)
        if self._closed.is_set() or any(i in self._flights or self.cached.states[i] != states.ABSENT for i in spans):
            self._neighbours.dropped(run)
            return
        self._launch_run(first, ahead=True, join=True)
        self._flights[first].marks.update(spans)

    def _launch(self, wanted: Sequence[int], *, ahead: bool) -> None:
        """Start or extend jobs for spans that are neither here nor coming."""
        for span in wanted:
            state = self.cached.states[span]
            if span in self._flights:
                continue
            if state == states.ON_DISK:
                job = self._flights[span] = Job(span, span + 1, {span}, ahead, local=True)
                self._pool.local.submit(self, partial(self._check, job), urgent=not ahead)
            elif state == states.ABSENT:
                self._launch_run(span, ahead)
        if ahead and wanted:  # the first of these is where the reader is seen next
            flight = self._flights.get(wanted[0])
            if flight is None:
                self.cached.mark(wanted[0], wait=False)
            elif wanted[0] not in self._waiters:
                flight.marks.add(wanted[0])

    def _launch_run(self, span: int, ahead: bool, join: bool = False) -> None:
        """join: also behind a job that somebody waits for: it answers them first, and one request is enough."""
        start, stop = self._spans.restart(span), self._spans.run_end(span)
        mine = {i for i in range(start, stop) if i not in self._flights and self.cached.states[i] == states.ABSENT}
        for queued in self._queued:
            length = self._spans.ustart(stop) - self._spans.ustart(queued.first)
            if queued.stop == start and (queued.ahead == ahead or join) and length <= _JOB_BYTES:
                job = queued
                job.stop = stop
                job.left |= mine
                break
        else:
            job = Job(start, stop, mine, ahead)
            self._queued.append(job)
            self._pool.remote.submit(self, partial(self._fetch, job), urgent=not ahead)
        for i in mine:
            self._flights[i] = job

    # Jobs. In pool threads, without `_lock` unless it says so.

    def _fetch(self, job: Job) -> None:
        with self._lock:
            if job in self._queued:
                self._queued.remove(job)
            self._fetching += 1
        try:
            self._transfer.run(job)
        finally:
            with self._lock:
                self._fetching -= 1

    def _check(self, job: Job) -> None:
        """Hash a span that a former process left; fetch it if it is not what it should be."""
        span = job.first
        with self._use() as usable:
            good = usable and self.cached.verify(span)
        if good:
            self.landed(job, span, b"", True)
            return
        with self._lock:
            self._flights.pop(span, None)
            if not self._closed.is_set():
                self._launch([span], ahead=job.ahead and span not in self._waiters)

    def landed(self, job: Job, span: int, data: bytes, kept: bool) -> None:
        """Board: whoever waited for the span and lacks nothing else is answered now."""
        ready = []
        with self._lock:
            job.left.discard(span)
            if self._flights.get(span) is job:
                del self._flights[span]
            waiters = self._waiters.pop(span, [])
            if not job.local:
                ahead = (job.ahead or span in job.marks) and not waiters
                self._transfer.count(self.cached.span_length(span), ahead)
            volatile = not kept or self.cached.states[span] == states.IN_MEMORY  # may be pushed out before it is read
            for waiter in waiters:
                waiter.missing.discard(span)
                if volatile or waiter.tries:  # the cleaner took it away once: not again
                    low = self._spans.ustart(span)
                    waiter.pieces[span] = data[max(0, waiter.offset - low) : waiter.offset + waiter.size - low]
                if not waiter.missing:
                    ready.append(waiter)
        if waiters:
            self.cached.unmark(span)  # they were heard
        elif span in job.marks or (job.local and self._on_touch is not None):
            self.cached.mark(span)
        for waiter in ready:
            self._deliver(waiter)

    def failed(self, job: Job, error: ShimError, spans: Iterable[int]) -> None:
        """Board: the spans' waiters get the error, the next read of them begins anew."""
        fault("fetch.failed")
        with self._lock:
            waiters: dict[int, Waiter] = {}
            for span in spans:
                job.left.discard(span)
                if self._flights.get(span) is job:
                    del self._flights[span]
                waiters |= {id(waiter): waiter for waiter in self._waiters.pop(span, [])}
            for waiter in waiters.values():
                for span in waiter.missing:
                    others = self._waiters.get(span)
                    if others is not None and waiter in others:
                        others.remove(waiter)
                        if not others:
                            del self._waiters[span]
        for waiter in waiters.values():
            self._answer(waiter, error)

    def patience(self, job: Job) -> float:
        """Board: how long somebody waits for what the job has left."""
        with self._lock:
            return max((w.deadline for span in job.left for w in self._waiters.get(span, ())), default=0.0)

    # Answering

    def _deliver(self, waiter: Waiter) -> None:
        """Answer a waiter that lacks nothing; start over if the cleaner was faster."""
        with self._use() as usable:
            data = waiter.collect(self.cached) if usable else None
        if data is not None:
            self._answer(waiter, data)
            return
        waiter.tries += 1
        if self._closed.is_set():
            self._answer(waiter, DaemonError("the daemon is stopping"))
        elif waiter.tries >= _TRIES:
            self._answer(waiter, CacheError("the layer cache loses spans as fast as they are fetched"))
        else:
            with self._lock:
                ready = self._attend(waiter)
            if ready and not self._pool.local.submit(self, lambda: self._deliver(waiter)):
                self._answer(waiter, DaemonError("the daemon is stopping"))

    def _answer(self, waiter: Waiter, result: Buffer | ShimError) -> None:
        try:
            waiter.done(result)
        except Exception:  # noqa: BLE001 - the reader's trouble is not the layer's
            log.exception("a read could not be answered", layer=self.cached.diff_id)

    @contextmanager
    def _use(self) -> Iterator[bool]:
        """While inside, `close` waits: the data file stays open. False: it is closed, or about to be."""
        with self._lock:
            usable = not self._closed.is_set()
            self._using += usable
        try:
            yield usable
        finally:
            if usable:
                with self._idle:
                    self._using -= 1
                    if not self._using:
                        self._idle.notify_all()
