"""Nothing grows over time in a daemon whose trees come and go."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import images
from tests.support.host import ROOT, Host
from tests.support.registry import Registry


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as registry:
        images.push(images.image("shared-a"), registry.host)
        yield registry


_CYCLES = """
import json, os, sys
from pathlib import Path

def look():
    status = Path("/proc/self/status").read_text()
    rss = int(status.split("VmRSS:")[1].split()[0])
    return len(os.listdir("/proc/self/fd")), rss, status.split("Threads:")[1].split()[0]

def cycle(count):
    for _ in range(count):
        fd = os.open(sys.argv[1], os.O_RDONLY)
        lease = daemon._trees.acquire(daemon._resolver.checked("mount", fd, fd))
        os.close(fd)
        assert os.path.isdir(lease.answer["tree"])
        lease.release()
        daemon._trees.reap()
        while daemon._layers.status():
            daemon._layers.sweep()

if __name__ == "__main__":  # not in jobs
    from shim import settings
    from shim.daemon.server import Daemon

    daemon = Daemon(settings.load())
    daemon._server.start()
    daemon._failures.start()
    cycle(20)
    before = look()
    cycle(180)
    after = look()
    daemon.stop()
    print(json.dumps([before, after]))
"""


def test_two_hundred_cycles_leave_nothing_behind(registry: Registry, tmp_path: Path) -> None:
    """Acquire, mount, release, unmount, over and over in one process: descriptors and memory stay what they were."""
    (tmp_path / "cycles.py").write_text(_CYCLES)
    with Host(settings={"CLIP_SHIM_TREE_LINGER": "0s"}) as host:
        host.trust_registry(registry.host)
        index = host.index(f"{registry.host}/shared-a:latest", "a")
        done = subprocess.run(
            [sys.executable, tmp_path / "cycles.py", index],
            env={**host.env, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (fds, rss, threads), (fds_after, rss_after, threads_after) = json.loads(done.stdout.splitlines()[-1])
        assert fds_after <= fds
        assert int(threads_after) <= int(threads) + 1
        assert rss_after - rss < 3000, "KiB"
        assert host.mounts() == []
