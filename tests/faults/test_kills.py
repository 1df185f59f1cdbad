"""The server is killed at seeded moments, some inside a mount, an open or a hand-over: nobody who reads notices."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.support import images, killing
from tests.support.daemonclient import log_lines
from tests.support.host import Host, wait_for
from tests.support.proxy import Proxy
from tests.support.registry import Registry

SEED = 20
KILLS = 16


def test_nobody_notices_sixteen_kills() -> None:
    with Registry() as registry, Proxy(registry.host, round_trip=0.02, rate=4e6) as proxy:
        for name in ("small", "shared-a", "shared-b"):
            images.push(images.image(name), registry.host)
        report = survive(proxy.address, SEED, KILLS, readers=["shared-a"], image="small")
    assert sum(report.kills.values()) == KILLS
    assert len(report.kills) >= KILLS // 2, f"points that were passed: {report.kills}"
    assert report.passes
    assert report.runs


def test_a_restart_takes_less_than_a_second() -> None:
    """From SIGKILL to the answer to a read that the kernel does not have and the cache has."""
    with Registry() as registry, Host() as host:
        images.push(images.image("shared-a"), registry.host)
        host.trust_registry(registry.host)
        index = host.index(f"{registry.host}/shared-a:latest", "a")
        child = host.start_daemon()
        (host.base / "tree").mkdir()
        host.clip("mount", index, host.base / "tree")
        fd = os.open(host.base / "tree/common/05", os.O_RDONLY)
        first, took = os.pread(fd, 4096, 0), []
        wait_for("it is on disk", lambda: any((host.state_dir / "cache").glob("*/bitmap")))
        for _ in range(5):
            old = killing.server_pid(host)
            Path("/proc/sys/vm/drop_caches").write_text("1")
            begin = time.monotonic()
            os.kill(old, signal.SIGKILL)
            assert os.pread(fd, 4096, 0) == first
            took.append(time.monotonic() - begin)
        os.close(fd)
        print("seconds:", [round(item, 2) for item in took])
        assert min(took) < 1.0
        assert child.poll() is None
        host.clip("umount", host.base / "tree")


def survive(address: str, seed: int, kills: int, *, readers: list[str], image: str) -> killing.Report:
    """A host whose images are behind `address`; kills; a look at what is left. Prints what it saw."""
    with Host(settings={"CLIP_SHIM_TREE_LINGER": "0s"}) as host:
        host.trust_registry(address)
        indexes = {name: host.index(f"{address}/{name}:latest", name) for name in {*readers, image, "shared-b"}}
        chosen = killing.prepare(host, seed, kills)
        child = host.start_daemon()
        trees = {}
        for name in readers:
            trees[name] = host.base / name
            trees[name].mkdir()
            host.clip("mount", indexes[name], trees[name])
        work = killing.Work(host, trees, indexes[image], image, indexes["shared-b"], loops=2)
        report = killing.survive(host, child.pid, seed, chosen, work, patience=1.5)
        print(report)
        assert not log_lines(host, "read failed")
        for tree in trees.values():
            host.clip("umount", tree)
        assert host.clip_overlays() == []
        child.terminate()
        assert child.wait(30) == 0
        assert host.mounts() == []
        assert sorted(path.name for path in Path(host.run_dir).glob("*.sock")) == []
    return report
