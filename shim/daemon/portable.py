"""The portable FUSE tree as the daemon sees it: a process of its own, one for each mounted tree.

It ends by itself when the last mount of its tree is gone. It is not killed once it serves: a container in a mount
namespace that we do not see, or a `clip-shim mount`, may live on it, also longer than this daemon.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from shim.cache.ownership import is_corpse
from shim.daemon import jobs, mounter
from shim.errors import MountError


@dataclass(slots=True)
class PortableTree:
    """A running `python -m shim.tree.portable`."""

    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, index: Path, blobs: str, names: list[str], target: str, deadline: float) -> PortableTree:
        """Start it and wait until the tree can be read. Raises MountError; then nothing is left."""
        jobs.run(10, mounter.make_way, target)
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
            jobs.run(10, mounter.make_way, target)
            why = said.decode(errors="replace").strip() or f"no answer in {deadline:.3g} s"
            raise MountError(f"the portable tree did not start: {why}")
        return cls(process)

    def is_dead(self) -> bool:
        """Whether it serves no more, though it may not be reaped yet."""
        return self.has_ended() or is_corpse(self.process.pid)

    def has_ended(self) -> bool:
        """Whether the process is gone; it is no zombie then."""
        return self.process.poll() is not None
