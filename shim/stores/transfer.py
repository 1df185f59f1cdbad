"""Files to and from stores, by URL, with the node's settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shim.errors import AbsentError, IndexFormatError, UsageError
from shim.index import codec, container
from shim.registry.client import RegistryClient
from shim.registry.hooks import Hooks
from shim.registry.ref import ImageRef
from shim.settings import Settings
from shim.stores import urls
from shim.stores.base import IndexStore, archive_name, whole_file
from shim.stores.directory import DirectoryStore
from shim.stores.oci import ARCHIVE_TYPE, INDEX_TYPE, OciStore
from shim.stores.s3 import S3Store, options_of
from shim.stores.urls import FilePlace, OciPlace, S3Place

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)."""
_READ_SECONDS = 300.0  # a registry may take long to put a large blob where it belongs
BESIDE = "oci"
LOCAL = "local"
NO_IMAGE = "rootfs.invalid"  # the registry that an archive of a directory names


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a file is: `kind` is "index" or "archive"; `image`, with its digest, is what it was made of."""

    kind: str
    image: ImageRef | None
    size: int


class Stores:
    """The stores that a node's settings name. Close it when done. Thread-safe."""

    def __init__(self, settings: Settings, client: RegistryClient | None = None) -> None:
        """client: for registries; one is made if none is given."""
        self._settings = settings
        self._own = client is None
        self._client = client or RegistryClient(settings["registries"], hooks=Hooks(), read_timeout=_READ_SECONDS)
        self.oci = OciStore(self._client)

    def __enter__(self) -> Stores:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._own:
            self._client.close()

    def store(self, url: str) -> IndexStore:
        """A store by URL: `local`, `oci` (beside the image), a directory, s3://BUCKET/PREFIX. Raises UsageError."""
        if url == LOCAL:
            return DirectoryStore(self._settings.state_dir / "indexes")
        if url in (BESIDE, "oci://"):
            return self.oci
        place = urls.parse(url)
        if isinstance(place, FilePlace):
            return DirectoryStore(place.path)
        if isinstance(place, S3Place):
            key = place.key if place.is_store else place.key + "/"
            return self.s3(S3Place(place.bucket, key))
        raise UsageError(f"{url!r} is no store", hint="`oci` stands for the registry of the image itself")

    def s3(self, place: S3Place) -> S3Store:
        return S3Store(place, options_of(self._settings["stores.s3"], place.bucket))

    def push(self, file: Path, url: str, progress: Progress | None = None) -> str:
        """Store `file`, an index or an archive, at `url`; the URL at which it can be had.

        A place that is a store (see urls.py) calls it by its image, and keeps what is there by that name; a name that
        was given is given to the new file. Raises UsageError, IndexFormatError, StoreError, RegistryError.
        """
        place = urls.parse(url)
        facts = look(file)
        if isinstance(place, OciPlace):
            kind = INDEX_TYPE if facts.kind == "index" else ARCHIVE_TYPE
            report = None if progress is None else lambda done: progress(done, facts.size)
            if place.ref.digest is not None:
                raise UsageError(f"{url}: a digest cannot be chosen", hint="give a tag, or the repository alone")
            return self.oci.push(place.ref, file, kind, facts.image, report)
        by_image = place.is_store and facts.image is not None
        name = archive_name(facts.image) if by_image and facts.image is not None else file.name
        if isinstance(place, S3Place):
            if by_image and facts.kind == "index" and facts.image is not None:
                return self.s3(place).keep(facts.image, file)
            target = S3Place(place.bucket, place.key + name) if place.is_store else place
            self.s3(target).put(target, file, replace=True, progress=progress)
            return str(target)
        if by_image and facts.kind == "index" and facts.image is not None:
            return DirectoryStore(place.path).keep(facts.image, file)
        if place.is_store:
            return DirectoryStore(place.path).put(name, file, replace=True)
        return DirectoryStore(place.path.parent).put(place.path.name, file, replace=True)

    def pull(self, url: str, out: BinaryIO, *, known: str | None = None, limit: int = 1 << 40) -> str | None:
        """Write what `url` names to `out`; a text that changes when it does (an ETag, a digest).

        None, and nothing written, if that text is `known`. Raises AbsentError, UsageError, StoreError, RegistryError.
        """
        place = urls.parse(url)
        if place.is_store and not isinstance(place, OciPlace):
            raise UsageError(f"{url} is a store, not an index in one", hint="name the index itself, without the slash")
        if isinstance(place, S3Place):
            return self.s3(place).get(place, out, known=known, limit=limit)
        if isinstance(place, OciPlace):
            ref = place.ref if place.ref.tag or place.ref.digest else ImageRef.parse(place.ref.name, local_paths=False)
            return self.oci.pull(ref, out, known=known, limit=limit)
        if not DirectoryStore(place.path.parent).fetch(place.path.name, out, limit=limit):
            raise AbsentError(f"there is no file {place.path}")
        return ""

    def fetch(self, url: str, path: Path) -> FileFacts:
        """Write what `url` names to the file `path`, which is not touched unless it is whole and one of ours."""
        with whole_file(path) as out:
            self.pull(url, out)
            out.flush()
            return look(Path(out.name))


def look(file: Path) -> FileFacts:
    """What a file to be pushed is. Raises IndexFormatError: nothing of ours; OSError."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        head = opened.read(len(container.GO_MAGIC))
        opened.seek(max(0, size - len(container.END_MAGIC)))
        tail = opened.read()
    if tail == container.END_MAGIC:
        data = codec.read_file(file)
        facts = codec.summary(data)
        image = ImageRef.parse(facts["image"], local_paths=False).with_digest(facts["digest"])
        if codec.archive_of(data) is None:
            return FileFacts("index", image, size)
        return FileFacts("archive", None if image.registry == NO_IMAGE else image, size)
    if head == container.GO_MAGIC:
        return FileFacts("archive", None, size)
    raise IndexFormatError(f"{file} is neither a clip index nor a clip archive")
