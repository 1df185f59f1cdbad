"""The table of checks, and how they are run."""

from __future__ import annotations

import difflib
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from shim.doctor import bundle as bundles
from shim.doctor import daemon, engines, installation, kernel, network, storage
from shim.doctor.node import Node, why
from shim.doctor.result import Check, Result, failed
from shim.errors import ShimError, UsageError

_NETWORK_SECONDS = 240.0  # many hosts, eight at a time, each of which has a deadline; S3's own is long
CHECKS: tuple[Check, ...] = (
    Check("root", kernel.root, "who runs this"),
    Check("configuration", installation.configuration, "the configuration is valid and safe"),
    Check("launcher", installation.launcher, "the file that engines run"),
    Check("runtimes", installation.runtimes, "runc or crun, and their versions"),
    Check("fuse-device", kernel.fuse_device, "/dev/fuse can be opened"),
    Check("openat2", kernel.openat2, "the system call openat2"),
    Check("mount-api", kernel.mount_api, "fsopen, fsmount and move_mount"),
    Check("fuse-resend", kernel.fuse_resend, "requests survive a crash of their server"),
    Check("erofs", kernel.erofs, "EROFS mounted from a file"),
    Check("overlay-options", kernel.overlay_options, "an overlay with the options that containers get"),
    Check("lazy-tree", kernel.lazy_tree, "an overlay on a lazily loaded tree: exec, copy-up, xattrs"),
    Check("state-dir", storage.state_dir, "the file system of `state_dir`"),
    Check("space", storage.space, "free space and inodes below `state_dir`"),
    Check("uppers", storage.uppers, "what containers write does not lie on memory"),
    Check("stale-mounts", storage.stale_mounts, "no mount is left that nobody serves"),
    Check("docker", engines.docker, "Docker has the runtime, and was reloaded"),
    Check("containerd", engines.containerd, "containerd has the runtime, and was restarted"),
    Check("podman", engines.podman, "podman has the runtime"),
    Check("crio", engines.crio, "CRI-O has the runtime, and was reloaded"),
    Check("mount-namespace", engines.namespaces, "engines see the daemon's mounts"),
    Check("daemon", daemon.answering, "the daemon answers"),
    Check("supervisor", daemon.supervised, "somebody starts the daemon again, and keeps its mounts"),
    Check("dns", network.names, "names of registries are found", _NETWORK_SECONDS),
    Check("clock", network.clock, "the clock agrees with the registries'", _NETWORK_SECONDS),
    Check("registry", network.reachable, "each registry: reachable, TLS, auth, ranges, redirects", _NETWORK_SECONDS),
    Check("stores", network.stores, "each index store can be read and written", _NETWORK_SECONDS),
)
_OURSELVES = ", then run `clip-shim doctor`"  # what some errors' hints end with
BY_NAME = {check.name: check for check in CHECKS}


def bundle(directory: Path) -> Check:
    """The check of one OCI bundle."""
    return Check(
        "bundle", bundles.check(directory), "whether a bundle would start", None
    )  # an index may have to be made


def select(names: list[str]) -> list[Check]:
    """The checks of these names, all for none. UsageError for a name that is none."""
    for name in names:
        if name not in BY_NAME:
            near = difflib.get_close_matches(name, BY_NAME, n=1)
            raise UsageError(
                f"there is no check {name!r}", hint=f"did you mean {near[0]}?" if near else "see `doctor --list`"
            )
    return [BY_NAME[name] for name in names] or list(CHECKS)


def run(check: Check, node: Node) -> Iterator[Result]:
    """The results of one check. That it hangs is a result too: a file system that nobody serves (NFS, FUSE) holds
    whoever looks at it, so that is a thread, which is left behind then."""
    found: queue.SimpleQueue[Result | None] = queue.SimpleQueue()

    def work() -> None:
        try:
            for result in _results(check, node):
                found.put(result)
        finally:
            found.put(None)

    threading.Thread(target=work, name=f"check-{check.name}", daemon=True).start()
    end = None if check.seconds is None else time.monotonic() + check.seconds
    while True:
        try:
            result = found.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
        except queue.Empty:
            fix = "something that it looks at does not answer: a mount, a disk, an engine; see `dmesg` and `mount`"
            yield replace(failed(f"no answer in {check.seconds:g} s", check.help, fix), check=check.name)
            return
        if result is None:
            return
        yield result


def _results(check: Check, node: Node) -> Iterator[Result]:
    """An error that the check did not expect is a result too."""
    try:
        for result in check.run(node):
            yield replace(result, check=check.name, fix=result.fix.replace(_OURSELVES, ""))
    except (ShimError, OSError) as error:
        fix = error.hint if isinstance(error, ShimError) and error.hint else "see the message"
        yield replace(failed(why(error), check.help, fix), check=check.name)
    except Exception as error:  # noqa: BLE001  a defect in one check must not hide the others' findings
        text = f"the check itself failed: {type(error).__name__}: {error}"
        yield replace(failed(text, check.help, "this is a defect in clip-shim"), check=check.name)


def exit_code(results: list[Result]) -> int:
    """0 all well, 1 warnings, 2 failures."""
    found = {result.status for result in results}
    return 2 if "failed" in found else 1 if "warning" in found else 0
