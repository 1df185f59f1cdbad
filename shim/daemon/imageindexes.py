"""The indexes of images: found in the stores, or made, once on a node, and kept."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shim import log
from shim.daemon import indexfile, indexjobs, jobs
from shim.daemon.flights import Flights
from shim.daemon.keptindexes import MAKING, note_of
from shim.errors import ShimError, StoreError
from shim.registry.client import RegistryClient
from shim.registry.ref import ImageRef
from shim.settings import Settings
from shim.stores.base import archive_name, digest_name, name_of
from shim.stores.directory import DirectoryStore
from shim.stores.s3 import S3Store
from shim.stores.transfer import Stores

Announce = Callable[[float], None]
"""Tells whoever waits for the answer that it may take this many seconds more."""


class ImageIndexes:
    """Concurrency: called by control connections' threads, which wait for networks and jobs here; nothing that serves
    reads does. One thread looks an image up elsewhere and makes its index, the others that ask for it wait, and share
    its failure. What was found or made lies in the local store before they go on.

    Stores other than the local one are asked in order; one that fails is passed over, with a line in the log. S3 is
    asked from a job, since boto3 takes half a second of CPU to load, registries from the thread itself.

    Crashes: a file that is not whole yet lies below STATE/indexes/.making, which is emptied at start.
    """

    def __init__(self, settings: Settings, client: RegistryClient) -> None:
        """Raises ConfigError or UsageError for stores that cannot be."""
        self._settings = settings
        self._stores = Stores(settings, client)
        self.local = DirectoryStore(settings.state_dir / "indexes")
        self._lookup: tuple[str, ...] = settings["stores.lookup"]
        self._write: tuple[str, ...] = settings["stores.write"]
        for url in (*self._lookup, *self._write):
            self._stores.store(url)
        self._making = settings.state_dir / "indexes" / MAKING
        self._making.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in self._making.iterdir():
            left.unlink(missing_ok=True)
        self._flights = Flights()
        self._known: dict[indexfile.Identity, indexfile.Head] = {}  # so that a hot start reads no index

    def identify(self, file: int | Path) -> indexfile.Head:
        """What an index file, open or a finished one of ours, is. Raises IndexFormatError."""
        if isinstance(file, int):
            return indexfile.identify(file, self._known)
        with open(file, "rb") as opened:
            return indexfile.identify(opened.fileno(), self._known)

    def get(self, image: ImageRef, announce: Announce) -> int:
        """A descriptor of the index of `image` (by its platform's manifest): from a store, or made now."""
        fd = self._here(image)
        while fd is None:
            announce(self._settings["image_deadline"] + self._settings["mount_deadline"])
            self._flights.once(name_of(image), lambda: self._obtain(image))
            fd = self._here(image)
        return fd

    def find(self, image: ImageRef) -> int | None:
        """The index of `image` if any store has it."""
        fd = self._here(image)
        if fd is None:
            self._flights.once(f"find {name_of(image)}", lambda: self._bring(image))
            fd = self._here(image)
        return fd

    def remake(self, image: ImageRef) -> int:
        """An index of `image` made now, in the place of one that turned out to be wrong."""
        self._flights.once(f"make {name_of(image)}", lambda: self._index(image))
        fd = self._here(image)
        if fd is None:
            raise StoreError(f"the index of {image} is gone as soon as it was made")
        return fd

    def archive(self, image: ImageRef) -> int | None:
        """A v1 archive of `image` that this node or a store has, or None. Of one in S3 its index alone comes, which
        says where the data are; from a registry it comes whole."""
        name = archive_name(image)
        fd = self._here(image, name)
        if fd is None:
            self._flights.once(name, lambda: self._bring_archive(image, name))
            fd = self._here(image, name)
        return fd

    def _bring_archive(self, image: ImageRef, name: str) -> None:
        for url in self._lookup:
            with self.temporary() as path:
                if self._try(url, self._archive_in, image, path) and self._is_of(path, image, url):
                    self.put(name, path)
                    return

    def _archive_in(self, url: str, image: ImageRef, path: Path) -> bool:
        store = self._stores.store(url)
        if isinstance(store, S3Store):
            return jobs.run(self._patience, indexjobs.archive_in_s3, self._settings, url, image, str(path))
        with open(path, "wb") as out:
            if isinstance(store, DirectoryStore):
                return store.fetch(archive_name(image), out)
            return self._stores.oci.find_archive(image, out)

    def _here(self, image: ImageRef, name: str = "") -> int | None:
        fd = self.local.open(name or name_of(image))
        if fd is not None and not self._is_of(fd, image, self.local.url):
            os.close(fd)
            return None
        return fd

    def _is_of(self, file: int | Path, image: ImageRef, store: str) -> bool:
        """Whether an index that a store gave is that of `image`."""
        try:
            found = self.identify(file).ref
        except ShimError as error:
            log.warning("a store has something else than an index", store=store, image=str(image), error=str(error))
            return False
        if (found.name, found.digest) == (image.name, image.digest):
            return True
        log.warning("a store has the index of another image", store=store, image=str(image), found=str(found))
        return False

    def _bring(self, image: ImageRef) -> None:
        """Keep the index of `image` here too, from the first store that has it."""
        for url in self._lookup:
            with self.temporary() as path:
                if self._try(url, self._find_in, image, path) and self._is_of(path, image, url):
                    self._keep_here(image, path)
                    return

    def by_name(self, name: str) -> int | None:
        """What the stores have under a name that is no image's, the first that has it."""
        fd = self.local.open(name)
        if fd is not None:
            return fd
        for url in self._lookup:
            with self.temporary() as path:
                if self._try(url, self._name_in, name, path):
                    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return None

    def _find_in(self, url: str, image: ImageRef, path: Path) -> bool:
        store = self._stores.store(url)
        if isinstance(store, S3Store):
            return jobs.run(self._patience, indexjobs.find_in_store, self._settings, url, image, str(path))
        with open(path, "wb") as out:
            return store.find(image, out)

    def _name_in(self, url: str, name: str, path: Path) -> bool:
        return jobs.run(self._patience, indexjobs.fetch_by_name, self._settings, url, name, str(path))

    def _try(self, url: str, ask: Callable[..., bool], *arguments: object) -> bool:
        try:
            return ask(url, *arguments)
        except ShimError as error:
            log.warning("an index store cannot be used", store=url, error=str(error), hint=error.hint)
            return False

    @property
    def _patience(self) -> float:
        """Seconds that one store may take, out of what a create has."""
        return float(self._settings["mount_deadline"] / 3)

    def _obtain(self, image: ImageRef) -> None:
        """See to it that the index of `image` is here."""
        self._bring(image)
        fd = self._here(image)
        if fd is not None:
            os.close(fd)
            return
        self._index(image)

    def _index(self, image: ImageRef) -> None:
        """Make the index of `image`, keep it here, and give it to the stores that are written."""
        started = time.monotonic()
        log.info("making the index of an image", image=str(image))
        with self.temporary() as path:
            jobs.run(self._settings["image_deadline"], indexjobs.index_image, self._settings, image, str(path))
            self._keep_here(image, path)
            log.info("indexed", image=str(image), seconds=round(time.monotonic() - started, 2))
            for url in self._write:
                self._try(url, self._keep_in, image, path)

    def _keep_here(self, image: ImageRef, path: Path) -> None:
        self.put(digest_name(path), path, replace=False)
        self.put(name_of(image), path)

    def put(self, name: str, path: Path, *, replace: bool = True) -> None:
        """Keep an index, or an archive, below STATE/indexes as `name`, until the cleaner takes it."""
        self.local.put(name, path, replace=replace, note=note_of(self.identify(path)))

    def _keep_in(self, url: str, image: ImageRef, path: Path) -> bool:
        if isinstance(self._stores.store(url), S3Store):
            where = jobs.run(self._patience, indexjobs.keep_in_store, self._settings, url, image, str(path))
        else:
            where = self._stores.store(url).keep(image, path)
        log.info("index stored", image=str(image), url=where)
        return True

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """A new empty file below STATE, gone afterwards unless it was renamed."""
        try:
            handle, name = tempfile.mkstemp(dir=self._making)
            os.close(handle)
        except OSError as error:
            raise StoreError(f"no file can be made in {self._making}: {error.strerror}") from error
        try:
            yield Path(name)
        finally:
            for left in (Path(name), *self._making.glob(f".{Path(name).name}.*")):  # a killed job writes beside it
                left.unlink(missing_ok=True)
