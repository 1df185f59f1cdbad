"""The layers that are served: one blob file each, shared by every image that has the layer."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shim import log
from shim.cache.fetch import LazyLayer
from shim.cache.pool import FetchPool
from shim.cache.store import LayerCache
from shim.errors import IntegrityError, RegistryError, ShimError, TrustError
from shim.fuse.server import BlobServer
from shim.index.model import Compression
from shim.index.spanfile import SpanFile
from shim.registry.client import RegistryClient
from shim.registry.credentials import CredentialStore
from shim.registry.hooks import Hooks
from shim.registry.ref import ImageRef
from shim.registry.retry import RetryPolicy
from shim.settings import Settings

_IMPATIENT_SECONDS = 4.0


@dataclass(slots=True)
class Source:
    """Where a layer's compressed bytes can be had: an image's repository, and the blob's digest there.

    failed: when it last did (monotonic), 0 for never.
    """

    ref: ImageRef
    digest: str
    failed: float = 0.0


@dataclass(slots=True)
class ServedLayer:
    """A blob file. `users`: hexes of the mounted trees over it. `sources`: the repositories of all trees it served."""

    lazy: LazyLayer
    spans: SpanFile
    users: set[str] = field(default_factory=set)
    sources: list[Source] = field(default_factory=list)


class Layers:
    """Adds layers to the blob server and takes them away when nobody uses them.

    Concurrency: `_lock` guards `_served`, `users` and `sources`. A layer without users stays while the kernel has its
    file open (an overlay of a running container keeps a clone of the EROFS mount, which keeps the file); `sweep` looks
    again. Only `sweep` and `close` take layers away.
    """

    def __init__(self, settings: Settings, server: BlobServer) -> None:
        self._settings = settings
        self._server = server
        self._cache = LayerCache(settings.state_dir / "cache")
        self._pool = FetchPool(settings["fetch.threads"])
        hooks = Hooks()
        credentials = CredentialStore(hooks=hooks)
        pool_size = settings["fetch.threads"] * 2
        self._client = RegistryClient(settings["registries"], hooks=hooks, credentials=credentials, pool_size=pool_size)
        # for a layer that another repository has too: a host that hangs is left after seconds, not after half a minute
        self._impatient = RegistryClient(
            settings["registries"],
            hooks=hooks,
            credentials=credentials,
            policy=RetryPolicy(attempts=1, mirror_attempts=1),
            pool_size=pool_size,
            connect_timeout=_IMPATIENT_SECONDS,
            read_timeout=_IMPATIENT_SECONDS,
        )
        self._lock = threading.Lock()
        self._served: dict[str, ServedLayer] = {}

    def warm(self) -> None:
        """Import what the first fetch needs: half a second that no container should wait for."""
        import requests  # noqa: F401

    def add(self, tree: str, meta: dict[str, Any], directory: Path) -> None:
        """Serve all layers of a prepared tree. Raises TrustError or CacheError; then nothing was added for it."""
        ref = ImageRef.parse(meta["image"])
        check_registry(ref.registry, self._settings["trust.registries"])
        try:
            for number, layer in enumerate(meta["layers"]):
                self._add(tree, layer, directory / f"spans.{number}", Source(ref, layer["digest"]))
        except BaseException:
            self.discard(tree)
            raise

    def _add(self, tree: str, layer: dict[str, Any], span_path: Path, source: Source) -> None:
        name = layer["blob"]
        with self._lock:
            served = self._served.get(name)
            if served is None:
                spans = SpanFile(span_path)
                served = self._served[name] = self._serve(name, layer, spans, source)
            served.users.add(tree)
            if not any((known.ref, known.digest) == (source.ref, source.digest) for known in served.sources):
                served.sources.append(source)

    def _serve(self, name: str, layer: dict[str, Any], spans: SpanFile, source: Source) -> ServedLayer:
        cached = self._cache.layer(layer["diff_id"], spans, spans.identity)

        @contextmanager
        def open_range(start: int, end: int) -> Iterator[Iterator[bytes]]:
            with self._open(name, start, end) as chunks:
                yield chunks

        lazy = LazyLayer(
            node_id=self._server.node_id(name.encode()),
            name=name.encode(),
            compression=Compression(layer["compression"]),
            cached=cached,
            open_range=open_range,
            pool=self._pool,
            source=source.ref.registry,
            readahead=self._settings["fetch.readahead"],
            read_deadline=self._settings["read_deadline"],
        )
        self._server.add(lazy)
        return ServedLayer(lazy, spans)

    @contextmanager
    def _open(self, name: str, start: int, end: int) -> Iterator[Iterator[bytes]]:
        """Compressed bytes of a layer from the first of its sources that has it; one that failed lately comes last."""
        with self._lock:
            served = self._served.get(name)
            sources = sorted(served.sources, key=lambda source: source.failed) if served else []
        trouble: ShimError = RegistryError(f"nobody knows where layer {name[:12]} is")
        for source in sources:
            client = self._client if source is sources[-1] else self._impatient
            try:
                stream = client.open_blob(source.ref, source.digest, start, end)
                stream.__enter__()
            except (RegistryError, IntegrityError) as error:
                source.failed = time.monotonic()
                trouble = error
                continue
            try:
                yield iter(stream)
            except IntegrityError:
                stream.report_corrupt()
                source.failed = time.monotonic()
                raise
            except RegistryError:
                source.failed = time.monotonic()
                raise
            finally:
                stream.close()
            return
        raise trouble

    def cached(self, name: str, offset: int, length: int) -> bool:
        """Whether a read would be answered without the registry."""
        with self._lock:
            served = self._served.get(name)
        return served is not None and served.lazy.read_cached(offset, length) is not None

    def discard(self, tree: str) -> None:
        """A tree is no longer mounted: its layers go when the kernel has closed them (`sweep`)."""
        with self._lock:
            for served in self._served.values():
                served.users.discard(tree)
        self.sweep()

    def sweep(self) -> None:
        """Take away the layers that nobody uses. A source outlives its tree as long as anybody reads the layer."""
        with self._lock:
            for name, served in list(self._served.items()):
                if not served.users and self._server.remove(served.lazy.node_id):
                    del self._served[name]
                    served.lazy.close()
                    self._cache.close_layer(served.lazy.cached)
                    served.spans.close()
                    log.debug("layer no longer served", layer=name)

    def waiting(self) -> list[dict[str, Any]]:
        """The reads that wait for a registry."""
        return [asdict(item) for item in self._server.waiting()]

    def open_count(self) -> int:
        """How many layers the kernel has open."""
        with self._lock:
            return sum(self._server.open_count(served.lazy.node_id) > 0 for served in self._served.values())

    def status(self) -> list[dict[str, Any]]:
        """The layers as `status --json` shows them."""
        with self._lock:
            served = list(self._served.values())
        return [
            {**asdict(item.lazy.stats()), "open": self._server.open_count(item.lazy.node_id), "images": len(item.users)}
            for item in served
        ]

    def traffic(self) -> dict[str, Any]:
        """Requests and bytes from registries since the start, by host and kind."""
        return {
            f"{host} {kind}": asdict(count) for (host, kind), count in sorted(self._client.counters.snapshot().items())
        }

    def close(self) -> None:
        """The server has stopped reading: flush the cache and let go of it."""
        self._pool.close()
        self._cache.close()
        self._client.close()
        self._impatient.close()


def check_registry(registry: str, trusted: tuple[str, ...]) -> None:
    """Raise TrustError unless `trust.registries` names the registry; "*" stands for all that are not this machine
    (loopback) or its neighbours on the link, where metadata services live."""
    if registry in trusted:
        return
    host = registry.rpartition(":")[0] if registry.rpartition(":")[2].isdigit() else registry
    if host in trusted:
        return
    if "*" in trusted and not _is_local(host.strip("[]")):
        return
    raise TrustError(
        f"the index leads to the registry {registry}, which `trust.registries` does not name",
        hint=f"add {registry} to `trust.registries` in the configuration if you want that",
    )


def _is_local(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return any(a.is_loopback or a.is_link_local or a.is_unspecified for a in (address, mapped) if a is not None)
