"""From a registry reference to an Index: each layer is streamed once, nothing is stored, nothing unpacked."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol, TypeVar

from shim.errors import IntegrityError, LayerError, RegistryError, ShimError, UsageError
from shim.index.merge import TreeMerger
from shim.index.model import Index, Layer, Tree
from shim.layers.scan import LayerScanner, ScanResult
from shim.layers.tar import TarEntry, TarWalker
from shim.registry.client import Descriptor, Manifest, RegistryClient
from shim.registry.ref import ImageRef
from shim.runtime.reference import MARKER, MARKER_DIR, MARKER_FILE

DEFAULT_CHECKPOINT_MIB = 2
MAX_CHECKPOINT_MIB = 64
_PARALLEL = 2  # layers at a time; each keeps one core busy inflating, and hashes on another
_MAX_SOURCES = 3  # hosts tried for bytes that turn out wrong

_T = TypeVar("_T")
Progress = Callable[[int, int, int], None]
"""(layer number from 0, compressed bytes done of all layers, compressed bytes of all layers); one call at a time, from
any thread."""


@dataclass(slots=True)
class ScannedLayer:
    """A layer's digests and spans, and its tar entries in order."""

    result: ScanResult
    entries: list[TarEntry]


class Tap(Protocol):
    """Gets a layer's uncompressed bytes in order, then, if they were all and right, what the layer is; then closed."""

    def write(self, data: memoryview) -> None: ...

    def keep(self, layer: Layer) -> bool: ...

    def close(self) -> None: ...


def build_index(
    ref: ImageRef,
    client: RegistryClient,
    *,
    platform: str | None = None,
    checkpoint_mib: int = DEFAULT_CHECKPOINT_MIB,
    progress: Progress | None = None,
    warn: Callable[[str], None] | None = None,
    taps: Callable[[], Tap] | None = None,
    on_layer: Callable[[Layer], None] | None = None,
) -> Index:
    """The index of the image that `ref` names, for `platform` (os/arch[/variant]; None: the host's).

    checkpoint_mib: uncompressed MiB between restart points, 1 to 64. warn: gets a line about what was left out. taps:
    makes one for each layer that is streamed. on_layer: gets each layer, lowest first, while others are streamed.
    Raises RegistryError for what is no image; IntegrityError, naming the layer, when bytes are not what manifest and
    config promise; LayerError, naming the layer, when they are no layer. Bytes are verified before they are believed.
    """
    if not 1 <= checkpoint_mib <= MAX_CHECKPOINT_MIB:
        raise UsageError(f"{checkpoint_mib} MiB between restart points is not in 1 to {MAX_CHECKPOINT_MIB}")
    manifest = client.resolve(ref, platform)
    diff_ids = read_diff_ids(manifest.config_raw, len(manifest.layers))
    merger = TreeMerger()
    layers: list[Layer] = []
    with closing(scan_layers(ref, client, manifest.layers, checkpoint_mib << 20, progress, taps)) as scans:
        for number, scanned in enumerate(scans):
            if scanned.result.diff_id != diff_ids[number]:
                raise IntegrityError(
                    f"{layer_name(number, manifest.layers)}: its uncompressed bytes hash to {scanned.result.diff_id},"
                    f" the config says {diff_ids[number]}",
                    hint="the image itself is damaged: push it again, or name another reference",
                )
            layers.append(layer_of(manifest.layers[number], scanned.result))
            if on_layer is not None:
                on_layer(layers[-1])
            merger.apply(scanned.entries, number)
    tree = merger.finish()
    _refuse_thin(ref, tree)
    if merger.dropped and warn is not None:
        parts = ", ".join(f"{count} {reason}s" for reason, count in sorted(merger.dropped.items()))
        warn(f"left out, since no container may see it: {parts}")
    return Index(ref.image, manifest.digest, manifest.platform, manifest.config_raw, layers, tree, checkpoint_mib)


def _refuse_thin(ref: ImageRef, tree: Tree) -> None:
    """What stands in a thin image, or one built from it, is not what its containers have."""
    directory = (tree.root.children or {}).get(MARKER_DIR.encode())
    if directory is not None and MARKER_FILE.encode() in (directory.children or {}):
        raise LayerError(
            f"{ref} is a thin image, or was built from one: most of its tree is in another image",
            hint=f"name that one; where the image is unpacked, `clip-shim inspect` on its {MARKER} says which it is",
        )


def layer_of(descriptor: Descriptor, result: ScanResult) -> Layer:
    return Layer(
        descriptor.digest,
        result.diff_id,
        result.size,
        result.uncompressed_size,
        descriptor.media_type,
        result.compression,
        result.spans,
    )


def read_diff_ids(config: bytes, count: int) -> list[str]:
    """`rootfs.diff_ids` of an image config (OCI image-spec config.md), one for each of `count` layers."""
    try:
        diff_ids = json.loads(config)["rootfs"]["diff_ids"]
    except (ValueError, KeyError, TypeError, RecursionError):
        diff_ids = None
    if not isinstance(diff_ids, list) or not all(isinstance(item, str) for item in diff_ids):
        raise RegistryError(
            "the image's config has no list rootfs.diff_ids: it is not a container image",
            hint="name an image, not a chart, a signature or another artifact",
        )
    if len(diff_ids) != count:
        raise RegistryError(f"the image's config speaks of {len(diff_ids)} layers, its manifest of {count}")
    return diff_ids


def layer_name(number: int, layers: Sequence[Descriptor]) -> str:
    """How messages call a layer: `layer 2 of 5 (sha256:0123456789ab)`."""
    return f"layer {number + 1} of {len(layers)} ({layers[number].digest[:19]})"


def from_sources(
    client: RegistryClient, ref: ImageRef, number: int, layers: Sequence[Descriptor], attempt: Callable[[], _T]
) -> _T:
    """What `attempt` makes of a layer's bytes; when they turn out wrong it is made again, with another host's: that one
    is then avoided. Raises the last one's LayerError or IntegrityError, which names the layer."""
    for _ in range(min(len(client.hosts(ref)), _MAX_SOURCES) - 1):
        try:
            return attempt()
        except (LayerError, IntegrityError):
            continue
    try:
        return attempt()
    except (LayerError, IntegrityError) as error:
        error.args = (f"{layer_name(number, layers)}: {error}",)
        raise


def scan_layers(
    ref: ImageRef,
    client: RegistryClient,
    layers: Sequence[Descriptor],
    spacing: int,
    progress: Progress | None,
    taps: Callable[[], Tap] | None = None,
) -> Generator[ScannedLayer, None, None]:
    """Stream and scan `layers`, a few at a time, and give them in order; one that is named twice is streamed once.

    Compressed digest and size are verified. spacing: bytes between restart points. Closing the iterator stops the work.
    Raises LayerError, IntegrityError (each naming the layer) and RegistryError.
    """
    check_layers(layers)
    scan = _Scan(ref, client, layers, spacing, progress, taps)
    uses = Counter(layer.digest for layer in layers)
    try:
        scan.start()
        for layer in layers:
            scanned = scan.wait(layer.digest)
            uses[layer.digest] -= 1
            if not uses[layer.digest]:
                scan.done.pop(layer.digest)
            yield scanned
    finally:
        scan.stopped.set()


def check_layers(layers: Sequence[Descriptor]) -> None:
    """Raise LayerError for a layer that can be no file system layer, whatever its bytes."""
    for number, layer in enumerate(layers):
        what = layer_name(number, layers)
        kind = layer.media_type
        if kind.endswith("+encrypted"):
            raise LayerError(f"{what} is encrypted", hint="only unencrypted images can be indexed")
        if ".tar" not in kind:
            raise LayerError(f"{what} is of type {kind!r}, not a file system layer", hint="name a container image")
        if not layer.digest.startswith("sha256:"):
            raise LayerError(f"{what} is not named by a SHA-256 digest", hint="push the image with sha256 digests")


class _Scan:
    """The threads that stream layers. Nearly all they do (network, inflating, hashing) releases the GIL."""

    def __init__(
        self,
        ref: ImageRef,
        client: RegistryClient,
        layers: Sequence[Descriptor],
        spacing: int,
        progress: Progress | None,
        taps: Callable[[], Tap] | None,
    ) -> None:
        self._taps = taps
        self.stopped = threading.Event()
        self.done: dict[str, ScannedLayer] = {}
        self._ref = ref
        self._client = client
        self._layers = layers
        self._spacing = spacing
        self._progress = progress
        self._lock = threading.Lock()
        numbers = {layer.digest: number for number, layer in reversed(list(enumerate(layers)))}
        self._todo = iter(sorted(numbers.values()))  # the first place of each distinct layer
        self._distinct = len(numbers)
        self._bytes = sum(layers[number].size for number in numbers.values())
        self._read = 0
        self._answers: SimpleQueue[tuple[str, ScannedLayer | BaseException]] = SimpleQueue()

    def start(self) -> None:
        for _ in range(min(_PARALLEL, self._distinct)):
            threading.Thread(target=self._work, name="layer-scan", daemon=True).start()

    def wait(self, digest: str) -> ScannedLayer:
        """The scanned layer, when it is ready. Any layer's error is raised at once."""
        while digest not in self.done:
            name, answer = self._answers.get()
            if isinstance(answer, BaseException):
                raise answer
            self.done[name] = answer
        return self.done[digest]

    def _work(self) -> None:
        while not self.stopped.is_set():
            with self._lock:
                number = next(self._todo, None)
            if number is None:
                return
            digest = self._layers[number].digest
            try:
                self._answers.put((digest, self._layer(number)))
            except BaseException as error:  # noqa: BLE001  raised again by `wait`
                self._answers.put((digest, error))
                return

    def _layer(self, number: int) -> ScannedLayer:
        return from_sources(self._client, self._ref, number, self._layers, lambda: self._stream(number))

    def _stream(self, number: int) -> ScannedLayer:
        if self._taps is None:
            return self._scan(number, None)
        with closing(self._taps()) as tap:
            scanned = self._scan(number, tap)
            tap.keep(layer_of(self._layers[number], scanned.result))
            return scanned

    def _scan(self, number: int, tap: Tap | None) -> ScannedLayer:
        layer = self._layers[number]
        walker = TarWalker()
        counted = 0

        def both(view: memoryview) -> None:
            assert tap is not None
            walker.feed(view)
            tap.write(view)

        with (
            self._client.open_blob(self._ref, layer.digest, 0, layer.size) as stream,
            LayerScanner(None, self._spacing, walker.feed if tap is None else both) as scanner,
        ):
            try:
                for chunk in stream:
                    if self.stopped.is_set():
                        raise _StoppedError("stopped")
                    scanner.feed(chunk)
                    counted += len(chunk)
                    self._count(number, len(chunk))
                result = scanner.finish()
                if result.digest != layer.digest or result.size != layer.size:
                    raise IntegrityError(f"its {result.size} bytes hash to {result.digest}")
                walker.finish()
            except (LayerError, IntegrityError):
                stream.report_corrupt()
                self._count(number, -counted)
                raise
        return ScannedLayer(result, walker.entries)

    def _count(self, number: int, size: int) -> None:
        with self._lock:
            self._read += size
            if self._progress is not None:
                self._progress(number, self._read, self._bytes)


class _StoppedError(ShimError):
    """Nobody waits for the layers any more."""


__all__ = ["Manifest", "ScannedLayer", "build_index", "check_layers", "layer_of", "read_diff_ids", "scan_layers"]
