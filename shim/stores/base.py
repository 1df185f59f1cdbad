"""What an index store is, what an index is called in one, and how a file is written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path
from typing import BinaryIO, Protocol

from shim.errors import StoreError
from shim.index import codec
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


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name at the end, when the block was left without an error. Raises StoreError."""
    try:
        codec.check_target(path)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:64]}.", dir=path.parent)
        os.close(handle)
        try:
            with open(temporary, "w+b") as out:  # by its name, which `out.name` then is
                yield out
                out.flush()
                os.fchmod(out.fileno(), 0o644)
                os.fsync(out.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}") from error
