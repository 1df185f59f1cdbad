"""The trees that are mounted: one for each index digest, shared by all containers of an image."""

from __future__ import annotations

import copy
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from shim import log
from shim.cache import discard
from shim.daemon import indexfile, jobs, mounter, preparation
from shim.daemon.imagetree import LAZY, Files, Fill, ImageTree, Lease
from shim.daemon.layers import Layers
from shim.daemon.overlays import is_used, mounted_trees, overlays, tree_users
from shim.daemon.portable import PortableTree
from shim.daemon.profile import Profile
from shim.daemon.startprofiles import StartProfiles
from shim.errors import DaemonError, ShimError
from shim.mount import mountinfo
from shim.settings import Settings

_SHARE = 0.9  # of `mount_deadline`
_UNMOUNT_SECONDS = 10.0
_GRACE_SECONDS = 10.0
_CLOSE_SECONDS = 2.0  # how long stopping waits for a tree that is being mounted


class Trees:
    """Mounts and unmounts trees.

    Concurrency: `_lock` guards the dict, every `leases` and `last_used`, and is never held across a job. A tree's own
    `lock` serialises its prepare → layers → mount → unmount; a waiting acquire finds the tree mounted when its turn
    comes, or hears of the failure of an attempt that began after it asked. Lock order: a tree's, then `_lock`, then
    those of Layers. `reap` takes a tree's lock only if it is free, and unmounts only when `leases` is 0 *under both
    locks*, so a lease that was given can never lose its tree.

    An acquire has nine tenths of `mount_deadline`, so that the wrapper, which has all of it, hears why it failed.

    Crashes: STATE/trees/<hex> counts only with its meta.json, which is written last (see prepare.py); what turns out to
    be damaged is made again from the index that is being asked for. RUN/trees/<hex> mounts of a dead daemon go on below
    its successor (handover.py); where nobody kept the blobs' descriptor they are detached at start.
    """

    def __init__(self, settings: Settings, layers: Layers, blobs_dir: str) -> None:
        self._settings = settings
        self._layers = layers
        self._blobs = blobs_dir
        self._lock = threading.Lock()
        self._closing = False
        self._trees: dict[str, ImageTree] = {}
        self._leaving: list[PortableTree] = []  # unmounted, but somebody else still has a mount of it
        self._tier: tuple[str, str] | None = None
        self._tier_lock = threading.Lock()
        self._state = settings.state_dir / "trees"
        self._profiles = StartProfiles(layers, self._state, enabled=settings["fetch.profile"])
        self._run = settings.run_dir / "trees"
        for directory in (self._state, self._run):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._run = self._run.resolve()  # as mountinfo has it
        indexfile.tidy(self._state)

    def adopt(self, tree: ImageTree) -> None:
        """After a hand-over, before anything is served: one that is mounted already. It stays for a moment even without
        a lease: leases died with the predecessor."""
        tree.last_used = time.monotonic() + _GRACE_SECONDS
        self._trees[tree.hex] = tree

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

    def acquire(
        self, files: Files, *, seconds: float | None = None, fill: Fill | None = None, step: tuple[str, str] = LAZY
    ) -> Lease:
        """A lease on the mounted tree of an index. Raises ShimError; nothing is left half made.

        seconds: how long it may take, by default nine tenths of `mount_deadline`, and no longer unless there is a fill.
        fill: brings the layers that are served into the cache before the mount. step: of `fallback`, and why.
        """
        timings: dict[str, float] = {}
        started = time.monotonic()
        hex_ = files.head.hex
        with self._lock:
            if self._closing:
                raise DaemonError("the daemon is stopping", hint="try again: the next container starts another")
            tree = self._trees.setdefault(hex_, ImageTree(hex_))
            tree.leases += 1
        try:
            usual = _SHARE * self._settings["mount_deadline"]
            share = usual if seconds is None else seconds if fill is not None else min(seconds, usual)
            meta = self._ensure_mounted(tree, files, started, started + share, timings, fill, step)
            self._layers.confirm_archive(meta, self._state / hex_, files.archive)
        except BaseException:
            self._release(tree)
            raise
        timings["total"] = _ms(started)
        answer = {
            "index": f"sha256:{hex_}",
            "image": meta["image"],
            "tree": str(self._run / hex_),
            "tier": tree.mounted,
            "device": tree.device,
            "symlinks": meta["symlinks"],
            "dirs": meta["dirs"],
            "timings": timings,
            "step": tree.step[0],
        }
        once = threading.Event()

        def release() -> None:
            if not once.is_set():
                once.set()
                self._release(tree)

        return Lease(tree, answer, [layer["blob"] for layer in meta["layers"]], release)

    def _release(self, tree: ImageTree) -> None:
        with self._lock:
            tree.leases -= 1
            tree.last_used = time.monotonic()

    def _ensure_mounted(
        self,
        tree: ImageTree,
        files: Files,
        asked: float,
        end: float,
        timings: dict[str, float],
        fill: Fill | None,
        step: tuple[str, str],
    ) -> dict[str, Any]:
        """The tree's meta, once it is mounted. The caller has a lease."""
        if not tree.lock.acquire(timeout=max(0.0, end - time.monotonic())):
            raise DaemonError("the tree is still being mounted for another container", hint=jobs.SLOW)
        try:
            if tree.mounted is not None and not self._is_there(tree):
                log.warning("a tree is no longer mounted; mounting it again", image=tree.image, index=tree.hex)
                self._let_go(tree)
            if tree.mounted is None or tree.meta is None:
                if tree.failed is not None and tree.failed[0] >= asked:
                    raise copy.copy(tree.failed[1])
                began = time.monotonic()
                try:
                    tree.meta = self._mount(tree, files, end, timings, fill)
                    tree.step = step
                except ShimError as error:
                    tree.failed = (began, copy.copy(error))  # without its traceback, which holds what was open
                    raise
                tree.failed = None
            return tree.meta
        finally:
            tree.lock.release()

    def _is_there(self, tree: ImageTree) -> bool:
        """Whether a tree that was mounted still is, and served: others can unmount it, or kill its server."""
        if tree.portable is not None and tree.portable.is_dead():
            return False
        entry = mountinfo.at(str(self._run / tree.hex))
        tree.device = entry.dev.decode() if entry is not None else ""
        return entry is not None

    def _let_go(self, tree: ImageTree) -> None:
        """tree.lock is held: it is not mounted any more, or nobody knows."""
        tree.mounted = None
        if tree.portable is not None:
            self._leaving.append(tree.portable)
            tree.portable = None
        self._layers.discard(tree.hex)

    def _mount(
        self, tree: ImageTree, files: Files, end: float, timings: dict[str, float], fill: Fill | None
    ) -> dict[str, Any]:
        """tree.lock is held: prepare, add the layers, fill them, mount."""
        directory = self._state / tree.hex
        target = str(self._run / tree.hex)
        started = time.monotonic()
        if mountinfo.at(self._blobs) is None:
            raise DaemonError(
                f"the layers' files are no longer mounted at {self._blobs}: somebody unmounted them",
                hint="end the containers that read lazily: after that the daemon mounts them again by itself",
            )
        tier, _ = self.tier()
        meta, access = preparation.ready(self._layers, self._profiles, tree.hex, directory, files, tier, end)
        timings["prepare"] = _ms(started)
        try:
            started = time.monotonic()
            access.result()
            timings["access"] = _ms(started)
            started = time.monotonic()
            names = [layer["blob"] for layer in meta["layers"]]
            if fill is not None:
                fill(names, end)
                timings["fill"] = _ms(started)
                started = time.monotonic()
                end = max(end, started + _SHARE * self._settings["mount_deadline"])
            if tier == "fuse":
                left = preparation.left(end)
                tree.portable = PortableTree.start(directory / "index.clip", self._blobs, names, target, left)
            else:
                self._mount_erofs(directory, meta, names, target, tier, preparation.left(end))
            timings["mount"] = _ms(started)
        except BaseException:
            self._layers.discard(tree.hex)
            if mountinfo.at(target) is not None:
                self._clear(tree)
            raise
        tree.mounted, tree.unsure = tier, False
        self._is_there(tree)
        log.info("tree mounted", image=meta["image"], index=tree.hex, tier=tier, timings=timings)
        return meta

    def profile(self, hex_: str) -> Profile:
        """The start profile of an index, () if none is known."""
        with self._lock:
            tree = self._trees.get(hex_)
        return self._profiles.current(hex_, tree.meta if tree is not None and tree.mounted is not None else None)

    def _mount_erofs(
        self, directory: Path, meta: dict[str, Any], names: list[str], target: str, tier: str, deadline: float
    ) -> None:
        # Only what costs no fetch is compared now, and programs' loaders, which the container reads first anyway.
        probes = [
            probe
            for probe in meta["probes"]
            if probe["rank"] == 0 or self._layers.cached(names[probe["layer"]], probe["offset"], probe["length"])
        ]
        jobs.run(
            deadline,
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
        with self._lock:
            idle = [tree for tree in self._trees.values() if not tree.leases and now - tree.last_used >= linger]
            for tree in idle:
                if tree.mounted is None and not tree.unsure and not tree.lock.locked():
                    del self._trees[tree.hex]
        used = self.users()  # after the leases: an overlay is there before its lease goes
        for tree in idle:
            if tree.hex not in used and tree.lock.acquire(blocking=False):
                try:
                    self._unmount(tree)
                finally:
                    tree.lock.release()
        self._leaving = [portable for portable in self._leaving if not portable.has_ended()]
        self._layers.sweep()
        self._profiles.end()

    def _unmount(self, tree: ImageTree) -> None:
        """tree.lock is held."""
        with self._lock:
            if tree.leases or (tree.mounted is None and not tree.unsure):
                return
        # from here on it counts as not mounted, whatever the job meets: the next acquire mounts anew
        self._let_go(tree)
        indexfile.touch(self._state / tree.hex)
        if self._clear(tree):
            self._layers.sweep()
            log.info("tree unmounted", image=tree.image, index=tree.hex)

    def _clear(self, tree: ImageTree) -> bool:
        """tree.lock is held. True: nothing is mounted at its path; False: that is unsure, `reap` tries again."""
        tree.unsure = True
        try:
            jobs.run(_UNMOUNT_SECONDS, mounter.unmount_tree, str(self._run / tree.hex))
        except ShimError as error:
            log.warning("tree not unmounted", image=tree.image, index=tree.hex, error=str(error))
        else:
            tree.unsure = False
        return not tree.unsure

    def remove(self, hex_: str) -> bool:
        """Delete what is kept of a tree, unless somebody uses it (False). An acquire meanwhile waits, and makes it
        anew."""
        with self._lock:
            tree = self._trees.setdefault(hex_, ImageTree(hex_))
            if tree.leases or tree.mounted is not None or tree.unsure or not tree.lock.acquire(blocking=False):
                return False
        try:
            if is_used(self._state / hex_, self.users()):
                return False
            aside = discard.set_aside(self._state / hex_)
        finally:
            tree.lock.release()
        discard.delete(aside)
        return True

    def in_use(self) -> dict[str, dict[str, Any]]:
        """Hex → meta of the trees that a container, or somebody else, has a mount of or is about to."""
        users = self.users()
        with self._lock:
            return {
                tree.hex: tree.meta
                for tree in self._trees.values()
                if tree.meta is not None and (tree.leases or (tree.mounted is not None and tree.hex in users))
            }

    def close(self) -> bool:
        """Give no more leases and unmount every tree that nobody uses; True if none is left mounted."""
        with self._lock:
            self._closing = True
            trees = list(self._trees.values())
        self._profiles.end(everything=True)
        used = self.users()
        for tree in trees:
            if tree.hex in used or not tree.lock.acquire(timeout=_CLOSE_SECONDS):
                continue
            try:
                self._unmount(tree)
            finally:
                tree.lock.release()
        return all(tree.mounted is None and not tree.unsure for tree in trees)

    def are_used(self) -> bool:
        """Whether anybody uses any tree."""
        with self._lock:
            leases = any(tree.leases for tree in self._trees.values())
        return leases or bool(self.users())

    def users(self) -> set[str]:
        """Hexes of the trees that somebody has a mount of, as this mount namespace sees it: an overlay, a clone.

        What is mounted at a tree's path and in no table, by a job that outlived its server for a moment, goes there.
        """
        entries = mountinfo.read()
        with self._lock:
            for hex_ in mounted_trees(entries, self._run):
                self._trees.setdefault(hex_, ImageTree(hex_, unsure=True))
        return tree_users(entries, self._run)

    def status(self) -> list[dict[str, Any]]:
        """The images that are mounted, as `status --json` shows them."""
        used = Counter(hex_ for hex_, _ in overlays(mountinfo.read()))
        with self._lock:
            mounted = [tree for tree in self._trees.values() if tree.mounted is not None]
            return [tree.status(str(self._run / tree.hex), used[tree.hex]) for tree in mounted]


def _ms(since: float) -> float:
    return round((time.monotonic() - since) * 1000, 1)
