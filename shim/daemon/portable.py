"""The portable FUSE tree as the daemon sees it: a process of its own, one for each mounted tree."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from shim.daemon import jobs, mounter
from shim.errors import MountError


@dataclass(slots=True)
class PortableTree:
    """A running `python -m shim.tree.portable`. It ends by itself when its mount goes."""

    process: subprocess.Popen[bytes]
    target: str

    @classmethod
    def start(cls, index: Path, blobs: str, names: list[str], target: str, deadline: float) -> PortableTree:
        """Start it and wait until the tree can be read. Raises MountError; then nothing is left."""
        os.makedirs(target, 0o700, exist_ok=True)
        reader, writer = os.pipe()
        command = [sys.executable, "-m", "shim.tree.portable", "--index", str(index), "--blobs", blobs]
        command += ["--ready-fd", str(writer), "--names", ",".join(names), target]
        process = subprocess.Popen(command, pass_fds=[writer], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        os.close(writer)
        try:
            said = os.read(reader, 4096) if select.select([reader], [], [], deadline)[0] else b""
        finally:
            os.close(reader)
        if not said.startswith(b"READY"):
            process.kill()
            process.wait()
            jobs.run(10, mounter.unmount_tree, target)
            why = said.decode(errors="replace").strip() or f"no answer in {deadline:g} s"
            raise MountError(f"the portable tree did not start: {why}")
        return cls(process, target)

    def stop(self) -> None:
        """The tree is unmounted: wait for the process, which has nothing left to serve."""
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
