"""One wrapper with runc behind it and a fake daemon beside it, in a directory of its own: for the wrapper's own tests.

The root is a static busybox; overlays are mounted as containerd does it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shim.mount import mountinfo, syscalls
from shim.runtime.launcher import write_launcher
from shim.settings import load
from tests.support import bundle
from tests.support.engines import find_runtime
from tests.support.fakedaemon import FakeDaemon

APPLETS = (
    "sh",
    "true",
    "false",
    "cat",
    "ls",
    "sleep",
    "id",
    "mount",
    "stat",
    "rm",
    "mkdir",
    "test",
    "readlink",
    "kill",
)


def busybox_tree(tree: Path) -> Path:
    """A small root: static busybox below /usr/bin, /bin a link to it."""
    for name in ("proc", "dev", "sys", "usr/bin", "tmp", "etc", "data"):
        (tree / name).mkdir(parents=True)
    (tree / "tmp").chmod(0o1777)
    (tree / "bin").symlink_to("usr/bin")
    (tree / "vmlinuz").symlink_to("boot/gone")  # dangles in the image too
    (tree / "data" / "file").write_text("of the image")
    shutil.copy("/bin/busybox", tree / "usr" / "bin" / "busybox")
    for name in APPLETS:
        (tree / "usr" / "bin" / name).symlink_to("busybox")
    return tree


class Box:
    """`call` runs the wrapper; `mounts` are those below this box. Close it: what a test left is then unmounted."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run_dir, self.state_dir = directory / "run", directory / "state"
        self.root = directory / "runc-root"
        self.tree = busybox_tree(directory / "tree")
        flags = {"run_dir": str(self.run_dir), "state_dir": str(self.state_dir), "mount_deadline": "20s"}
        settings = load(env={}, flags={**flags, "runtimes": [find_runtime("runc")]})
        self.launcher = write_launcher(
            directory / "clip", settings, ["/bin/false"], config=directory / "etc" / "c.yaml"
        )
        self.daemon = FakeDaemon(self.run_dir, self.tree)
        self.log = directory / "log.json"
        self.containers: list[str] = []

    def close(self) -> None:
        for container in self.containers:
            self.call("delete", "--force", container)
        self.daemon.close()
        for mount in reversed(self.mounts()):
            syscalls.umount2(mount, syscalls.MNT_DETACH)

    def call(self, *words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """The wrapper with the log flags that containerd gives."""
        line = [self.launcher, "--root", self.root, "--log", self.log, "--log-format", "json", *words]
        arguments: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60, "check": False} | options
        return subprocess.run([os.fspath(word) for word in line], **arguments)

    def run(self, place: Path, container: str = "c", **options: Any) -> subprocess.CompletedProcess[str]:
        """`run` in the foreground."""
        self.containers.append(container)
        return self.call("run", "--bundle", place, container, **options)

    def create(self, place: Path, container: str = "c", **options: Any) -> subprocess.CompletedProcess[str]:
        """`create` with standard output of its own in a file: a pipe would stay open as long as the container."""
        self.containers.append(container)
        with (self.directory / f"{container}.out").open("wb") as out:
            return self.call(
                "create",
                "--bundle",
                place,
                "--pid-file",
                place / "pid",
                container,
                capture_output=False,
                stdout=out,
                stderr=out,
                **options,
            )

    def output(self, container: str = "c") -> str:
        """What a container that was made by `create` has written."""
        return (self.directory / f"{container}.out").read_text()

    def bundle(self, name: str, *script: str, annotations: dict[str, str] | None = None, **root: Any) -> Path:
        """A bundle that runs a shell script, with a reference unless `annotations` says otherwise."""
        place = self.directory / name
        (place / "rootfs").mkdir(parents=True)
        self.configure(place, ["/bin/sh", "-ec", "\n".join(script)], annotations, **root)
        return place

    def configure(
        self, place: Path, args: Sequence[str], annotations: dict[str, str] | None = None, **root: Any
    ) -> None:
        """Write config.json as an engine does before each start."""
        given = {"io.clip.index": "oci://registry.test/busybox"} if annotations is None else annotations
        (place / "config.json").write_text(json.dumps(bundle.config(args, given, **root)))

    def spec(self, place: Path) -> dict[str, Any]:
        return json.loads((place / "config.json").read_text())  # type: ignore[no-any-return]

    def overlay(self, place: Path, *lowers: Path, options: str = "", upper: bool = True) -> Path:
        """Mount an overlay at the bundle's rootfs as containerd does. Returns the upper directory."""
        base = place.parent / f"{place.name}-layers"
        for part in ("upper", "work"):
            (base / part).mkdir(parents=True, exist_ok=True)
        data = "lowerdir=" + ":".join(map(str, lowers))
        if upper:
            data += f",upperdir={base / 'upper'},workdir={base / 'work'}"
        syscalls.mount("overlay", place / "rootfs", "overlay", 0, data + options)
        return base / "upper"

    def layer(self, name: str, files: dict[str, str] | None = None) -> Path:
        """A lower directory with some files."""
        place = self.directory / name
        place.mkdir()
        for path, text in (files or {}).items():
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_text(text)
        return place

    def mounts(self) -> list[str]:
        """Mount points below this box, in mount order; one that is stacked comes more than once."""
        base = os.fsencode(self.directory) + b"/"
        return [os.fsdecode(entry.mount_point) for entry in mountinfo.read() if entry.mount_point.startswith(base)]

    def source(self, place: Path) -> bytes:
        """What is mounted at the bundle's rootfs, b"" for nothing."""
        entry = mountinfo.at(place / "rootfs" if isinstance(place, str) else os.fspath(place / "rootfs"))
        return entry.source if entry is not None else b""

    def leftovers(self) -> list[str]:
        """Files of ours in RUN and STATE that belong to a container."""
        found = []
        for top in (self.run_dir / "containers", self.state_dir / "containers", self.state_dir / "trash"):
            for base, _, files in os.walk(top):
                found += [os.path.join(base, name) for name in files]
        return found
