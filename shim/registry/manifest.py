"""Manifests and indexes as values, read from bytes that a registry sent.

OCI image-spec `manifest.md`, `image-index.md`, `descriptor.md`; Docker "Image Manifest V 2, Schema 2". The bytes are
hostile: everything has a bound, and whatever does not fit is a RegistryError. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from shim.errors import ImageReferenceError, NotFoundError, RegistryError
from shim.registry import platform as platforms
from shim.registry.platform import Platform
from shim.registry.ref import check_digest

MAX_MANIFEST = 4 << 20  # bytes; what registries accept (distribution-spec: at least 4 MiB)
MAX_LAYERS = 1024
MAX_MANIFESTS = 1024  # entries of one index
MAX_BLOB = 1 << 50

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
SCHEMA1 = (
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
)
MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEXES = (OCI_INDEX, DOCKER_LIST)
ACCEPT = ", ".join((*MANIFESTS, *INDEXES, "*/*;q=0.1"))
IMAGE_CONFIGS = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A blob or manifest: "sha256:<hex>" of exactly `size` bytes."""

    media_type: str
    digest: str
    size: int
    urls: tuple[str, ...] = ()
    platform: Platform | None = None  # only in an index
    annotations: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or index as it came: `digest` is that of `raw`, verified against what was asked for."""

    digest: str
    media_type: str
    raw: bytes = field(repr=False)

    @property
    def is_index(self) -> bool:
        return self.media_type in INDEXES


@dataclass(frozen=True, slots=True)
class Manifest:
    """One platform's image. `digest` is this manifest's, `index_digest` that of the (outermost) index it was chosen
    from; layers lowest first; `config_raw` the image config, verified, byte for byte."""

    digest: str
    media_type: str
    raw: bytes = field(repr=False)
    config: Descriptor
    layers: list[Descriptor]
    platform: str
    index_digest: str | None
    config_raw: bytes = field(repr=False)


def hash_of(raw: bytes, algorithm: str = "sha256") -> str:
    """The digest of `raw`, "<algorithm>:<hex>"."""
    return f"{algorithm}:{hashlib.new(algorithm, raw).hexdigest()}"


def load_json(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object, or RegistryError that names `what`."""
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        raise RegistryError(f"{what} is not valid JSON") from None
    if not isinstance(data, dict):
        raise RegistryError(f"{what} is not a JSON object")
    return data


def media_type_of(raw: bytes, content_type: str | None, what: str) -> str:
    """What kind of document `raw` is: its own mediaType, else the Content-Type, else its shape.

    Raises RegistryError for schema 1, for documents that can be read as both manifest and index (CVE-2021-41190), and
    for anything that is neither.
    """
    data = load_json(raw, what)
    header = (content_type or "").partition(";")[0].strip().lower()
    own = data.get("mediaType")
    if data.get("schemaVersion") == 1 or header in SCHEMA1 or own in SCHEMA1 or "fsLayers" in data:
        raise RegistryError(
            f"{what} has the old schema 1, which no longer says what its layers are",
            hint="pull it with an old Docker and push it again, or ask the publisher for a current image",
        )
    both = ("manifests" in data) and ("layers" in data or "config" in data)
    if both or (own is not None and not isinstance(own, str)):
        raise RegistryError(f"{what} is ambiguous: it can be read as an image and as an index")
    shape = OCI_INDEX if "manifests" in data else OCI_MANIFEST if "layers" in data and "config" in data else ""
    kind = own or (header if header in MANIFESTS + INDEXES else shape)
    if kind not in MANIFESTS + INDEXES or not shape or (kind in INDEXES) != (shape == OCI_INDEX):
        raise RegistryError(f"{what} is of type {_show(kind or header or 'unknown')}, which is not an image")
    return kind


def parse_index(document: Document, what: str) -> list[Descriptor]:
    """The entries of an index, attestations left out."""
    entries = load_json(document.raw, what).get("manifests")
    if not isinstance(entries, list) or len(entries) > MAX_MANIFESTS:
        raise RegistryError(f"{what} is not a valid image index: bad list of manifests")
    return [
        descriptor
        for entry in entries
        if not is_attestation(descriptor := parse_descriptor(entry, f"an entry of {what}"))
    ]


def parse_manifest(document: Document, what: str) -> tuple[Descriptor, list[Descriptor]]:
    """(config, layers) of an image manifest. Raises RegistryError."""
    data = load_json(document.raw, what)
    config = parse_descriptor(data.get("config"), f"the config of {what}")
    if config.media_type not in IMAGE_CONFIGS:
        raise RegistryError(
            f"{what} is not a container image: its config is of type {_show(config.media_type)}",
            hint="name an image, not a chart, a signature or another artifact",
        )
    items = data.get("layers")
    if not isinstance(items, list) or len(items) > MAX_LAYERS:
        raise RegistryError(f"{what} is not a valid image manifest: bad list of layers")
    layers = [parse_descriptor(item, f"layer {n} of {what}") for n, item in enumerate(items)]
    for layer in layers:
        if layer.urls:
            raise RegistryError(
                f"{what} has the foreign layer {layer.digest}, which lies outside its registry",
                hint="push the image with its foreign layers (dockerd's allow-nondistributable-artifacts), or choose"
                " another base image",
            )
    return config, layers


def parse_descriptor(item: object, what: str) -> Descriptor:
    """A descriptor, or RegistryError that says what is wrong with `what`."""
    if not isinstance(item, dict):
        raise RegistryError(f"{what} is missing or not an object")
    media_type, digest, size = item.get("mediaType"), item.get("digest"), item.get("size")
    if not isinstance(media_type, str) or len(media_type) > 255:
        raise RegistryError(f"{what} has no valid mediaType")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_BLOB:
        raise RegistryError(f"{what} has no valid size")
    try:
        check_digest(digest if isinstance(digest, str) else "")
    except ImageReferenceError:
        raise RegistryError(f"{what} has no valid digest") from None
    assert isinstance(digest, str)
    urls = item.get("urls")
    notes = item.get("annotations")
    return Descriptor(
        media_type,
        digest,
        size,
        tuple(str(url) for url in urls) if isinstance(urls, list) else (),
        _platform(item.get("platform")),
        tuple((str(k), str(v)) for k, v in notes.items()) if isinstance(notes, dict) else (),
    )


def _platform(item: object) -> Platform | None:
    if not isinstance(item, dict):
        return None
    parts = [item.get("os"), item.get("architecture"), item.get("variant") or ""]
    if not all(isinstance(part, str) and len(part) <= 64 for part in parts) or not parts[0] or not parts[1]:
        return None
    return platforms.normalise(*(str(part) for part in parts))


def is_attestation(descriptor: Descriptor) -> bool:
    """BuildKit's provenance and SBOM manifests: unknown/unknown, or annotated as such."""
    if descriptor.platform is not None and descriptor.platform.os == descriptor.platform.arch == "unknown":
        return True
    return any(key == "vnd.docker.reference.type" for key, _ in descriptor.annotations)


def config_platform(raw: bytes, what: str) -> Platform | None:
    """The platform that an image config states, or None when it states none."""
    data = load_json(raw, what)
    return _platform({key: data.get(key) for key in ("os", "architecture", "variant")})


def no_platform(what: str, wanted: Platform, offered: list[Platform]) -> NotFoundError:
    """The error for an image that has nothing for `wanted`."""
    have = sorted({str(platform) for platform in offered})
    listed = ", ".join(have[:20]) or "none"
    return NotFoundError(f"{what} has no image for {wanted}", hint=f"it has {listed}: choose one with --platform")


def _show(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:97] + "...")
