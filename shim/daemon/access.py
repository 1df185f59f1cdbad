"""Asks registries whether an image's reference may read its layers: `trust.cached`."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from shim import log
from shim.archive.source import ArchiveBytes
from shim.cache.layer import CachedLayer
from shim.errors import IntegrityError, RegistryError, ShimError
from shim.index.model import Compression, Restart, Spans
from shim.layers.inflate import compressed_range, inflate_spans
from shim.registry.client import RegistryClient
from shim.registry.ref import ImageRef

_THREADS = 8
_PAUSE = 0.25  # seconds between attempts, doubling up to a second
_ZEROS = 256 << 20  # bytes of zeros hashed at most, which takes less than half a second, to tell spans of them
_NEAR = 8  # spans from the start, where a stream has no restart points


@dataclass(frozen=True, slots=True)
class Held:
    """A layer that an image wants: its cache, its digest in the image's repository, and how it is compressed."""

    cached: CachedLayer
    digest: str
    compression: Compression


class Access:
    """A layer's cache, and whoever fetches into it, serve every image that has the layer. So before an image gets it,
    its registry must say that the image's repository has the layer and that this node's credentials for it may read it:
    a HEAD of the blob. It is remembered with the layer (AccessList), by repository and blob, over restarts and reboots:
    an image that was let in once needs no registry as long as the layer stays in the cache.

    Another registry's word is worth nothing, it may be an attacker's: one that the layer never came from must show that
    it has it. One span, chosen at random among those that are not all zeros, is fetched from there and hashed; who
    knows the length of a layer of nothing but zeros has it. Nothing is asked twice when nothing of the
    layer is cached yet: then only its own registry's bytes can come.

    Threads: any. Holds no lock while it asks. A registry that is away is asked again until the deadline.
    """

    def __init__(self, client: RegistryClient, policy: str) -> None:
        """policy: `trust.cached`, "confirmed" or "if-cached"."""
        self._client = client
        self._policy = policy

    def confirm(self, image: ImageRef, layers: Sequence[Held], end: float) -> None:
        """Return when `image` may read all of `layers`, by `end` (monotonic). Raises AuthError, NotFoundError,
        IntegrityError, RegistryError, for the first layer that it may not read."""
        if self._policy == "if-cached":
            return
        todo = list({id(held.cached): held for held in layers if not _is_known(image, held)}.values())
        if not todo:
            return
        started = time.monotonic()
        failed: dict[int, ShimError] = {}
        queue = list(enumerate(todo))[::-1]

        def work() -> None:
            while queue and not failed:
                try:
                    number, held = queue.pop()
                except IndexError:
                    return
                try:
                    self._confirm(image, held, end)
                except ShimError as error:
                    failed[number] = error

        threads = [threading.Thread(target=work, name="access", daemon=True) for _ in todo[1:_THREADS]]
        for thread in threads:
            thread.start()
        work()
        for thread in threads:
            thread.join()
        if failed:
            number, error = min(failed.items(), key=lambda item: item[0])
            layer = todo[number].digest.removeprefix("sha256:")[:12]
            error.args = (f"the registry does not confirm that {image.name} may read its layer {layer}: {error}",)
            raise error
        log.debug("access confirmed", image=str(image), layers=len(todo), seconds=round(time.monotonic() - started, 3))

    def _confirm(self, image: ImageRef, held: Held, end: float) -> None:
        """One layer; a failure that may pass is tried again."""
        pause = _PAUSE
        while True:
            try:
                self._ask(image, held, end)
            except RegistryError as error:
                if not error.retryable or time.monotonic() + pause >= end:
                    raise
                time.sleep(pause)
                pause = min(1.0, 2 * pause)
            else:
                held.cached.allow(reference(image, held.digest))
                return

    def _ask(self, image: ImageRef, held: Held, end: float) -> None:
        self._client.check_access(image, held.digest, deadline=end)
        known = held.cached.access.registries()
        if (known or held.cached.cached_bytes) and image.registry not in known:
            self._prove(image, held, end)

    def _prove(self, image: ImageRef, held: Held, end: float) -> None:
        """Fetch one span of the layer from the image's own repository. Raises IntegrityError when it is not right."""
        spans = held.cached.spans
        chosen = _telling(spans, _near_restarts(spans))
        if chosen is None:
            return
        first = spans.restart(chosen)
        start, stop = compressed_range(spans, first, chosen + 1)
        with self._client.open_blob(image, held.digest, start, stop, deadline=end) as stream:
            for _ in inflate_spans(spans, held.compression, first, stream, chosen + 1):
                pass

    def confirm_archive(self, cached: CachedLayer, archive: ArchiveBytes) -> None:
        """An archive that wants what is cached of its layer must have the data: one span is read there and hashed. Of
        a file each time; of an object in S3 once, so that what is cached starts without S3.

        Raises IntegrityError, StoreError.
        """
        if self._policy == "if-cached" or cached.access.has(archive.reader.place):
            return
        spans = cached.spans
        chosen = _telling(spans, range(spans.count)) if cached.cached_bytes else None
        if chosen is not None:
            data = archive.read(spans.ustart(chosen), spans.ustart(chosen + 1))
            if sha256(data).digest() != spans.digest(chosen):
                raise IntegrityError(
                    f"{archive.reader.place} does not have the data that its index speaks of",
                    hint="make the archive, or the pointer to it, again",
                )
        if archive.is_remote:
            cached.allow(archive.reader.place)


def _near_restarts(spans: Spans) -> list[int]:
    """The spans that can be had without inflating many others."""
    near, first = [], 0
    for number in range(spans.count):
        if spans.kind(number) != Restart.CONTINUE:
            first = number
        if number - first <= _NEAR:
            near.append(number)
    return near


def _telling(spans: Spans, among: Sequence[int]) -> int | None:
    """One of the spans, at random, whose bytes nobody can make up from its length: not all zeros. None: there is none.

    Lengths are mostly few, and each is hashed once. Beyond _ZEROS such bytes a span may be one of zeros.
    """
    zeros: dict[int, bytes] = {}
    left, unknown = _ZEROS, None
    for number in random.sample(among, len(among)):  # unseen by the registry until it must answer
        length = spans.ustart(number + 1) - spans.ustart(number)
        if length not in zeros:
            if length > left:
                unknown = number
                continue
            left -= length
            zeros[length] = sha256(bytes(length)).digest()
        if spans.digest(number) != zeros[length]:
            return number
    return unknown


def reference(image: ImageRef, digest: str) -> str:
    """As it stands in an AccessList."""
    return f"{image.name}@{digest}"


def _is_known(image: ImageRef, held: Held) -> bool:
    return held.cached.access.has(reference(image, held.digest))
