"""The trees that are mounted: one for each index digest, shared by all containers of an image."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from shim import log
from shim.daemon import jobs, mounter, prepare
from shim.daemon.layers import Layers
from shim.daemon.portable import PortableTree
from shim.errors import IndexFormatError, ShimError
from shim.mount import mountinfo
from shim.settings import Settings

_MAX_INDEX = 512 << 20  # bytes; a 100 GB image's index is about 200 MB


@dataclass(slots=True)
class ImageTree:
    """One image. `lock` is held while it is prepared, mounted or unmounted; `leases` counts control connections."""

    hex: str
    lock: threading.Lock = field(default_factory=threading.Lock)
    meta: dict[str, Any] | None = None
    mounted: str | None = None  # the tier, while it is mounted
    leases: int = 0
    last_used: float = 0.0
    portable: PortableTree | None = None


@dataclass(slots=True)
class Lease:
    """While a lease is open its tree stays mounted. Closing it twice is harmless."""

    tree: ImageTree
    answer: dict[str, Any]
    release: Callable[[], None]


class Trees:
    """Mounts and unmounts trees.

    Concurrency: `_lock` guards the dict, every `leases` and `last_used`, and is never held across a job. A tree's own
    `lock` serialises its prepare → layers → mount → unmount; a waiting acquire finds the tree mounted when its turn
    comes. `reap` takes a tree's lock only if it is free, and unmounts only when `leases` is 0 *under both locks*, so a
    lease that was given can never lose its tree.

    Crashes: STATE/trees/<hex> counts only with its meta.json, which is written last (see prepare.py). RUN/trees/<hex>
    mounts left by a dead daemon are detached at start (mounter.clear_stale) and made again on demand.
    """

    def __init__(self, settings: Settings, layers: Layers, blobs_dir: str) -> None:
        self._settings = settings
        self._layers = layers
        self._blobs = blobs_dir
        self._lock = threading.Lock()
        self._trees: dict[str, ImageTree] = {}
        self._known: dict[tuple[int, ...], str] = {}  # index file identity -> hex, so a hot start hashes nothing
        self._tier: tuple[str, str] | None = None
        self._tier_lock = threading.Lock()
        self._state = settings.state_dir / "trees"
        self._run = settings.run_dir / "trees"
        for directory in (self._state, self._run):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def tier(self) -> tuple[str, str]:
        """(tier, reason): what `tree:` says, or the best that was seen to work here."""
        with self._tier_lock:
            if self._tier is None:
                wanted = self._settings["tree"]
                if wanted == "auto":
                    self._tier = jobs.run(30, mounter.probe_tier, str(self._state))
                else:
                    self._tier = (wanted, "configured")
                log.info("tree tier chosen", tier=self._tier[0], reason=self._tier[1])
            return self._tier

    def acquire(self, fd: int) -> Lease:
        """A lease on the mounted tree of the index file open at `fd`. Raises ShimError; nothing is left half made."""
        timings: dict[str, float] = {}
        started = time.monotonic()
        hex_ = self._take_index(fd)
        timings["index"] = _ms(started)
        with self._lock:
            tree = self._trees.setdefault(hex_, ImageTree(hex_))
            tree.leases += 1
        try:
            with tree.lock:
                if tree.mounted is None:
                    self._mount(tree, timings)
        except BaseException:
            self._release(tree)
            raise
        timings["total"] = _ms(started)
        meta = tree.meta or {}
        answer = {
            "index": f"sha256:{hex_}",
            "image": meta["image"],
            "tree": str(self._run / hex_),
            "tier": tree.mounted,
            "symlinks": meta["symlinks"],
            "dirs": meta["dirs"],
            "timings": timings,
        }
        once = threading.Event()

        def release() -> None:
            if not once.is_set():
                once.set()
                self._release(tree)

        return Lease(tree, answer, release)

    def _release(self, tree: ImageTree) -> None:
        with self._lock:
            tree.leases -= 1
            tree.last_used = time.monotonic()

    def _take_index(self, fd: int) -> str:
        """Copy the index into STATE/trees/<hex>/index.clip unless it is there; returns the hex of its SHA-256."""
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_size > _MAX_INDEX:
            raise IndexFormatError("the index must be a regular file of at most 512 MiB")
        identity = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
        known = self._known.get(identity)
        if known is not None and (self._state / known / "index.clip").exists():
            return known
        hasher = sha256()
        temporary = self._state / f".incoming-{threading.get_ident()}"
        try:
            with open(temporary, "wb") as out:
                offset = 0
                while piece := os.pread(fd, 1 << 20, offset):
                    offset += len(piece)
                    if offset > _MAX_INDEX:
                        raise IndexFormatError("the index grew while it was read")
                    hasher.update(piece)
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())
            hex_ = hasher.hexdigest()
            directory = self._state / hex_
            directory.mkdir(mode=0o700, exist_ok=True)
            temporary.rename(directory / "index.clip")
        finally:
            temporary.unlink(missing_ok=True)
        if len(self._known) > 4096:
            self._known.clear()
        self._known[identity] = hex_
        return hex_

    def _mount(self, tree: ImageTree, timings: dict[str, float]) -> None:
        """tree.lock is held: prepare, add the layers, mount."""
        directory = self._state / tree.hex
        deadline = self._settings["mount_deadline"]
        started = time.monotonic()
        tier, _ = self.tier()
        meta = prepare.read_meta(directory) or jobs.run(deadline, prepare.prepare_tree, str(directory), tier != "fuse")
        timings["prepare"] = _ms(started)
        self._layers.add(tree.hex, meta, directory)
        try:
            started = time.monotonic()
            names = [layer["blob"] for layer in meta["layers"]]
            target = str(self._run / tree.hex)
            if tier == "fuse":
                tree.portable = PortableTree.start(directory / "index.clip", self._blobs, names, target, deadline)
            else:
                self._mount_erofs(directory, meta, names, target, tier)
            timings["mount"] = _ms(started)
        except BaseException:
            self._layers.discard(tree.hex)
            raise
        tree.meta, tree.mounted = meta, tier
        log.info("tree mounted", image=meta["image"], index=tree.hex, tier=tier, timings=timings)

    def _mount_erofs(self, directory: Path, meta: dict[str, Any], names: list[str], target: str, tier: str) -> None:
        # Only what costs no fetch is compared now, and programs' loaders, which the container reads first anyway.
        probes = [
            probe
            for probe in meta["probes"]
            if probe["rank"] == 0 or self._layers.cached(names[probe["layer"]], probe["offset"], probe["length"])
        ]
        jobs.run(
            self._settings["mount_deadline"],
            mounter.build_and_mount,
            directory=str(directory),
            blobs=self._blobs,
            names=names,
            target=target,
            tier=tier,
            probes=probes,
        )

    def reap(self) -> None:
        """Unmount trees that nobody has used for `tree_linger`. Called every few seconds by one thread."""
        linger = self._settings["tree_linger"]
        now = time.monotonic()
        used = overlay_users()
        with self._lock:
            idle = [t for t in self._trees.values() if t.leases == 0 and now - t.last_used >= linger]
        for tree in idle:
            if tree.hex not in used and tree.lock.acquire(blocking=False):
                try:
                    self._unmount(tree)
                except ShimError as error:
                    log.warning("tree not unmounted", index=tree.hex, error=str(error))
                finally:
                    tree.lock.release()
        self._layers.sweep()

    def _unmount(self, tree: ImageTree) -> None:
        """tree.lock is held."""
        with self._lock:
            if tree.leases or tree.mounted is None:
                return
        jobs.run(10, mounter.unmount_tree, str(self._run / tree.hex))
        if tree.portable is not None:
            tree.portable.stop()
            tree.portable = None
        tree.mounted = None
        self._layers.discard(tree.hex)
        log.info("tree unmounted", index=tree.hex)

    def close(self) -> bool:
        """Unmount every tree that has no lease; True if none is left mounted."""
        with self._lock:
            trees = list(self._trees.values())
        for tree in trees:
            with tree.lock:
                try:
                    self._unmount(tree)
                except ShimError as error:
                    log.warning("tree not unmounted", index=tree.hex, error=str(error))
        return all(tree.mounted is None for tree in trees)

    def status(self) -> list[dict[str, Any]]:
        """The images that are mounted, as `status --json` shows them."""
        used = overlay_users()
        with self._lock:
            return [
                {
                    "image": tree.meta["image"],
                    "digest": tree.meta["digest"],
                    "index": f"sha256:{tree.hex}",
                    "tree": str(self._run / tree.hex),
                    "tier": tree.mounted,
                    "leases": tree.leases,
                    "overlays": len(used.get(tree.hex, ())),
                    "layers": [layer["diff_id"] for layer in tree.meta["layers"]],
                }
                for tree in self._trees.values()
                if tree.mounted is not None and tree.meta is not None
            ]


def overlay_users() -> dict[str, list[str]]:
    """index hex -> mount points of the overlays made over its tree, as this mount namespace sees them."""
    users: dict[str, list[str]] = {}
    for entry in mountinfo.read():
        if entry.fs_type == b"overlay" and entry.source.startswith(b"clip:sha256:"):
            hex_ = entry.source[len(b"clip:sha256:") :].decode("ascii", "replace")
            users.setdefault(hex_, []).append(os.fsdecode(entry.mount_point))
    return users


def _ms(since: float) -> float:
    return round((time.monotonic() - since) * 1000, 1)
