"""What is attached to an image in its registry: OCI distribution-spec 1.1 "Listing Referrers", with its tag schema for
registries that do not have that API ("Referrers Tag Schema"), such as distribution 2.8."""

from __future__ import annotations

import json
from typing import Any

from shim.errors import NotFoundError, RegistryError
from shim.registry import manifest as manifests
from shim.registry.client import RegistryClient
from shim.registry.manifest import OCI_INDEX, Descriptor, Document
from shim.registry.push import Pusher
from shim.registry.ref import ImageRef

_ATTEMPTS = 8
_UNKNOWN = (400, 404, 405, 501)  # what registries answer that do not know the API


def referrers(client: RegistryClient, image: ImageRef, artifact_type: str) -> list[Descriptor]:
    """The manifests of `artifact_type` that name `image` (its digest) as their subject, as the registry lists them.

    Raises RegistryError and IntegrityError.
    """
    assert image.digest is not None
    try:
        pages = client.referrers(image, artifact_type)
    except RegistryError as error:
        if error.status not in _UNKNOWN:
            raise
        tagged = _tagged(client, image)
        pages = [] if tagged is None else [tagged]
    return [found for page in pages for found, kind in _entries(page) if kind == artifact_type]


def attach(client: RegistryClient, image: ImageRef, raw: bytes, artifact_type: str, annotations: dict[str, str]) -> str:
    """Put the manifest `raw`, whose subject is `image`, and see to it that it is listed; its digest.

    A registry without the API has the list under a tag, which every writer reads, adds to and writes again. It is read
    back until it has ours; a writer that read before and writes after that drops ours, and whoever misses it pushes it
    again. Raises RegistryError and IntegrityError.
    """
    assert image.digest is not None
    pusher = Pusher(client)
    put = pusher.put_manifest(ImageRef(image.registry, image.repository), raw, manifests.OCI_MANIFEST)
    if put.subject is not None:
        return put.digest
    entry = {
        "mediaType": manifests.OCI_MANIFEST,
        "digest": put.digest,
        "size": len(raw),
        "artifactType": artifact_type,
        "annotations": annotations,
    }
    tag = ImageRef(image.registry, image.repository, _tag_of(image.digest))
    for _ in range(_ATTEMPTS):
        document = _tagged(client, image)
        listed: list[Any] = [] if document is None else _list(document)
        if any(isinstance(item, dict) and item.get("digest") == put.digest for item in listed):
            return put.digest
        index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [*listed, entry]}
        pusher.put_manifest(tag, json.dumps(index, sort_keys=True).encode(), OCI_INDEX)
    raise RegistryError(f"others keep changing what is attached to {image}", retryable=True)


def _tag_of(digest: str) -> str:
    """distribution-spec: algorithm and the first 64 characters of the hash."""
    algorithm, _, encoded = digest.partition(":")
    return f"{algorithm[:32]}-{encoded[:64]}"


def _tagged(client: RegistryClient, image: ImageRef) -> Document | None:
    assert image.digest is not None
    try:
        document = client.manifest(ImageRef(image.registry, image.repository, _tag_of(image.digest)))
    except NotFoundError:
        return None
    return document if document.is_index else None


def _list(document: Document) -> list[Any]:
    listed = manifests.load_json(document.raw, "the list of referrers").get("manifests")
    if not isinstance(listed, list) or len(listed) > manifests.MAX_MANIFESTS:
        raise RegistryError("the registry's list of referrers is not valid")
    return listed


def _entries(document: Document) -> list[tuple[Descriptor, str]]:
    """(descriptor, artifactType) of each entry that has one."""
    found = []
    for item in _list(document):
        kind = item.get("artifactType") if isinstance(item, dict) else None
        if isinstance(kind, str):
            found.append((manifests.parse_descriptor(item, "a referrer"), kind))
    return found
