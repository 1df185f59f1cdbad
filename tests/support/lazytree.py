"""Image shared-a mounted by a daemon whose registry is a server that can be told to fail."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import smallimage
from tests.support.faultserver import FaultServer
from tests.support.host import Host, wait_for

FILES = [f"common/{n:02d}" for n in range(20)]  # 400,000 bytes of noise each


@contextmanager
def tree(server: FaultServer, **settings: str) -> Iterator[tuple[Host, Path]]:
    """A host with the image mounted, its blobs behind `server`."""
    with Host(settings=settings) as host:
        host.trust_registry(server.host)
        index = host.index(f"{server.host}/shared-a:latest", "a")
        host.start_daemon()
        target = host.base / "tree"
        target.mkdir()
        host.clip("mount", index, target)
        try:
            yield host, target
        finally:
            server.faults.clear()
            host.clip("umount", target)


def right(name: str) -> str:
    """The SHA-256 of a file, from the image itself."""
    return hashlib.sha256(smallimage.noise(100 + int(name[-2:]), 400_000)).hexdigest()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def drop_page_cache() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("3")


def read_error(path: Path) -> int:
    with pytest.raises(OSError, match="Input/output error") as caught:
        path.read_bytes()
    return int(caught.value.errno or 0)


def log_lines(host: Host, event: str) -> list[str]:
    return [line for line in (host.base / "log" / "daemon").read_text().splitlines() if event in line]


def failures(host: Host) -> list[dict[str, object]]:
    """The log lines of failed reads; waits for the first, which comes when its file has been looked up."""
    wait_for("a failed read is logged", lambda: log_lines(host, "read failed"))
    return [json.loads(line) for line in log_lines(host, "read failed")]
