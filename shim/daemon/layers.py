"""The layers that are served: one blob file each, shared by every image that has the layer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shim import log
from shim.cache.fetch import LazyLayer
from shim.cache.pool import FetchPool
from shim.cache.store import LayerCache, layer_name
from shim.cache.transfer import LayerStats
from shim.daemon import archives
from shim.daemon.access import Access, Held
from shim.daemon.origins import Origins, Source
from shim.daemon.profile import Recording
from shim.daemon.served import ServedLayer, Traffic
from shim.daemon.trace import Listener, WatchedBlob
from shim.daemon.trust import check_registry
from shim.errors import CacheError, ShimError
from shim.fuse.blob import Waiting
from shim.fuse.server import BlobServer
from shim.index.spanfile import SpanFile
from shim.registry.ref import ImageRef
from shim.settings import Settings


class Layers:
    """Adds layers to the blob server and takes them away when nobody uses them.

    Concurrency: `_lock` guards `_served`, what its items hold but for their LazyLayer, and `_pending`: names of layers
    that are being opened or closed, which happens without the lock, since it touches the disk and every fetch takes the
    lock; who wants such a layer waits. Taken before the locks of server, cache and LazyLayer, which never call us with
    theirs held.
    A layer without users stays while the kernel has its file open (an overlay of a running container keeps a clone of
    the EROFS mount, which keeps the file) or a fetch is under way; `sweep` looks again. Only it takes layers away.
    """

    def __init__(self, settings: Settings, server: BlobServer, on_full: Callable[[], None] | None = None) -> None:
        self._settings = settings
        self._server = server
        self._cache = LayerCache(settings.state_dir / "cache", on_full=on_full)
        self._pool = FetchPool(settings["fetch.threads"])
        self._origins = Origins(settings)
        self._access = Access(self._origins.client, settings["trust.cached"])
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._served: dict[str, ServedLayer] = {}
        self._pending: set[str] = set()
        self._gone = LayerStats("", 0)  # what layers counted that are closed

    def warm(self) -> None:
        """Import what the first fetch needs: half a second that no container should wait for."""
        import requests  # noqa: F401

    def add(self, tree: str, meta: dict[str, Any], directory: Path, archive: int | None = None) -> None:
        """Serve all layers of a prepared tree. archive: the file its layer is in, if it is an archive that came with
        the request. Raises TrustError, CacheError or IndexFormatError; then nothing was added for it."""
        ref = ImageRef.parse(meta["image"], local_paths=False)
        place = archives.source(meta, directory, archive, self._settings)
        if place is None:
            check_registry(ref.registry, self._settings["trust.registries"], ref.repository)
        try:
            for number, layer in enumerate(meta["layers"]):
                source = Source(ref, layer["digest"], archive=place)
                self.add_one(tree, number, layer, directory / f"spans.{number}", source)
        except BaseException:
            self.discard(tree)
            raise

    def confirm(self, meta: dict[str, Any], end: float) -> None:
        """Return when a tree's image may read its layers, which `add` has added; by `end` (monotonic). Raises
        RegistryError and its kinds, IntegrityError; the layers are still added then. Of archives: `confirm_archive`."""
        if "archive" in meta:
            return
        ref = ImageRef.parse(meta["image"], local_paths=False)
        with self._lock:
            found = [(self._served[layer["blob"]], layer["digest"]) for layer in meta["layers"]]
        held = [Held(served.lazy.cached, digest, served.spans.compression) for served, digest in found]
        try:
            self._access.confirm(ref, held, end)
        except ShimError:
            with self._lock:
                for served, _ in found:
                    served.sources = [source for source in served.sources if source.ref.name != ref.name]
            raise

    def confirm_archive(self, meta: dict[str, Any], directory: Path, fd: int) -> None:
        """The same for an archive, each time it is asked for: whoever has its index may not have its data."""
        place = archives.source(meta, directory, fd, self._settings)
        if place is not None:
            with self._lock:
                cached = self._served[meta["layers"][0]["blob"]].lazy.cached
            self._access.confirm_archive(cached, place)
            if not meta["archive"]:  # only what was proved is remembered
                archives.note(directory, fd)

    def release(self, tree: str) -> None:
        """A tree is no longer mounted; its layers stay until the next `sweep`."""
        with self._lock:
            for served in self._served.values():
                served.users.discard(tree)

    def add_one(self, tree: str, number: int, layer: dict[str, Any], span_path: Path, source: Source) -> None:
        """Serve layer `number` of a tree. Raises CacheError."""
        name = layer["blob"]
        with self._settled:
            self._settled.wait_for(lambda: name not in self._pending)
            served = self._served.get(name)
            if served is not None:
                served.note(tree, number, source)
                return
            self._pending.add(name)
        try:
            served = self._serve(name, layer, span_path, source)
            served.note(tree, number, source)
        finally:
            with self._settled:
                self._pending.discard(name)
                if served is not None:
                    self._served[name] = served
                self._settled.notify_all()

    def _serve(self, name: str, layer: dict[str, Any], span_path: Path, source: Source) -> ServedLayer:
        """Open a layer and show its blob. Raises CacheError (a damaged span file, no disk); nothing is left then."""

        @contextmanager
        def open_range(start: int, end: int) -> Iterator[Iterator[bytes]]:
            with self._lock:
                served = self._served.get(name)
                sources = list(served.sources) if served is not None else []
            with self._origins.open(name, sources, start, end) as chunks:
                yield chunks

        with ExitStack() as undo:
            spans = SpanFile(span_path)
            undo.callback(spans.close)
            if layer_name(layer["diff_id"], spans.identity) != name:
                raise CacheError(f"the span file {span_path} is not of the layer {name}")
            cached = self._cache.layer(layer["diff_id"], spans, spans.identity)
            undo.callback(self._cache.close_layer, cached)
            try:
                lazy = LazyLayer(
                    node_id=self._server.node_id(name.encode()),
                    name=name.encode(),
                    compression=spans.compression,
                    cached=cached,
                    open_range=open_range,
                    pool=self._pool,
                    source=source.place,
                    readahead=self._settings["fetch.readahead"],
                    read_deadline=self._settings["read_deadline"],
                )
                self._server.add(lazy)
            except OSError as error:
                raise CacheError(
                    f"cannot note the layer {name} in {self._settings.run_dir}: {error.strerror}",
                    hint="is there space left in `run_dir`?",
                ) from error
            undo.pop_all()
        return ServedLayer(lazy, spans)

    def served(self, name: str) -> ServedLayer | None:
        """A layer, for who has a tree over it; its `sources` are not to be changed."""
        with self._lock:
            return self._served.get(name)

    def cached(self, name: str, offset: int, length: int) -> bool:
        """Whether a read would be answered without the registry."""
        with self._lock:
            served = self._served.get(name)
        return served is not None and served.lazy.read_cached(offset, length) is not None

    def record(self, tree: str, meta: dict[str, Any], recording: Recording) -> None:
        """Have the recording told what is read of a tree's layers."""
        with self._lock:
            for number, layer in enumerate(meta["layers"]):
                self._served[layer["blob"]].record(tree, (recording, number))

    def end_recording(self, tree: str) -> None:
        with self._lock:
            for served in self._served.values():
                served.record(tree, None)

    def of(self, meta: dict[str, Any]) -> list[LazyLayer]:
        """The layers of a tree that has been added, in its order."""
        with self._lock:
            return [self._served[layer["blob"]].lazy for layer in meta["layers"]]

    def discard(self, tree: str) -> None:
        """A tree is no longer mounted: its layers go when the kernel has closed them (`sweep`)."""
        self.release(tree)
        self.sweep()

    def sweep(self) -> None:
        """Take away the layers that nobody uses. A source outlives its tree as long as anybody reads the layer."""
        gone = {}
        with self._lock:
            for name, served in list(self._served.items()):
                idle = not served.users and not served.holds and not served.lazy.is_busy
                if idle and self._take_away(served.lazy.node_id):
                    gone[name] = self._served.pop(name)
                    self._pending.add(name)
        for name, served in gone.items():
            try:
                served.lazy.close()
                with self._lock:
                    self._gone = _sum(self._gone, served.lazy)
                self._cache.close_layer(served.lazy.cached)
                served.spans.close()
                served.sources = []  # an archive's file is closed with them
                log.debug("layer no longer served", layer=name)
            except Exception:  # noqa: BLE001  the others are still to be closed, and nobody may wait for this one
                log.exception("a layer could not be closed", layer=name)
            finally:
                with self._settled:
                    self._pending.discard(name)
                    self._settled.notify_all()

    def _take_away(self, node_id: int) -> bool:
        try:
            return self._server.remove(node_id)
        except OSError as error:  # it is gone from the server; only the journal could not say so
            log.error("the journal of blobs cannot be written", error=str(error))
            return True

    def places(self, name: str) -> tuple[list[tuple[str, int]], list[str], list[str]]:
        """For messages about a blob: (hex of an index that has the layer, its number there), the latest first; the
        registries it comes from; images that have it, the latest first."""
        with self._lock:
            served = self._served.get(name)
            if served is None:
                return [], [], []
            sources = served.sources
            registries = sorted({source.place for source in sources})
            return list(reversed(served.places.items())), registries, [str(s.ref) for s in reversed(sources)]

    def watch(self, names: list[str], listener: Listener) -> None:
        """Tell `listener` of every read of these layers, until `unwatch`."""
        with self._lock:
            for name in names:
                served = self._served.get(name)
                if served is not None:
                    served.watched = served.watched or WatchedBlob(served.lazy)
                    served.watched.watchers += (listener,)
                    self._server.substitute(served.watched)

    def unwatch(self, names: list[str], listener: Listener) -> None:
        with self._lock:
            for name in names:
                served = self._served.get(name)
                if served is not None and served.watched is not None:
                    left = tuple(other for other in served.watched.watchers if other != listener)
                    served.watched.watchers = left
                    if not left:
                        served.watched = None
                        self._server.substitute(served.lazy)

    def traffic_by_layer(self, names: list[str] | None = None) -> dict[str, Traffic]:
        """What each layer (of `names`) has fetched since it was opened."""
        with self._lock:
            lazies = {n: s.lazy.counters for n, s in self._served.items() if names is None or n in names}
        return {
            name: Traffic(stats.fetched_bytes, stats.requests, stats.demand_bytes, stats.ahead_bytes)
            for name, stats in lazies.items()
        }

    def waiting(self) -> list[Waiting]:
        """The reads that wait for a registry, oldest first."""
        return self._server.waiting()

    def open_count(self) -> int:
        """How many layers the kernel has open."""
        with self._lock:
            return sum(self._server.open_count(served.lazy.node_id) > 0 for served in self._served.values())

    def status(self) -> list[dict[str, Any]]:
        """The layers as `status --json` shows them."""
        with self._lock:
            return [
                {
                    **asdict(item.lazy.stats()),
                    "blob": name,
                    "open": self._server.open_count(item.lazy.node_id),
                    "images": len(item.users),
                }
                for name, item in self._served.items()
            ]

    def totals(self) -> LayerStats:
        """All layers' counters together, since the daemon's start; without sizes."""
        with self._lock:
            total = self._gone
            for served in self._served.values():
                total = _sum(total, served.lazy)
        return total

    def busy_count(self) -> int:
        """Layers that fetch."""
        with self._lock:
            lazies = [served.lazy for served in self._served.values()]
        return sum(lazy.is_busy for lazy in lazies)

    def served_count(self) -> int:
        return len(self._served)

    @property
    def cache(self) -> LayerCache:
        """The layers on disk."""
        return self._cache

    @contextmanager
    def held(self, name: str) -> Iterator[ServedLayer | None]:
        """A layer that is served, and stays so meanwhile; None if it is not."""
        with self._lock:
            served = self._served.get(name)
            if served is not None:
                served.holds += 1
        try:
            yield served
        finally:
            if served is not None:
                with self._lock:
                    served.holds -= 1

    def traffic(self) -> dict[str, Any]:
        """Requests and bytes from registries since the start, by host and kind."""
        return self._origins.traffic()

    def close(self) -> None:
        """The server has stopped reading: flush the cache and let go of it."""
        self._pool.close()
        self._cache.close()
        self._origins.close()


def _sum(total: LayerStats, lazy: LazyLayer) -> LayerStats:
    """Counters and those of one more layer, added up."""
    more = lazy.counters
    names = ("fetched_bytes", "requests", "demand", "readahead", "misses", "failures", "demand_bytes", "ahead_bytes")
    added = {name: getattr(total, name) + getattr(more, name) for name in names}
    return LayerStats("", 0, hits=total.hits + max(0, lazy.cached.uses - more.misses), **added)
