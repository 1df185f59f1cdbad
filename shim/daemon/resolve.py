"""From what a container's bundle says to an index file that is open: the values of `acquire`.

an open file            a path, file://, a bundle's or a thin image's index: the wrapper opened it
s3://BUCKET/KEY         an object; a copy of what it last gave is kept, and serves while S3 cannot be reached
oci://REGISTRY/REPO…    an artifact, or the index beside an image; kept likewise
image://REF             REF's digest is looked up in the stores; if none has its index, it is made, once, and kept
NAME, sha256:HEX, REPOSITORY@sha256:HEX
                        from an environment variable: only what the stores have already
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from shim import log
from shim.daemon import indexjobs, jobs
from shim.daemon.flights import Flights
from shim.daemon.foreign import ForeignFiles
from shim.daemon.imageindexes import Announce, ImageIndexes
from shim.daemon.imagetree import Files
from shim.daemon.keptindexes import TAGS, URLS, note_of, stamp
from shim.daemon.trust import Trust, registry_client
from shim.errors import (
    AbsentError,
    DaemonError,
    IndexFormatError,
    IntegrityError,
    RegistryError,
    ShimError,
    StoreError,
    TrustError,
)
from shim.index import container
from shim.registry import platform as platforms
from shim.registry.ref import ImageRef, check_digest
from shim.registry.retry import RetryPolicy
from shim.settings import Settings
from shim.stores import urls
from shim.stores.base import whole_file
from shim.stores.directory import set_note
from shim.stores.oci import OciStore
from shim.stores.urls import OciPlace, S3Place

_IMAGE = "image://"
_TAG = "user.clip.tag"  # extended attribute of a kept copy: the ETag or digest it had
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.:-]*)*\Z")


class Resolver:
    """See the module. Concurrency and crashes: as ImageIndexes; besides, STATE/indexes/.urls has the copies of what
    URLs gave (named by the URL's hash) and STATE/indexes/.tags the digests of image tags. Both are replaced whole."""

    def __init__(self, settings: Settings) -> None:
        """Raises ConfigError and UsageError for settings that make no sense."""
        self._settings = settings
        self._trust = Trust(settings)
        self._client = registry_client(
            settings, policy=RetryPolicy(attempts=3), deadline=settings["mount_deadline"] / 3
        )
        self._oci = OciStore(self._client)
        self.indexes = ImageIndexes(settings, self._client)
        self._foreign = ForeignFiles(settings, self._trust, self.indexes, self._pin)
        self._flights = Flights()
        self._urls = settings.state_dir / "indexes" / URLS
        self._tags = settings.state_dir / "indexes" / TAGS
        for directory in (self._urls, self._tags):
            directory.mkdir(mode=0o700, exist_ok=True)

    @contextmanager
    def open(self, source: str, value: str, fd: int | None, announce: Announce) -> Iterator[Files]:
        """The native index that `value` leads to, with the file that it was made from, which is the archive if it is
        the index of a local one. What is open is closed at the end.

        source: where the value stood ("annotation", "bundle", "marker", "env", "mount"). fd: the file, if the wrapper
        opened one. Raises TrustError when the value leads where its source may not, and ShimError.
        """
        own = []
        try:
            if fd is None:
                fd = self._remote(source, value, announce)
                own.append(fd)
            index = self._foreign.open(source, fd, announce)
            if index is None:
                index = fd
            else:
                own.append(index)
            yield self.checked(source, index, fd)
        finally:
            for each in own:
                os.close(each)

    def checked(self, source: str, index: int, archive: int) -> Files:
        """The open index, if it may be used: where it says its data are is as much a lead as the reference itself.

        Raises TrustError, IndexFormatError.
        """
        head = self.indexes.identify(index)
        if head.archive is None:
            if self._trust.is_narrowed(source):
                self._trust.check_registry(source, head.ref)
        elif head.archive:
            place = urls.parse(head.archive)
            assert isinstance(place, S3Place)
            self._trust.check_store(source, place)
        return Files(head, index, archive)

    def image(self, source: str, value: str, fd: int | None) -> ImageRef | None:
        """The image that a value is about, by its platform's manifest, also where its index cannot be used; None: that
        is not known. Raises TrustError."""
        try:
            if value.startswith(_IMAGE):
                found = self._pin(ImageRef.parse(value[len(_IMAGE) :], local_paths=False))
            elif fd is not None:
                found = self.indexes.identify(fd).ref
            else:
                with self.open(source, value, None, lambda _: None) as files:
                    return files.head.ref
        except (IndexFormatError, RegistryError, StoreError):
            return None
        self._trust.check_registry(source, found)
        return found

    def _remote(self, source: str, value: str, announce: Announce) -> int:
        if source == "env":
            return self._named(value)
        if value.startswith(_IMAGE):
            ref = ImageRef.parse(value[len(_IMAGE) :], local_paths=False)
            self._trust.check_registry(source, ref)
            return self.indexes.get(self._pin(ref), announce)
        if value.startswith(("s3://", "oci://")):
            place = urls.parse(value)
            if isinstance(place, OciPlace):
                self._trust.check_registry(source, place.ref)
                return self._url(value, place)
            assert isinstance(place, S3Place)
            self._trust.check_store(source, place)
            return self._url(value, place)
        raise DaemonError(
            f"the reference {show(value)!r} names no file",
            hint="use an index file (`clip-shim index REF -o FILE`), oci://, s3:// or image://REF",
        )

    def _pin(self, ref: ImageRef) -> ImageRef:
        """`ref` by the digest of the manifest for this machine. A tag that the registry cannot be asked for now means
        what it meant last; a digest's manifest never changes."""
        memory = self._tags / sha256(f"{ref} {platforms.host()}".encode()).hexdigest()
        known = _read_digest(memory)
        stamp(memory)
        if known is not None and ref.digest is not None:
            return ref.with_digest(known)
        try:
            digest = self._client.resolve(ref).digest
        except RegistryError as error:
            if known is None or not error.retryable:
                raise
            log.warning("the registry cannot be asked: the tag means what it did", image=str(ref), error=str(error))
            return ref.with_digest(known)
        if digest != known:
            with whole_file(memory) as out:
                out.write(digest.encode())
        return ref.with_digest(digest)

    def _url(self, value: str, place: S3Place | OciPlace) -> int:
        """What a URL gives now, or gave last when that cannot be had for now."""
        kept = self._urls / sha256(value.encode()).hexdigest()
        known = _tag_of(kept)
        stamp(kept)
        if not (known and isinstance(place, OciPlace) and place.ref.digest is not None):
            self._flights.once(value, lambda: self._fetch(value, place, kept, known))
        try:
            return os.open(kept, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # the cleaner was faster
            self._flights.once(value, lambda: self._fetch(value, place, kept, None))
            return os.open(kept, os.O_RDONLY | os.O_CLOEXEC)

    def _fetch(self, value: str, place: S3Place | OciPlace, kept: Path, known: str | None) -> None:
        with self.indexes.temporary() as path:
            try:
                tag = self._pull(value, place, path, known)
            except (RegistryError, StoreError, DaemonError) as error:
                passing = isinstance(error, DaemonError) or error.retryable
                if known is None or not passing:
                    raise
                log.warning("what was kept is used: the index cannot be fetched", url=show(value), error=str(error))
                return
            if tag is not None:
                try:
                    head = self.indexes.identify(path)
                except IndexFormatError:
                    head = None  # Go's, or nothing that can be used
                _keep(path, kept, tag, note_of(head))

    def _pull(self, value: str, place: S3Place | OciPlace, path: Path, known: str | None) -> str | None:
        if isinstance(place, S3Place):
            patience = self._settings["mount_deadline"] / 3
            return jobs.run(patience, indexjobs.pull_url, self._settings, value, str(path), known)
        ref = place.ref if place.ref.tag or place.ref.digest else ImageRef.parse(place.ref.name, local_paths=False)
        with open(path, "w+b") as out:
            return self._oci.pull(ref, out, limit=container.MAX_FILE, known=known)

    def _named(self, value: str) -> int:
        """A name or digest that an image's own environment may have set: it leads to what the stores have, no more."""
        if not _NAME.match(value.replace("@", "/", 1)):
            raise TrustError(f"{show(value)!r} is neither a name nor a digest", hint="name an index of the stores")
        if value.startswith("sha256:"):
            fd = self._by_hash(check_digest(value))
        elif "@" in value:
            image = ImageRef.parse(value, local_paths=False)
            self._trust.check_registry("env", image)
            fd = self.indexes.find(image)
        else:
            fd = self.indexes.by_name(value if value.endswith(".clip") else f"{value}.clip")
        if fd is None:
            raise AbsentError(
                f"no store has the index {show(value)}",
                hint="see `stores.lookup`; `clip-shim index REF --push` puts it there",
            )
        return fd

    def _by_hash(self, digest: str) -> int | None:
        fd = self.indexes.by_name(f"{digest.replace(':', '-')}.clip")
        if fd is None:
            return None
        try:
            with open(os.dup(fd), "rb") as file:
                actual = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
            if actual != digest:
                raise IntegrityError(
                    f"a store has {actual} under the name of {digest}", hint="remove it from the store, push it again"
                )
        except BaseException:
            os.close(fd)
            raise
        return fd


def show(value: str) -> str:
    """A value from outside in a message: printable and short."""
    return "".join(c if c.isprintable() else "?" for c in value[:1024])


def _read_digest(path: Path) -> str | None:
    try:
        return check_digest(path.read_bytes()[:256].decode("ascii", "replace"))
    except (OSError, ShimError):
        return None


def _tag_of(kept: Path) -> str | None:
    """What a copy was called by its store; "" when that could not be noted, None when there is no copy."""
    try:
        return os.getxattr(kept, _TAG).decode("utf-8", "replace")
    except OSError:
        return "" if kept.exists() else None


def _keep(path: Path, kept: Path, tag: str, note: tuple[str, bytes]) -> None:
    """Name a fetched file, with its tag and note, in one step."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            set_note(fd, _TAG, tag.encode())  # where that cannot be, it is fetched each time
            set_note(fd, *note)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(path, kept)
    except OSError as error:
        raise StoreError(f"the index cannot be kept in {kept.parent}: {error.strerror}") from error
