"""The server is killed at seeded moments, some inside a mount, an open or a hand-over: nobody who reads notices."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path

from shim.cache.ownership import is_corpse
from tests.support import images, killing, smallimage
from tests.support.host import Host, wait_for
from tests.support.proxy import Proxy
from tests.support.registry import Registry
from tests.support.silentmount import silent

SEED = 20
KILLS = 16


def test_nobody_notices_sixteen_kills() -> None:
    with Registry() as registry, Proxy(registry.host, round_trip=0.02, rate=4e6) as proxy:
        for name in ("small", "shared-a", "shared-b"):
            images.push(images.image(name), registry.host)
        report = killing.trial(proxy.address, SEED, KILLS, readers=["shared-a"], image="small")
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


# a thread of each server hangs; the supervisor looks at its server only when it is told to
_HANG = """
import os, sys, threading
if "--supervise" in sys.orig_argv:
    import shim.daemon.supervise
    shim.daemon.supervise._LOOK_SECONDS = 3600.0
elif sys.orig_argv[1:4] == ["-m", "shim", "daemon"]:
    threading.Thread(target=os.stat, args=(os.environ["CLIP_SHIM_TEST_HANG"] + "/file",), daemon=True).start()
"""


def test_the_dead_are_not_waited_for() -> None:
    """Killed servers with a thread that hangs in the kernel cannot be reaped, and keep their locks: reads go on, though
    the supervisor would look by itself an hour later."""
    with Registry() as registry, Host() as host, silent(host.base / "silent"):
        images.push(images.image("shared-a"), registry.host)
        host.trust_registry(registry.host)
        index = host.index(f"{registry.host}/shared-a:latest", "a")
        (host.base / "site").mkdir()
        (host.base / "site/sitecustomize.py").write_text(_HANG)
        host.env |= {"PYTHONPATH": str(host.base / "site"), "CLIP_SHIM_TEST_HANG": str(host.base / "silent")}
        child = host.start_daemon()
        (host.base / "tree").mkdir()
        host.clip("mount", index, host.base / "tree")
        dead, took = [], []
        for number in (11, 12, 13, 14, 15):
            dead.append(killing.server_pid(host))
            begin = time.monotonic()
            os.kill(dead[-1], signal.SIGKILL)
            done = host.run("sha256sum", host.base / f"tree/common/{number}", timeout=30)
            took.append(time.monotonic() - begin)
            assert done.stdout.split()[0] == hashlib.sha256(smallimage.noise(100 + number, 400_000)).hexdigest()
        print("seconds:", [round(item, 2) for item in took])
        assert min(took) < 1.0
        assert all(map(is_corpse, dead))
        assert killing.server_pid(host) not in dead
        host.clip("umount", host.base / "tree")
        host.clip("mount", index, host.base / "tree")
        host.clip("umount", host.base / "tree")
    assert child.wait(10) == 0
