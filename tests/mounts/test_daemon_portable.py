"""The daemon's part in the portable tree: its process serves as long as anybody has a mount, and is replaced."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.mount import syscalls
from tests.support import images, smallimage
from tests.support.daemonclient import Client, acquire, descendants, is_running, server_pid, trees
from tests.support.host import Host, wait_for
from tests.support.registry import Registry


@pytest.fixture
def host() -> Iterator[Host]:
    settings = {"CLIP_SHIM_TREE": "fuse", "CLIP_SHIM_TREE_LINGER": "300ms"}
    with Registry() as registry, Host(settings=settings) as made:
        images.push(images.image("shared-a"), registry.host)
        made.trust_registry(registry.host)
        made.index(f"{registry.host}/shared-a:latest", "a")
        made.start_daemon()
        yield made


def servers(host: Host) -> list[int]:
    """Processes that serve a portable tree."""
    found = []
    for pid in descendants(server_pid(host)):
        command = Path(f"/proc/{pid}/cmdline").read_bytes() if is_running(pid) else b""
        if b"shim.tree.portable" in command:
            found.append(pid)
    return found


def test_it_comes_and_goes_without_a_zombie(host: Host) -> None:
    for _ in range(2):
        with Client(host) as client:
            tree = Path(client.acquire(host.indexes / "a.clip")["tree"])
            assert (tree / "common/03").read_bytes() == smallimage.noise(103, 400_000)
            (pid,) = servers(host)
        wait_for("the tree is unmounted", lambda: not trees(host) and not host.status()["layers"])
        wait_for("its process is reaped", lambda pid=pid: not Path(f"/proc/{pid}").exists())


def test_it_survives_the_daemon_but_not_its_own_end(host: Host) -> None:
    """Its files' bytes come from the blobs, which a successor of the daemon serves; of itself there is no successor."""
    target = host.base / "mine"
    target.mkdir()
    host.clip("mount", host.indexes / "a.clip", target)
    assert (target / "common/03").read_bytes() == smallimage.noise(103, 400_000)
    (pid,) = servers(host)
    old = server_pid(host)
    os.kill(old, signal.SIGKILL)
    assert (target / "common/11").read_bytes() == smallimage.noise(111, 400_000)
    assert server_pid(host) != old
    assert is_running(pid)
    os.kill(pid, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(OSError, match=r"connect|Input/output"):
        (target / "common/17").read_bytes()
    assert time.monotonic() - begin < 5
    wait_for("it is reaped", lambda: not Path(f"/proc/{pid}").exists())
    answer = acquire(host, host.indexes / "a.clip")
    assert answer["ok"], answer
    syscalls.umount2(str(target))
    wait_for("nothing of it is mounted", lambda: not trees(host) and not host.status()["layers"])


def test_one_that_was_killed_is_replaced(host: Host) -> None:
    with Client(host) as client:
        client.acquire(host.indexes / "a.clip")
        (pid,) = servers(host)
        os.kill(pid, signal.SIGKILL)
        wait_for("it is dead", lambda: not is_running(pid))
        answer = acquire(host, host.indexes / "a.clip")
        assert answer["ok"], answer
        assert (Path(answer["tree"]) / "common/03").read_bytes() == smallimage.noise(103, 400_000)
        assert len(trees(host)) == 1


def test_a_mount_that_the_daemon_does_not_see_keeps_it(host: Host) -> None:
    """A clone in another mount namespace: the daemon unmounts its own, the process goes on serving."""
    with Client(host) as client:
        client.acquire(host.indexes / "a.clip")
        holder = host.start("unshare", "-m", "--propagation", "private", "sleep", "1000", log="holder")
        wait_for("the namespace", lambda: os.readlink(f"/proc/{holder.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt"))
        (pid,) = servers(host)
        seen = Path(f"/proc/{holder.pid}/root{trees(host)[0]}")
    wait_for("the tree is unmounted", lambda: not trees(host))
    wait_for("the daemon has looked again", lambda: host.status()["images"] == [])
    assert (seen / "common/07").read_bytes() == smallimage.noise(107, 400_000)
    assert is_running(pid)
    holder.kill()
    holder.wait()
    wait_for("its process is reaped", lambda: not Path(f"/proc/{pid}").exists())
    wait_for("its layers are gone", lambda: not host.status()["layers"])


def test_a_clone_keeps_the_tree(host: Host) -> None:
    target = host.base / "target"
    target.mkdir()
    host.clip("mount", host.indexes / "a.clip", target)
    (pid,) = servers(host)
    assert (target / "common/01").read_bytes() == smallimage.noise(101, 400_000)
    assert len(trees(host)) == 1
    syscalls.umount2(str(target))
    wait_for("the tree is unmounted", lambda: not trees(host))
    wait_for("its process is reaped", lambda: not Path(f"/proc/{pid}").exists())
