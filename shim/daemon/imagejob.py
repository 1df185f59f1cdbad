"""Job: make the index of an image, straight from its registry."""

from __future__ import annotations

from typing import Any

from shim import log
from shim.index import codec
from shim.index.build import build_index
from shim.registry.client import RegistryClient
from shim.registry.ref import ImageRef


def index_image(
    registry: str, repository: str, tag: str | None, digest: str, registries: dict[str, Any], path: str
) -> str:
    """Write the index of the image (one platform's manifest `digest`) to `path`; returns the index's own digest."""
    client = RegistryClient(registries)
    try:
        ref = ImageRef(registry, repository, tag, digest)
        index = build_index(ref, client, warn=lambda line: log.warning("indexing", image=str(ref), note=line))
    finally:
        client.close()
    return codec.write_index(path, index)
