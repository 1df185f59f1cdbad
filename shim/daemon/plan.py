"""Plan B: what is done, in the order of the setting `fallback`, until a container has its tree.

lazy      the tree is mounted, bytes come when they are read
archive   a v1 archive of the image, which has all data, takes the place of its index
eager     all layers are fetched whole into the cache, then the same mount; an index that turns out to be wrong is
          made again from the registry
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from shim import log
from shim.daemon.eager import Eager
from shim.daemon.imageindexes import Announce, ImageIndexes
from shim.daemon.imagetree import Files, Lease
from shim.daemon.resolve import Resolver, show
from shim.daemon.trees import Trees
from shim.errors import (
    AbsentError,
    ConfigError,
    IndexFormatError,
    IntegrityError,
    LayerError,
    ShimError,
    TrustError,
    UsageError,
)
from shim.settings import Settings

_FINAL = (TrustError, UsageError, ConfigError)  # another step would only get round what these forbid


@dataclass(frozen=True, slots=True)
class Request:
    """What a container asks for (see Resolver.open)."""

    source: str
    value: str
    fd: int | None
    announce: Announce


class Plan:
    """Thread-safe; has no state of its own. Which step was taken, and why, is said in the log, in the answer and in
    `status`."""

    def __init__(self, settings: Settings, resolver: Resolver, trees: Trees, eager: Eager) -> None:
        self._settings = settings
        self._resolver = resolver
        self._indexes: ImageIndexes = resolver.indexes
        self._trees = trees
        self._eager = eager
        self._steps: tuple[str, ...] = settings["fallback"]

    def acquire(self, request: Request) -> Lease:
        """A lease on the tree, by the first step that works. Raises the first step's error, which names the others'."""
        failures: list[tuple[str, ShimError]] = []
        for step in self._steps:
            if failures:  # what follows may take longer than a create has; nobody waits for a plan without steps left
                request.announce(self._settings["image_deadline"] + self._settings["mount_deadline"])
            reason = str(failures[0][1]) if failures else ""
            try:
                lease = self._take(step, request, reason)
            except _FINAL:
                raise
            except ShimError as error:
                if not isinstance(error, AbsentError) or not failures:
                    failures.append((step, error))
                if len(self._steps) > 1:
                    log.warning("plan B: a step failed", step=step, reference=show(request.value), error=str(error))
                continue
            if failures:
                image = lease.answer["image"]
                log.warning("plan B: another step was taken", step=step, image=image, reason=reason)
            return lease
        first = failures[0][1]
        others = "; ".join(f"{step}: {other}" for step, other in failures[1:])
        if others:
            first.args = (f"{first} (plan B failed too: {others[:1000]})",)
        raise first

    def _take(self, step: str, request: Request, reason: str) -> Lease:
        if step == "lazy":
            return self._lazy(request, reason)
        return self._archive(request, reason) if step == "archive" else self._eagerly(request, reason)

    def _lazy(self, request: Request, reason: str) -> Lease:
        seconds = self._settings["lazy_deadline"] if len(self._steps) > 1 else None
        with self._resolver.open(request.source, request.value, request.fd, request.announce) as files:
            return self._trees.acquire(files, seconds=seconds, step=("lazy", reason))

    def _archive(self, request: Request, reason: str) -> Lease:
        image = self._resolver.image(request.source, request.value, request.fd)
        fd = None if image is None else self._indexes.archive(image)
        if fd is None:
            raise AbsentError(f"no archive of {image or 'the image'} is known", hint="see `clip-shim build --help`")
        try:
            return self._trees.acquire(self._resolver.checked(request.source, fd, fd), step=("archive", reason))
        finally:
            os.close(fd)

    def _eagerly(self, request: Request, reason: str) -> Lease:
        """With an index of the image that is kept here, if it is another than the one that was given; with that one;
        and with one that is made now."""
        step = ("eager", reason)
        image = self._resolver.image(request.source, request.value, request.fd)
        trouble: ShimError | None = None
        try:
            with self._resolver.open(request.source, request.value, request.fd, request.announce) as files:
                fd = None if image is None else self._indexes.find(image)
                if fd is not None:
                    with open(fd, "rb"):
                        other = self._resolver.checked(request.source, fd, fd)
                        if other.head.hex != files.head.hex:
                            log.info("another index of the image is used", image=str(image))
                            return self._whole(other, step)
                return self._whole(files, step)
        except (IndexFormatError, IntegrityError, LayerError) as error:
            if image is None:
                raise
            trouble = error
        log.warning("the index is wrong: making another", image=str(image), error=str(trouble))
        with open(self._indexes.remake(image), "rb") as made:
            return self._whole(self._resolver.checked(request.source, made.fileno(), made.fileno()), step)

    def _whole(self, files: Files, step: tuple[str, str]) -> Lease:
        return self._trees.acquire(files, seconds=self._settings["image_deadline"], fill=self._eager.fill, step=step)
