"""From what a container's bundle says to an index file that is open: the values of `acquire`.

an open file          a path, file://, a bundle's or a thin image's index: the wrapper opened it
image://REF           REF's digest is looked up in the stores; if none has its index, it is made, once, and kept
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shim import log
from shim.daemon import imagejob, jobs
from shim.daemon.trust import Trust
from shim.errors import DaemonError, IndexFormatError, ShimError, StoreError
from shim.index import codec
from shim.registry.client import RegistryClient
from shim.registry.ref import ImageRef
from shim.settings import Settings
from shim.stores.base import IndexStore, name_of
from shim.stores.directory import DirectoryStore

Announce = Callable[[float], None]
"""Tells whoever waits for the answer that it may take this many seconds more."""

_IMAGE = "image://"


class _Flight:
    """An index that is being made: who comes meanwhile waits for `done`. error: why it was not."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: ShimError | None = None


class Resolver:
    """Concurrency: called by control connections' threads, which wait for networks and jobs here; nothing that serves
    reads does. `_lock` guards `_flights`, the images that are being indexed: one thread makes an index, the others
    that ask for it wait, and share its failure. What was made lies in the local store before the flight ends.

    Crashes: a job's file has a name of its own below STATE/indexes/.making, which is emptied at start.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._trust = Trust(settings)
        self._client = RegistryClient(settings["registries"], deadline=settings["mount_deadline"] / 2)
        self._local = DirectoryStore(settings.state_dir / "indexes")
        self._others: list[IndexStore] = []
        self._making = settings.state_dir / "indexes" / ".making"
        self._making.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in self._making.iterdir():
            left.unlink(missing_ok=True)
        self._lock = threading.Lock()
        self._flights: dict[str, _Flight] = {}

    @contextmanager
    def open(self, source: str, value: str, fd: int | None, announce: Announce) -> Iterator[int]:
        """A descriptor of the native index that `value` leads to, closed at the end.

        source: where the value stood ("annotation", "bundle", "marker", "env", "mount"). fd: the file, if the wrapper
        opened one. Raises TrustError when the value leads where its source may not, and ShimError.
        """
        own = None
        try:
            if fd is None:
                fd = own = self._remote(source, value, announce)
            self._check_image(source, fd)
            yield fd
        finally:
            if own is not None:
                os.close(own)

    def _remote(self, source: str, value: str, announce: Announce) -> int:
        if value.startswith(_IMAGE):
            return self._image(source, ImageRef.parse(value[len(_IMAGE) :], local_paths=False), announce)
        raise DaemonError(
            f"the reference {show(value)!r} names no file",
            hint="use an index file (`clip-shim index REF -o FILE`) or image://REF",
        )

    def _check_image(self, source: str, fd: int) -> None:
        """Where the layers are is as much a lead as the reference itself."""
        if self._trust.is_narrowed(source):
            self._trust.check_registry(source, _image_of(fd)[0])

    def _image(self, source: str, ref: ImageRef, announce: Announce) -> int:
        """The index of an image: from a store, or made now."""
        self._trust.check_registry(source, ref)
        image = ref.with_digest(self._client.resolve(ref).digest)
        fd = self._find(image)
        while fd is None:
            announce(self._settings["image_deadline"] + self._settings["mount_deadline"])
            self._make(image)
            fd = self._local.open(name_of(image))
        return fd

    def _find(self, image: ImageRef) -> int | None:
        """The index of `image` in the first store that has it; one from elsewhere is kept here too."""
        fd = self._local.open(name_of(image))
        if fd is not None:
            if _is_of(fd, image, self._local):
                return fd
            os.close(fd)
        for store in self._others:
            with self._temporary() as path:
                try:
                    with open(path, "wb") as out:
                        found = store.find(image, out)
                    if not found or not _is_of(path, image, store):
                        continue
                    self._local.put(name_of(image), path, replace=True)
                except ShimError as error:
                    log.warning("an index store cannot be used", store=store.url, error=str(error))
                    continue
                return self._local.open(name_of(image))
        return None

    def _make(self, image: ImageRef) -> None:
        """Index `image` and keep the result, or wait for the thread that does."""
        key = name_of(image)
        with self._lock:
            flight = self._flights.get(key)
            mine = flight is None
            if flight is None:
                flight = self._flights[key] = _Flight()
        if not mine:
            flight.done.wait()
            if flight.error is not None:
                raise type(flight.error)(str(flight.error), hint=flight.error.hint)
            return
        try:
            self._index(image)
        except ShimError as error:
            flight.error = error
            raise
        except BaseException as error:
            flight.error = DaemonError(f"the index of {image} was not made: {error!r}")
            raise
        finally:
            with self._lock:
                del self._flights[key]
            flight.done.set()

    def _index(self, image: ImageRef) -> None:
        started = time.monotonic()
        log.info("no store has the image's index: making it", image=str(image))
        assert image.digest is not None
        with self._temporary() as path:
            jobs.run(
                self._settings["image_deadline"],
                imagejob.index_image,
                image.registry,
                image.repository,
                image.tag,
                image.digest,
                self._settings["registries"],
                str(path),
            )
            self._local.put(name_of(image), path, replace=True)
        log.info("indexed", image=str(image), seconds=round(time.monotonic() - started, 2))

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A new empty file below STATE, gone afterwards."""
        try:
            handle, name = tempfile.mkstemp(dir=self._making)
            os.close(handle)
        except OSError as error:
            raise StoreError(f"no file can be made in {self._making}: {error.strerror}") from error
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)


def show(value: str) -> str:
    """A value from outside in a message: printable and short."""
    return "".join(c if c.isprintable() else "?" for c in value[:1024])


def _image_of(file: int | Path) -> tuple[ImageRef, str]:
    """(image, digest of its manifest) that an index file is about. Raises IndexFormatError."""
    with open(file, "rb", closefd=not isinstance(file, int)) as opened:
        try:
            data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except (ValueError, OSError) as error:
            raise IndexFormatError("the index is empty or cannot be read") from error
        with data:
            facts = codec.summary(data)
    return ImageRef.parse(facts["image"], local_paths=False), facts["digest"]


def _is_of(file: int | Path, image: ImageRef, store: IndexStore) -> bool:
    """Whether an index that a store gave is that of `image`."""
    try:
        ref, digest = _image_of(file)
    except ShimError as error:
        log.warning("a store has something else than an index", store=store.url, image=str(image), error=str(error))
        return False
    if digest == image.digest and ref.name == image.name:
        return True
    log.warning("a store has the index of another image", store=store.url, image=str(image), found=f"{ref}@{digest}")
    return False
