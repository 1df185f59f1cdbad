"""Layers fetched whole, before anything reads them: what `fallback` calls eager."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from shim import log
from shim.cache import layer as states
from shim.cache.fetch import LazyLayer
from shim.cache.transfer import Job
from shim.daemon.flights import Flights
from shim.daemon.layers import Layers
from shim.daemon.origins import Source
from shim.daemon.served import ServedLayer
from shim.daemon.trust import registry_client
from shim.errors import CacheError, DaemonError, RegistryError, ShimError, StoreError
from shim.layers.inflate import inflate_spans
from shim.registry.retry import RetryPolicy
from shim.settings import Settings

_PARALLEL = 3
_STARTS = 3  # times a stream that broke off is begun again


class Eager:
    """Fills the cache with whole layers, each by one plain GET from its start: no range, and no restart point, is
    needed for that, only the digests of the spans, by which every byte is checked as always.

    Runs in a control connection's thread and a few of its own; nearly all of it (network, inflating, hashing) releases
    the GIL. A layer is streamed once, however many trees wait for it. What came stays, if the rest fails.
    """

    def __init__(self, settings: Settings, layers: Layers) -> None:
        self._layers = layers
        self._client = registry_client(settings, policy=RetryPolicy(attempts=2))
        self._flights = Flights()

    def fill(self, names: list[str], until: float) -> None:
        """Have all of the layers' blob files in the cache by `until` (monotonic), while a tree keeps them served.

        Raises RegistryError, IntegrityError (the span table is wrong, or the bytes are), LayerError, CacheError (no
        room), DaemonError (not in time).
        """
        started = time.monotonic()
        with ThreadPoolExecutor(_PARALLEL) as pool:
            jobs = [pool.submit(self._flights.once, name, partial(self._fill, name, until)) for name in names]
            try:
                for job in jobs:
                    job.result()
            finally:
                for job in jobs:
                    job.cancel()
        log.info("layers fetched whole", layers=len(names), seconds=round(time.monotonic() - started, 2))

    def _fill(self, name: str, until: float) -> None:
        served = self._layers.served(name)
        if served is None:
            raise DaemonError(f"the layer {name[:12]} is no longer served")
        trouble: ShimError = RegistryError(f"nobody knows where layer {name[:12]} is")
        for _ in range(_STARTS):
            if self._is_whole(served):
                return
            for source in list(served.sources):
                try:
                    self._stream(served, source, until)
                    break
                except (RegistryError, StoreError) as error:
                    trouble = error
            else:
                if not (isinstance(trouble, RegistryError | StoreError) and trouble.retryable):
                    raise trouble
        if not self._is_whole(served):
            raise trouble

    def _is_whole(self, served: ServedLayer) -> bool:
        cached = served.lazy.cached
        for span in range(cached.count):
            if cached.states[span] == states.ON_DISK:
                cached.verify(span)
            if not cached.is_readable(span):
                return False
        return True

    @contextmanager
    def _open(self, source: Source, size: int) -> Iterator[Iterable[bytes]]:
        if source.archive is None:
            with self._client.open_blob(source.ref, source.digest) as stream:
                yield stream
        else:
            with source.archive.open(0, size) as chunks:
                yield chunks

    def _stream(self, served: ServedLayer, source: Source, until: float) -> None:
        lazy, spans = served.lazy, served.spans
        lazy.counters.requests += 1
        with self._open(source, spans.cstart(spans.count)) as chunks:
            for span, data in inflate_spans(spans, spans.compression, 0, _counted(lazy, chunks)):
                if time.monotonic() > until:
                    raise DaemonError("the layers were not fetched in time", hint="raise `image_deadline`")
                if not lazy.cached.is_readable(span) and not _take(lazy, span, data):
                    raise CacheError(
                        "the layer cache has no room for the whole image", hint="see `clip-shim cache clean`"
                    )


def _take(lazy: LazyLayer, span: int, data: bytes) -> bool:
    """Into the cache, and to whoever waits for it: a read may hang in a fetch of its own. False: no room."""
    kept = lazy.cached.publish(span, data)
    lazy.landed(Job(span, span + 1, {span}, ahead=True), span, data, kept)
    return kept


def _counted(lazy: LazyLayer, chunks: Iterable[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        lazy.counters.fetched_bytes += len(chunk)  # no lock: off by a few while reads are fetched too
        yield chunk
