"""The server is killed at seeded moments, some inside a mount, an open or a hand-over: nobody who reads notices."""

from __future__ import annotations

from pathlib import Path

from tests.support import images, killing
from tests.support.daemonclient import log_lines
from tests.support.host import Host
from tests.support.proxy import Proxy
from tests.support.registry import Registry

SEED = 20
KILLS = 16


def test_nobody_notices_sixteen_kills() -> None:
    with Registry() as registry, Proxy(registry.host, round_trip=0.02, rate=2e6) as proxy:
        for name in ("small", "shared-a"):
            images.push(images.image(name), registry.host)
        report = survive(proxy.address, SEED, KILLS, readers=["shared-a"], image="small")
    assert sum(report.kills.values()) == KILLS
    assert len(report.kills) >= KILLS // 2, f"points that were passed: {report.kills}"
    assert report.passes
    assert report.runs


def survive(address: str, seed: int, kills: int, *, readers: list[str], image: str) -> killing.Report:
    """A host whose images are behind `address`; kills; a look at what is left. Prints what it saw."""
    with Host(settings={"CLIP_SHIM_TREE_LINGER": "0s"}) as host:
        host.trust_registry(address)
        indexes = {name: host.index(f"{address}/{name}:latest", name) for name in {*readers, image}}
        chosen = killing.prepare(host, seed, kills)
        child = host.start_daemon()
        trees = {}
        for name in readers:
            trees[name] = host.base / name
            trees[name].mkdir()
            host.clip("mount", indexes[name], trees[name])
        work = killing.Work(host, trees, indexes[image], image, loops=2)
        report = killing.survive(host, child.pid, seed, chosen, work, patience=1.5)
        print(report)
        assert not log_lines(host, "read failed")
        assert max(report.waits) < 3, "a restart takes too long"
        for tree in trees.values():
            host.clip("umount", tree)
        assert host.clip_overlays() == []
        child.terminate()
        assert child.wait(30) == 0
        assert host.mounts() == []
        assert sorted(path.name for path in Path(host.run_dir).glob("*.sock")) == []
    return report
