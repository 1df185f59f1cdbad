"""Makes the root of a container that has a reference: tree, overlay, verification, config.json.

The engine's overlay is replaced at its own path, so that the engine's unmount cleans up and no upper has two overlays.
A rootfs that is no overlay becomes a lower; the merged root then lies beside it, with an upper of ours and a poststop
hook. The new overlay is built and looked at before anything of the engine's is touched. A failure undoes all that was
done, in reverse; an engine's overlay that was already unmounted stays so, which every engine accepts.
"""

from __future__ import annotations

import os
import time

from shim.errors import DaemonError, MountError, ShimError
from shim.mount import mountinfo, overlay
from shim.mount.overlay import Layers
from shim.runtime.client import Connection, ask
from shim.runtime.fastpath import POSTSTOP
from shim.runtime.reference import SOURCE_ANNOTATION
from shim.runtime.rootfs import EARLIER, PLAIN, Rootfs, layers_to
from shim.runtime.verify import check_root, check_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from shim.runtime.bundle import Bundle
    from shim.runtime.config import Config
    from shim.runtime.records import Record
    from shim.runtime.reference import Reference

KEEP_ANNOTATION = "io.clip.upper"
_HOOK_SECONDS = 60
_OWN_OPTIONS: list[overlay.Option] = [
    ("index", b"off"),
    ("nfs_export", b"off"),
    ("metacopy", b"off"),
    ("redirect_dir", b"off"),
]


class Creation:
    """One container's way from a reference to a root that the runtime can use."""

    def __init__(self, config: Config, bundle: Bundle, rootfs: Rootfs, record: Record) -> None:
        self._config = config
        self._bundle = bundle
        self._rootfs = rootfs
        self._record = record
        self._undo: list[Callable[[], object]] = []
        self._connection: Connection | None = None
        # µs by step; up to here the wrapper only computed: its CPU time says how long, and costs others nothing
        self._timings = {"resolve": time.process_time_ns() // 1000}
        self._lapped = time.monotonic_ns()

    def run(self, reference: Reference, root: str, container: str, environ: dict[bytes, bytes]) -> bool:
        """Do all of it. False if the ID turned out to be live: the runtime refuses it. Raises ShimError, all undone."""
        try:
            self._refuse_unsupported()
            self._claim()
            if os.path.lexists(os.path.join(root, container)):
                self.undo()
                return False
            self._lap("resolve")
            answer = self._acquire(reference, root, container, environ)
            self._lap("mount")
            facts = {"container": container, "root": root, "bundle": self._bundle.directory}
            if self._rootfs.kind == PLAIN:
                self._make_beside(answer, facts)
            else:
                self._make_in_place(answer, facts)
            self._rewrite(answer)
            self._lap("exec")
            assert self._connection is not None
            self._connection.tell({"v": 1, "op": "started", "timings_us": self._timings})
        except OSError as error:
            self.undo()
            raise MountError(f"the container's root cannot be made: {error}") from error
        except BaseException:
            self.undo()
            raise
        finally:
            if self._connection is not None:
                self._connection.close()  # from here on the kernel knows the tree's user
        return True

    def _lap(self, step: str) -> None:
        """What was done since the last lap was `step`: resolve, mount, overlay, verify, or exec (config.json)."""
        now = time.monotonic_ns()
        self._timings[step] = self._timings.get(step, 0) + (now - self._lapped) // 1000
        self._lapped = now

    def undo(self) -> None:
        """Take back what was done, the last first. What fails is left to the engine's own unmount and the sweep."""
        while self._undo:
            step = self._undo.pop()
            try:
                step()
            except (OSError, ShimError):
                continue

    def _refuse_unsupported(self) -> None:
        if self._bundle.has_user_namespace:
            raise MountError(
                "this container has a user namespace, whose shifted owners a lazily loaded tree does not have",
                hint="run it without userns-remap, --userns or hostUsers: false",
            )
        self._rootfs.refuse_unsupported()

    def _claim(self) -> None:
        self._record.claim()
        before = dict(self._record.state)
        self._undo.append(lambda: self._forget(before))

    def _forget(self, before: dict[str, Any]) -> None:
        """The record of a failed create: the one before, as long as its mount is there."""
        if before and self._rootfs.kind == EARLIER:
            self._record.save({**before, "token": self._record.token})
            self._record.disown()
        else:
            self._record.release()

    def _acquire(self, reference: Reference, root: str, container: str, environ: dict[bytes, bytes]) -> dict[str, Any]:
        """Have the daemon mount the tree; it stays mounted while the connection is open."""
        try:
            self._connection, answer = ask(
                self._config,
                environ,
                {
                    "v": 1,
                    "op": "acquire",
                    "source": reference.source,
                    "value": reference.value,
                    "container": {"id": container, "root": root, "bundle": self._bundle.directory},
                },
                reference.fd,
            )
        finally:
            if reference.fd >= 0:
                os.close(reference.fd)
        tree, index = answer.get("tree"), answer.get("index")
        if not isinstance(tree, str) or not tree.startswith("/") or not isinstance(index, str) or not _is_digest(index):
            raise DaemonError(
                "the daemon's answer names no tree", hint="wrapper and daemon may be of different versions"
            )
        check_tree(tree, answer.get("dirs") or [], str(answer.get("device") or ""))
        return answer

    def _make_in_place(self, answer: dict[str, Any], facts: dict[str, Any]) -> None:
        """Ours takes the place of the engine's overlay, at the same path and with its upper."""
        path, entry = self._rootfs.path, self._rootfs.entry
        assert entry is not None
        tree, index = answer["tree"], answer["index"]
        engine = self._rootfs.layers()
        device = os.stat(tree).st_dev
        state = {
            **facts,
            "kind": "in-place",
            "rootfs": os.fsdecode(path),
            "index": index,
            "tree": tree,
            "tree_device": device,
            **layers_to(engine),
        }
        if self._rootfs.kind == EARLIER and entry.source == overlay.OURS + index.encode():
            # the superblock lives as long as the overlay, so an equal number is the same tree, and the daemon has it
            before = self._record.state
            if before.get("tree_device") == device and before.get("tree") == tree:
                self._lap("overlay")
                self._check(path, answer, engine)
                self._lap("verify")
                self._record.save(state)
                return
        merged = Layers(
            [*engine.lowers, os.fsencode(tree)],
            engine.upper,
            engine.work,
            engine.options,
            engine.attributes,
        )
        mount_fd = self._build(merged, index)
        self._lap("overlay")
        try:
            check_root(mount_fd, answer, engine.all, writable=engine.writable)
            self._lap("verify")
            self._record.save(state)
            self._replace(mount_fd, path)
            self._lap("overlay")
        finally:
            os.close(mount_fd)

    def _replace(self, mount_fd: int, path: bytes) -> None:
        overlay.detach(path)
        # an engine that mounted its own over ours of an earlier run would leave that one to be found at every restart
        while b" " + overlay.OURS in self._rootfs.data:
            below = mountinfo.at(path)
            if below is None or not below.source.startswith(overlay.OURS):
                break
            overlay.detach(path)
        overlay.attach(mount_fd, path)
        self._undo.append(lambda: overlay.detach(path))

    def _make_beside(self, answer: dict[str, Any], facts: dict[str, Any]) -> None:
        """The rootfs is a lower of a merged root of ours, with an upper of ours."""
        from shim.runtime.cleanup import discard, empty

        record = self._record
        keep = self._bundle.annotations.get(KEEP_ANNOTATION) == "keep"
        empty(discard(record))  # of an earlier run that nobody cleaned up
        source = os.fsdecode(self._rootfs.path)
        home = record.kept_dir if keep else record.state_dir
        upper, work = os.path.join(home, "upper"), os.path.join(home, "work")
        for directory in (upper, work, record.rootfs):
            os.makedirs(directory, 0o700, exist_ok=True)
        record.save(
            {
                **facts,
                "kind": "beside",
                "rootfs": record.rootfs,
                "source": source,
                "config": self._bundle.path,
                "index": answer["index"],
                "tree": answer["tree"],
            }
        )
        self._undo.append(lambda: empty(discard(record)))
        tree = answer["tree"]
        like = os.stat(tree)  # the merged root shows its upper's owner and mode
        os.chown(upper, like.st_uid, like.st_gid)
        os.chmod(upper, like.st_mode & 0o7777)
        lowers = [os.fsencode(path) for path in (source, tree) if os.path.isdir(path)]
        engine = [self._rootfs.path, os.fsencode(upper)]
        layers = Layers(lowers, engine[1], os.fsencode(work), _OWN_OPTIONS)
        mount_fd = self._build(layers, answer["index"])
        self._lap("overlay")
        try:
            check_root(mount_fd, answer, engine, writable=True)
            self._lap("verify")
            overlay.attach(mount_fd, os.fsencode(record.rootfs))
            self._lap("overlay")
        finally:
            os.close(mount_fd)
        self._bundle.annotate({SOURCE_ANNOTATION: source})
        self._bundle.add_poststop(self._hook())

    def _hook(self) -> dict[str, Any]:
        command = self._config.hook
        names = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **self._config.environ}
        return {
            "path": command[0],
            "args": [*command, POSTSTOP, self._record.directory, self._record.token],
            "env": [f"{name}={value}" for name, value in names.items()],
            "timeout": _HOOK_SECONDS,
        }

    def _build(self, layers: Layers, index: str) -> int:
        os.makedirs(self._record.stage, 0o700, exist_ok=True)
        return overlay.build(layers, overlay.OURS + index.encode(), os.fsencode(self._record.stage))

    def _check(self, path: bytes, answer: dict[str, Any], engine: Layers) -> None:
        root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            check_root(root, answer, engine.all, writable=engine.writable)
        finally:
            os.close(root)

    def _rewrite(self, answer: dict[str, Any]) -> None:
        """config.json: root.path absolute, and what the container runs on."""
        bundle = self._bundle
        beside = self._rootfs.kind == PLAIN
        bundle.section("root")["path"] = self._record.rootfs if beside else os.fsdecode(self._rootfs.path)
        bundle.annotate({"io.clip.index-digest": answer["index"], "io.clip.image": str(answer.get("image", ""))})
        before = bundle.data
        self._undo.append(lambda: bundle.write(before))
        after = bundle.write()
        if beside:
            self._record.keep_config(before, after)


def _is_digest(text: str) -> bool:
    return len(text) == 71 and text.startswith("sha256:") and not text[7:].strip("0123456789abcdef")
