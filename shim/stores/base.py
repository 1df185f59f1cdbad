"""What an index store is, and what an index is called in one."""

from __future__ import annotations

from hashlib import file_digest
from pathlib import Path
from typing import BinaryIO, Protocol

from shim.registry.ref import ImageRef


class IndexStore(Protocol):
    """Keeps indexes by the image they describe.

    Whatever happens to a writer, a reader finds a whole index or none; of two writers one wins, and neither harms the
    other. What is found is not yet believed: the caller compares it with the image it asked for.
    Methods raise StoreError, RegistryError, TrustError.
    """

    @property
    def url(self) -> str:
        """How the configuration names it."""

    def find(self, image: ImageRef, out: BinaryIO) -> bool:
        """Write the index of `image` to `out`; False if there is none. `image.digest` is one platform's manifest."""

    def keep(self, image: ImageRef, file: Path) -> str:
        """Store the index `file` as that of `image`, unless there is one already; the URL it can be had at."""


def name_of(image: ImageRef) -> str:
    """What the index of an image is called in a store that has names: REGISTRY/REPOSITORY/sha256-HEX.clip.

    The repository is part of it, since an index says where its layers are.
    """
    assert image.digest is not None
    return f"{image.name}/{image.digest.replace(':', '-')}.clip"


def archive_name(image: ImageRef) -> str:
    """What the v1 archive of an image is called: as its index, with -archive behind the digest."""
    return f"{name_of(image).removesuffix('.clip')}-archive.clip"


def digest_name(file: Path) -> str:
    """What an index file is called by its own hash: sha256-HEX.clip."""
    with open(file, "rb") as opened:
        return f"sha256-{file_digest(opened, 'sha256').hexdigest()}.clip"
