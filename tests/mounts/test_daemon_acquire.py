"""Leases on trees: who keeps one mounted, what concurrent and dying clients get, and what a stuck mount leaves."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from shim.mount import syscalls
from tests.support import images
from tests.support.daemonclient import Client, acquire, log_lines, server_pid, trees
from tests.support.host import Host, wait_for
from tests.support.proxy import Proxy
from tests.support.registry import Registry

DEADLINE = 4.0  # seconds, `mount_deadline` of the host whose registry stalls


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as registry:
        for name in ("shared-a", "small"):
            images.push(images.image(name), registry.host)
        yield registry


@pytest.fixture(scope="module")
def host(registry: Registry) -> Iterator[Host]:
    """Trees go soon after their last user."""
    with Host(settings={"CLIP_SHIM_TREE_LINGER": "500ms"}) as made:
        made.trust_registry(registry.host)
        made.index(f"{registry.host}/shared-a:latest", "a")
        made.start_daemon()
        yield made


def gone(host: Host) -> bool:
    return not trees(host) and not host.status()["layers"]


def test_a_lease_keeps_its_tree_and_nothing_else_does(host: Host) -> None:
    index = host.indexes / "a.clip"
    with Client(host) as client:
        answer = client.acquire(index)
        assert answer["ok"], answer
        tree = Path(answer["tree"])
        other = acquire(host, index)
        assert other["tree"] == answer["tree"]
        ended = time.monotonic() + 2.5
        wait_for("several rounds of reaping", lambda: time.monotonic() > ended)
        assert (tree / "common/00").stat().st_size == 400_000
    wait_for("the tree is unmounted", lambda: gone(host))
    again = acquire(host, index)
    assert again["ok"], again
    assert again["tree"] == answer["tree"]
    assert (tree / "common/00").stat().st_size == 400_000
    wait_for("the tree is unmounted", lambda: gone(host))


@pytest.mark.parametrize("kind", ["overlay", "clone"])
def test_a_mount_over_the_tree_keeps_it(host: Host, kind: str) -> None:
    """An overlay is found by its source, a clone (`clip-shim mount`) by its device; the superblock is shared again."""
    index, target = host.indexes / "a.clip", host.base / f"user-{kind}"
    target.mkdir()
    if kind == "clone":
        host.clip("mount", index, target)
    else:
        with Client(host) as client:
            answer = client.acquire(index)
            options = [("lowerdir", f"{answer['tree']}:{host.base}")]
            fd = syscalls.new_mount("overlay", f"clip:{answer['index']}", options)
            syscalls.attach(fd, str(target))
            os.close(fd)
    ended = time.monotonic() + 2.5
    wait_for("several rounds of reaping", lambda: time.monotonic() > ended)
    assert len(trees(host)) == 1
    syscalls.umount2(str(target))
    wait_for("the tree is unmounted", lambda: gone(host))


def test_twenty_at_once_prepare_and_mount_once(host: Host) -> None:
    before = len(log_lines(host, "tree mounted"))
    index = host.index(_reference(host), "twenty", "--checkpoint-mib", "3")

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: acquire(host, index), range(20)))
    assert {answer["ok"] for answer in answers} == {True}, answers
    assert len({answer["tree"] for answer in answers}) == 1
    assert len(log_lines(host, "tree mounted")) == before + 1
    wait_for("the tree is unmounted", lambda: gone(host))


def _reference(host: Host) -> str:
    import json

    return str(json.loads(host.clip("inspect", host.indexes / "a.clip", "--json").stdout)["image"])


def test_a_tree_that_somebody_unmounted_is_mounted_again(host: Host) -> None:
    index = host.indexes / "a.clip"
    with Client(host) as client:
        tree = client.acquire(index)["tree"]
        syscalls.umount2(tree)
        assert client.acquire(index)["ok"]
        assert (Path(tree) / "common/01").stat().st_size == 400_000
    wait_for("the tree is unmounted", lambda: gone(host))


@contextmanager
def stalled(registry: Registry) -> Iterator[tuple[Host, Proxy]]:
    """A host whose registry does not answer for layers, with the index of an image that cannot be mounted without."""
    settings = {"CLIP_SHIM_MOUNT_DEADLINE": f"{DEADLINE}s", "CLIP_SHIM_TREE_LINGER": "500ms"}
    settings["CLIP_SHIM_TRUST_CACHED"] = "if-cached"  # else it would not come to the mount
    with Proxy(registry.host) as proxy, Host(settings=settings) as host:
        host.trust_registry(proxy.address)
        host.trust_registry(registry.host)
        host.index(f"{proxy.address}/small:latest", "stuck")
        host.index(f"{registry.host}/shared-a:latest", "fine")
        host.start_daemon()
        proxy.stall()
        proxy.reset()
        try:
            yield host, proxy
        finally:
            proxy.resume()


def test_a_stuck_mount(registry: Registry) -> None:
    """It fails in time and for all who asked, holds nobody else up, leaves nothing, and works when the registry does;
    a client that died meanwhile leaves no lease."""
    with stalled(registry) as (host, proxy):
        stuck, fine = host.indexes / "stuck.clip", host.indexes / "fine.clip"
        descriptors = len(os.listdir(f"/proc/{server_pid(host)}/fd"))
        dead = Client(host)
        dead.start_acquire(stuck)
        dead.close()
        begin = time.monotonic()
        with ThreadPoolExecutor(6) as pool:
            waiting = [pool.submit(acquire, host, stuck) for _ in range(6)]
            wait_for("the mount waits for the registry", lambda: proxy.requests)
            other = time.monotonic()
            assert acquire(host, fine)["ok"]
            assert time.monotonic() - other < DEADLINE / 2
            answers = [future.result() for future in waiting]
        assert time.monotonic() - begin < 2.5 * DEADLINE
        for answer in answers:
            assert not answer["ok"]
            assert "longer than" in answer["error"] or "still being mounted" in answer["error"]
            assert "mount_deadline" in answer["hint"]
        assert len(trees(host)) <= 1, "only that of the other image"
        proxy.resume()
        again = acquire(host, stuck)
        assert again["ok"], again
        wait_for("all is unmounted", lambda: gone(host))
        wait_for("nothing stays open", lambda: len(os.listdir(f"/proc/{server_pid(host)}/fd")) <= descriptors + 3)
