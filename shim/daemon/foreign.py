"""Go clip's files as references: the native index that stands for one, made once on a node and kept.

v2 index      its image is indexed afresh from the registry, as for image://REF: a v2 file has no restart points and has
              lost modes, xattrs, devices, hard links and directories. Its layers go into the cache in the same pass.
v1 archive    read once, every CRC compared; the data stay in the archive.
v1 pointer    the same with the archive in S3; what is read goes into the cache. One that we made says all itself.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from shim import log
from shim.daemon import foreignjobs, jobs
from shim.daemon.flights import Flights
from shim.daemon.imageindexes import Announce, ImageIndexes
from shim.daemon.indexfile import Identity, identity
from shim.daemon.trust import Trust
from shim.errors import TrustError
from shim.goclip import files
from shim.index import container
from shim.registry.ref import ImageRef
from shim.settings import Settings
from shim.stores.s3 import options_of
from shim.stores.urls import S3Place

_LOOK_SECONDS = 30.0
_KNOWN = 1024


class ForeignFiles:
    """Concurrency: called by control connections' threads. Gob is decoded in jobs. `_known` is a cache: a lost entry
    costs a job. One thread makes an archive's index, others wait for it (Flights)."""

    def __init__(
        self, settings: Settings, trust: Trust, indexes: ImageIndexes, pin: Callable[[ImageRef], ImageRef]
    ) -> None:
        """pin: gives a reference the digest of its manifest for this machine."""
        self._settings = settings
        self._trust = trust
        self._indexes = indexes
        self._pin = pin
        self._flights = Flights()
        self._known: dict[Identity, foreignjobs.Look] = {}

    def open(self, source: str, fd: int, announce: Announce) -> int | None:
        """A descriptor of the native index for the file at `fd`; None if that is no foreign file.

        source: where the reference stood. Raises TrustError when it leads where its source may not, and ShimError.
        """
        info = os.fstat(fd)
        try:
            if not stat.S_ISREG(info.st_mode) or not files.is_go(os.pread(fd, len(files.MAGIC), 0)):
                return None
        except OSError:
            return None  # it cannot be read: who takes it for an index says so
        if container.start_of_part(lambda offset, length: os.pread(fd, length, offset), info.st_size):
            return None
        path = f"/proc/{os.getpid()}/fd/{fd}"
        look = self._known.get(identity(info))
        if look is None:
            look = jobs.run(_LOOK_SECONDS, foreignjobs.look, path)
            if len(self._known) >= _KNOWN:
                self._known.clear()
            self._known[identity(info)] = look
        if isinstance(look.place, files.OciPlace):
            ref = foreignjobs.image_of(look.place)
            self._trust.check_registry(source, ref)
            return self._indexes.get(self._pin(ref), announce)
        if isinstance(look.place, files.S3Place):
            self._check_pointer(source, look.place)
        return self._archive(path, look, announce)

    def _check_pointer(self, source: str, place: files.S3Place) -> None:
        """The node's credentials go where its own configuration says, never where a file does."""
        self._trust.check_store(source, S3Place(place.bucket, place.key))
        own = str(options_of(self._settings["stores.s3"], place.bucket).get("endpoint", ""))
        if place.endpoint and place.endpoint.rstrip("/") != own.rstrip("/"):
            raise TrustError(
                f"the file's data are at another S3 endpoint than `stores.s3.{place.bucket}.endpoint` names",
                hint=f"set it to {place.endpoint[:200]!r} if you trust that",
            )

    def _archive(self, path: str, look: foreignjobs.Look, announce: Announce) -> int:
        name = f"archives/{look.key}.clip"
        fd = self._indexes.local.open(name)
        while fd is None:
            announce(self._settings["image_deadline"] + self._settings["mount_deadline"])
            self._flights.once(look.key, lambda: self._make(path, look, name))
            fd = self._indexes.local.open(name)
        return fd

    def _make(self, path: str, look: foreignjobs.Look, name: str) -> None:
        log.info("a foreign archive is read once, to index it", archive=look.key)
        with self._indexes.temporary() as out:
            jobs.run(
                self._settings["image_deadline"],
                foreignjobs.index_archive,
                self._settings,
                path,
                look.place if isinstance(look.place, files.S3Place) else None,
                str(out),
            )
            self._indexes.put(name, out)
