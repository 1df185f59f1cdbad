"""The cleaner against real mounts: what is in use stays, what can be fetched again goes, with a daemon and without."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.support.daemonclient import Client, acquire
from tests.support.faultserver import FaultServer
from tests.support.host import Host, stop, wait_for
from tests.support.lazytree import FILES, drop_page_cache, right, sha256, tree
from tests.support.registry import Registry

LINGER = {"CLIP_SHIM_TREE_LINGER": "100ms"}


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with Registry() as registry:
        for name in ("shared-a", "shared-b", "small"):
            images.push(images.image(name), registry.host)
        with FaultServer(upstream=registry.host) as server:
            yield server


def clean(host: Host, *flags: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(host.clip("cache", "clean", "--json", *flags).stdout)
    return answer


def removed(answer: dict[str, Any]) -> dict[str, int]:
    """kind → how many."""
    kinds = [row["kind"] + (" part" if row["part"] else "") for row in answer["removed"]]
    return {kind: kinds.count(kind) for kind in set(kinds)}


def kept(host: Host) -> tuple[int, int]:
    """(layers with data, trees)."""
    layers = [path for path in (host.state_dir / "cache").iterdir() if path.is_dir()]
    return len(layers), len(list((host.state_dir / "trees").iterdir()))


@contextmanager
def cleaning(host: Host) -> Iterator[list[dict[str, Any]]]:
    """Meanwhile the daemon cleans everything, as often as it can. Gives its answers."""
    stop = threading.Event()
    answers: list[dict[str, Any]] = []

    def clean_on() -> None:
        with Client(host) as client:
            while not stop.is_set():
                answer = client.ask({"op": "clean", "max_bytes": 0})
                while "wait" in answer:
                    answer = client.receive()
                answers.append(answer)

    thread = threading.Thread(target=clean_on)
    thread.start()
    try:
        yield answers
    finally:
        stop.set()
        thread.join()
    assert answers
    assert all(answer["ok"] for answer in answers), answers


@contextmanager
def filled(server: FaultServer, **settings: str) -> Iterator[tuple[Host, Path]]:
    with tree(server, **settings) as (host, target):
        for name in FILES:
            assert sha256(target / name) == right(name)
        yield host, target


def test_spans_in_use_go_and_come_back(server: FaultServer) -> None:
    with filled(server) as (host, target):
        assert removed(clean(host, "--max-age", "0")) == {}
        before = clean(host, "--max-bytes", "0", "--dry-run")
        assert before["dry_run"]
        assert before["freed_bytes"] > 7_000_000
        assert clean(host, "--max-bytes", "0", "--dry-run")["removed"] == before["removed"]  # nothing happened
        after = clean(host, "--max-bytes", "0")
        assert "layer part" in removed(after)
        assert set(removed(after)) == {"layer part"}  # the tree is in use, and so are its layers
        assert after["freed_bytes"] > 7_000_000
        on_disk = sum(row["disk_bytes"] for row in json.loads(host.clip("cache", "ls", "--json").stdout)["layers"])
        assert on_disk < 1_000_000
        drop_page_cache()
        for name in FILES:
            assert sha256(target / name) == right(name)
        text = host.clip("cache", "clean", "--max-bytes", "0").stdout
        assert "of it" in text
        assert "freed " in text.splitlines()[-1]


def test_readers_never_notice(server: FaultServer) -> None:
    """The cleaner empties the cache again and again under readers that drop the page cache."""
    with filled(server) as (host, target), cleaning(host) as done:
        for _ in range(4):
            drop_page_cache()
            for name in FILES:
                assert sha256(target / name) == right(name)
    assert sum(answer["freed_bytes"] for answer in done) > 10_000_000


def test_spans_stay_while_the_registry_is_away(server: FaultServer) -> None:
    with tree(server, CLIP_SHIM_READ_DEADLINE="500ms") as (host, target):
        for name in FILES[:10]:
            sha256(target / name)
        server.faults.add("GET", r"/blobs/", status=404)
        subprocess.run(["cat", target / FILES[-1]], capture_output=True)
        assert removed(clean(host, "--max-bytes", "0")) == {}
        drop_page_cache()
        for name in FILES[:10]:
            assert sha256(target / name) == right(name)


@pytest.mark.parametrize("with_daemon", [True, False])
def test_what_nobody_uses_goes(server: FaultServer, with_daemon: bool) -> None:
    with Host(settings=LINGER) as host:
        host.trust_registry(server.host)
        child = host.start_daemon()
        indexes = [host.index(f"{server.host}/{name}:latest", name) for name in ("shared-a", "small")]
        hexes = []
        for index in indexes:
            with Client(host) as client:
                answer = client.acquire(index)
                hexes.append(answer["index"])
                host.run("cat", f"{answer['tree']}/etc/passwd", check=False)
        wait_for("the trees are unmounted", lambda: not host.status()["layers"])
        pinned = host.clip("cache", "pin", indexes[1]).stdout
        assert hexes[1] in pinned
        if not with_daemon:
            child.terminate()
            child.wait(30)
        layers, trees = kept(host)
        assert trees == 2
        done = clean(host, "--max-age", "1d")
        assert done["removed"] == []
        done = clean(host, "--max-age", "0")
        assert {row["what"] for row in done["removed"]} == {f"{server.host}/shared-a:latest"}
        assert removed(done)["tree"] == 1
        left, trees = kept(host)
        assert (host.state_dir / "trees" / hexes[1].removeprefix("sha256:")).is_dir()
        assert trees == 1
        assert left == layers - removed(done)["layer"]
        host.clip("cache", "unpin", f"{server.host}/small:latest")
        assert host.clip("cache", "unpin", indexes[1], check=False).returncode == 1
        clean(host, "--max-bytes", "0")
        assert kept(host) == (0, 0)
        if not with_daemon:
            host.start_daemon()
        for index in indexes:
            assert acquire(host, index)["ok"]


def test_without_a_daemon_what_a_mount_uses_stays(server: FaultServer) -> None:
    """The daemon is gone, a container still has its tree."""
    with filled(server) as (host, _target):
        for child in host._children:
            child.terminate()
            child.wait(30)
        done = clean(host, "--max-bytes", "0")
        assert done["removed"] == []
        assert kept(host)[1] == 1
        host.start_daemon()


def test_starts_of_an_image_that_is_being_cleaned(server: FaultServer) -> None:
    """Acquire, let go, clean everything: at once and over and over; every acquire gets a tree that can be read."""
    with Host(settings={"CLIP_SHIM_TREE_LINGER": "0s"}) as host:
        host.trust_registry(server.host)
        host.start_daemon()
        index = host.index(f"{server.host}/small:latest", "small")
        with cleaning(host) as done:
            for _ in range(25):
                with Client(host) as client:
                    answer = client.acquire(index)
                    assert answer["ok"], answer
                    assert (Path(answer["tree"]) / "bin").is_dir()
                host.clip("status")  # time to unmount it
        assert [row for answer in done for row in answer["removed"] if row["kind"] == "tree"]


def test_a_start_counts_as_use(server: FaultServer) -> None:
    with Host(settings=LINGER) as host:
        host.trust_registry(server.host)
        host.start_daemon()
        indexes = [host.index(f"{server.host}/{name}:latest", name) for name in ("shared-a", "small")]
        for index in indexes:
            acquire(host, index)
        wait_for("the trees are unmounted", lambda: not host.status()["layers"])
        long_ago = time.time() - 100 * 86400
        for meta in host.state_dir.glob("*/*/meta.json"):
            os.utime(meta, (long_ago, long_ago))
        acquire(host, indexes[0])
        wait_for("the tree is unmounted", lambda: not host.status()["layers"])
        images_gone = {row["what"] for row in clean(host)["removed"]}  # by the default of 30 days
        assert images_gone == {f"{server.host}/small:latest"}


@pytest.mark.parametrize("with_daemon", [True, False])
def test_a_clock_that_goes_ahead_makes_nothing_old(server: FaultServer, with_daemon: bool) -> None:
    """By the cleaner's note and by the files' times it did, by 100 days; then 31 days really pass."""
    day = 86400

    def go_on(days: int, *, really: bool) -> None:
        note = json.loads((host.state_dir / "cache/clock").read_text())
        for key in ("wall", "up", "believed") if really else ("wall",):
            note[key] -= days * day
        (host.state_dir / "cache/clock").write_text(json.dumps(note))
        for meta in host.state_dir.glob("*/*/meta.json"):
            when = meta.stat().st_mtime - days * day
            os.utime(meta, (when, when))

    with Host(settings=LINGER) as host:
        host.trust_registry(server.host)
        child = host.start_daemon()
        acquire(host, host.index(f"{server.host}/small:latest", "small"))
        wait_for("the tree is unmounted", lambda: not host.status()["layers"])
        wait_for("the clocks are noted", (host.state_dir / "cache/clock").exists)
        if not with_daemon:
            child.terminate()
            child.wait(30)
        go_on(100, really=False)
        assert clean(host)["removed"] == []
        assert clean(host)["removed"] == []
        assert removed(clean(host, "--max-age", "90d", "--dry-run"))["tree"] == 1  # a person sees the clock
        go_on(31, really=True)
        assert removed(clean(host))["tree"] == 1


def test_what_was_used_in_the_future_was_used_by_now(server: FaultServer) -> None:
    with Host(settings=LINGER) as host:
        host.trust_registry(server.host)
        host.start_daemon()
        acquire(host, host.index(f"{server.host}/small:latest", "small"))
        wait_for("the tree is unmounted", lambda: not host.status()["layers"])
        metas = list(host.state_dir.glob("*/*/meta.json"))
        for meta in metas:
            os.utime(meta, (time.time() + 1e8,) * 2)
        clean(host)
        assert metas
        assert max(meta.stat().st_mtime for meta in metas) <= time.time()


def test_a_full_disk_wakes_it(server: FaultServer) -> None:
    """STATE/cache is a disk of 12 MB: what is idle there makes room for what is read now."""
    with Host(settings=LINGER) as host:
        host.trust_registry(server.host)
        cache = host.state_dir / "cache"
        cache.mkdir()
        host.run("mount", "-t", "tmpfs", "-o", "size=12m", "cache", cache)
        child = host.start_daemon()
        first = host.index(f"{server.host}/small:latest", "small")
        index = host.index(f"{server.host}/shared-a:latest", "a")
        with Client(host) as client:
            answer = client.acquire(first)
            host.run("sh", "-c", f"find {answer['tree']} -type f -exec cat {{}} + | wc -c")
        wait_for("the tree is unmounted", lambda: not host.status()["layers"])
        with Client(host) as client:
            answer = client.acquire(index)
            for name in FILES:
                assert sha256(Path(answer["tree"]) / name) == right(name)
            wait_for("the cleaner has worked", lambda: "cache cleaned" in (host.base / "log" / "daemon").read_text())
        wait_for("the tree is unmounted", lambda: not host.status()["layers"])
        stop(child)
        marks = {"CLIP_SHIM_CACHE_FREE_LOW": "1%", "CLIP_SHIM_CACHE_FREE_HIGH": "99%"}
        assert json.loads(host.clip("cache", "clean", "--json", env=marks).stdout)["removed"] == []
        marks["CLIP_SHIM_CACHE_FREE_LOW"] = "98%"
        done = json.loads(host.clip("cache", "clean", "--json", env=marks).stdout)
        assert {row["reason"] for row in done["removed"]} == {"space"}
        assert done["free_bytes"] > 0.98 * (12 << 20)
