"""Images of one small layer, served straight by a FaultServer: a fresh one for each fault costs milliseconds."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from shim.index import codec
from shim.index.build import build_index
from shim.registry.ref import ImageRef
from tests.support.faultserver import FaultServer
from tests.support.registry import OCI, gzip_of, make_client, sha256, tar_of

FILES = ("one", "two", "three")
SIZE = 300_000  # bytes of noise in each


@cache
def content(seed: int, name: str) -> bytes:
    return random.Random(f"{seed} {name}").randbytes(SIZE)


def right(seed: int, name: str) -> str:
    return hashlib.sha256(content(seed, name)).hexdigest()


@dataclass(frozen=True)
class LazyImage:
    """Image REPOSITORY:latest of `server`, with FILES of `seed` in its only layer."""

    server: FaultServer
    repository: str
    seed: int
    layer: str  # digests
    diff_id: str

    @property
    def reference(self) -> str:
        return f"{self.server.host}/{self.repository}:latest"

    @property
    def blob(self) -> str:
        """A pattern of the path of its layer."""
        return f"/v2/{self.repository}/blobs/{self.layer}"

    def index(self, path: Path) -> Path:
        """Write its index to `path`."""
        home = path.parent / "nobody"
        index = build_index(ImageRef.parse(self.reference), make_client(home))
        codec.write_index(path, index)
        return path


def serve(server: FaultServer, repository: str, seed: int) -> LazyImage:
    """Have `server` serve an image, as a registry would."""
    tar = tar_of({name: content(seed, name) for name in FILES})
    layer = gzip_of(tar)
    config = json.dumps(
        {"os": "linux", "architecture": "amd64", "config": {}, "rootfs": {"type": "layers", "diff_ids": [sha256(tar)]}}
    ).encode()
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI + "manifest.v1+json",
            "config": {"mediaType": OCI + "config.v1+json", "digest": sha256(config), "size": len(config)},
            "layers": [{"mediaType": OCI + "layer.v1.tar+gzip", "digest": sha256(layer), "size": len(layer)}],
        }
    ).encode()
    server.serve(f"/v2/{repository}/manifests/latest", manifest, OCI + "manifest.v1+json")
    for blob in (config, layer):
        server.serve(f"/v2/{repository}/blobs/{sha256(blob)}", blob)
    return LazyImage(server, repository, seed, sha256(layer), sha256(tar))
