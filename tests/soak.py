"""`make soak`: the numbers that are too large for every day. 100 kills of the server under containers and readers of a
large image; 1,000 containers created and deleted, after which nothing may have grown.

    python -m tests.soak [--kills N] [--cycles N] [--seed N]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from tests.support import bundle, images, killing, leaks
from tests.support.daemonclient import descendants
from tests.support.host import Host, wait_for
from tests.support.proxy import Proxy
from tests.support.registry import Registry

GROWTH_KIB = 4096  # of a daemon over all cycles; its caches of small things fill at first


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    os.environ.setdefault(leaks.MARK, f"{os.getpid()}")
    before = leaks.snapshot()
    with Registry() as registry:
        if args.kills:
            kills(registry.host, args.kills, args.seed)
        if args.cycles:
            cycles(registry.host, args.cycles)
    left = leaks.leaked(before, ours=True)
    print("left behind: " + "; ".join(left) if left else "nothing left mounted or running")
    return 1 if left else 0


def kills(registry: str, count: int, seed: int) -> None:
    """See tests/support/killing.py."""
    for name in ("small", "debian", "shared-b"):
        images.push(images.image(name), registry)
    started = time.monotonic()
    with Proxy(registry, round_trip=0.02, rate=4e6) as proxy:
        report = killing.trial(proxy.address, seed, count, readers=["debian"], image="small")
    print(f"seed {seed}, {time.monotonic() - started:.0f} s: {report}")


def cycles(registry: str, count: int) -> None:
    """Create, start and delete a container `count` times; the daemon afterwards is as it was after the first tenth."""
    images.push(images.image("small"), registry)
    with Host(settings={"CLIP_SHIM_TREE_LINGER": "0s"}) as host:
        host.trust_registry(registry)
        index = host.index(f"{registry}/small:latest", "small")
        supervisor = host.start_daemon().pid
        made = bundle.make(host.base / "cycle", ["cat", "/data/one"], index=index)
        first: dict[str, int] = {}
        for number in range(1, count + 1):
            host.run(*host.oci, "run", "--bundle", made, "cycle")
            if number in (max(1, count // 10), count):
                now = look(host, supervisor)
                print(f"after {number} containers: {now}")
                first = first or now
        assert now["descriptors"] <= first["descriptors"], (first, now)
        assert now["mounts"] == first["mounts"], (first, now)
        assert now["processes"] <= first["processes"], (first, now)
        assert now["threads"] <= first["threads"] + 1, (first, now)
        assert now["rss_kib"] <= first["rss_kib"] + GROWTH_KIB, (first, now)
        assert not [path for path in (host.run_dir / "containers").glob("*/*") if path.is_dir()]
        assert not [path for path in (host.state_dir / "containers").glob("*/*") if path.is_dir()]


def look(host: Host, supervisor: int) -> dict[str, int]:
    """What a daemon that rests has: descriptors, threads and memory of the server; processes and mounts of all."""
    wait_for("its trees are unmounted", lambda: not host.status()["layers"])
    server = killing.server_pid(host)
    status = dict(line.split(":", 1) for line in Path(f"/proc/{server}/status").read_text().splitlines())
    return {
        "descriptors": len(os.listdir(f"/proc/{server}/fd")),
        "threads": int(status["Threads"]),
        "rss_kib": int(status["VmRSS"].split()[0]),
        "processes": len(descendants(supervisor)),
        "mounts": len(host.mounts()),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
