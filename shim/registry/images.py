"""Which image a reference means on one platform: through indexes, nested ones too, to a manifest and its config."""

from __future__ import annotations

from typing import Protocol

from shim.errors import IntegrityError, NotFoundError, RegistryError
from shim.registry import manifest as manifests
from shim.registry import platform as platforms
from shim.registry.hooks import Hooks
from shim.registry.manifest import Descriptor, Document, Manifest
from shim.registry.platform import Platform
from shim.registry.ref import ImageRef

MAX_DEPTH = 3  # indexes inside indexes
MAX_FETCHED = 24  # manifests fetched for one image


class Reader(Protocol):
    """As RegistryClient has them."""

    def manifest(self, ref: ImageRef) -> Document: ...

    def blob(self, ref: ImageRef, item: Descriptor | str) -> bytes: ...


class ImageFinder:
    """Finds one platform's image in what a reference names. Bounded in depth and in manifests fetched."""

    def __init__(self, client: Reader, ref: ImageRef, wanted: Platform, *, strict: bool, hooks: Hooks) -> None:
        self._client = client
        self._ref = ref
        self._wanted = wanted
        self._strict = strict
        self._hooks = hooks
        self._fetched = 0

    def find(self, document: Document) -> Manifest:
        if not document.is_index:
            found = self._image(document, None)
            actual = platforms.parse(found.platform)
            if not platforms.matches(self._wanted, actual):
                if self._strict:
                    raise manifests.no_platform(str(self._ref), self._wanted, [actual])
                self._hooks.warn(f"{self._ref} is for {actual}, this machine is {self._wanted}")
            return found
        offered: list[Platform] = []
        chosen = self._search(document, document.digest, offered, 1)
        if chosen is None:
            raise manifests.no_platform(str(self._ref), self._wanted, offered)
        return chosen

    def _search(self, index: Document, outermost: str, offered: list[Platform], depth: int) -> Manifest | None:
        entries = manifests.parse_index(index, f"the index of {self._ref}")
        images = [entry for entry in entries if entry.media_type not in manifests.INDEXES]
        offered += [entry.platform for entry in images if entry.platform is not None]
        entry = platforms.choose(self._wanted, [(image.platform, image) for image in images])
        if entry is not None:
            return self._image(self._fetch(entry), outermost, entry.platform)
        # containerd looks into what does not say its platform
        for image in images:
            if image.platform is None and image.media_type in manifests.MANIFESTS:
                found = self._image(self._fetch(image), outermost)
                offered.append(platforms.parse(found.platform))
                if platforms.matches(self._wanted, offered[-1]):
                    return found
        for nested in entries:
            if nested.media_type in manifests.INDEXES and depth < MAX_DEPTH:
                found_below = self._search(self._fetch(nested), outermost, offered, depth + 1)
                if found_below is not None:
                    return found_below
        return None

    def _fetch(self, entry: Descriptor) -> Document:
        self._fetched += 1
        if self._fetched > MAX_FETCHED:
            raise RegistryError(f"the index of {self._ref} leads to more than {MAX_FETCHED} manifests")
        if entry.size > manifests.MAX_MANIFEST:
            raise RegistryError(f"a manifest of {self._ref} has {entry.size} bytes, more than registries accept")
        try:
            document = self._client.manifest(self._ref.with_digest(entry.digest))
        except NotFoundError as error:
            error.args = (f"{error}: the index of {self._ref} names it, so the image was pushed incompletely",)
            raise
        if len(document.raw) != entry.size:
            raise IntegrityError(f"manifest {entry.digest} of {self._ref} does not have the size its index says")
        return document

    def _image(self, document: Document, outermost: str | None, stated: Platform | None = None) -> Manifest:
        what = f"the manifest of {self._ref}"
        if document.is_index:
            raise RegistryError(f"{what} is an index where an image was due")
        config, layers = manifests.parse_manifest(document, what)
        raw = self._client.blob(self._ref, config)
        actual = stated or manifests.config_platform(raw, f"the config of {self._ref}") or self._wanted
        return Manifest(document.digest, document.media_type, document.raw, config, layers, str(actual), outermost, raw)
