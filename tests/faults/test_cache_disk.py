"""The disk of the cache is full, out of inodes or read-only: reads go on from memory, and every byte is right.

Real file systems: a small tmpfs, ext4 with few inodes. (A disk that fails to write: tests/unit/test_cache_layer.py;
a loop device over a full disk reports short writes as done.)
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.daemonclient import Client, log_lines, trees
from tests.support.faultserver import FaultServer
from tests.support.host import Host, stop, wait_for
from tests.support.lazyimage import FILES, LazyImage, content, serve
from tests.support.lazytree import drop_page_cache

SAID = "the layer cache cannot be written; reads go on from memory"


def run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


@contextmanager
def tmpfs(at: Path, size: str) -> Iterator[None]:
    at.mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", at)
    try:
        yield
    finally:
        run("umount", at)


@contextmanager
def full(host: Host, cache: Path) -> Iterator[None]:
    with tmpfs(cache, "400k"):
        host.start_daemon()
        yield
        assert stop(host.daemon)


@contextmanager
def without_inodes(host: Host, cache: Path) -> Iterator[None]:
    image = host.base / "ext4"
    image.touch()
    os.truncate(image, 8 << 20)
    run("mkfs.ext4", "-q", "-F", "-N", "32", image)
    cache.mkdir()
    run("mount", "-o", "loop", image, cache)
    host.start_daemon()
    free = os.statvfs(cache).f_ffree
    for number in range(free):
        (cache / f"file{number}").touch()
    yield
    assert stop(host.daemon)
    run("umount", cache)


@contextmanager
def read_only(host: Host, cache: Path) -> Iterator[None]:
    with tmpfs(cache, "4m"):
        run("mount", "-o", "remount,ro", cache)
        host.start_daemon()
        yield
        assert stop(host.daemon)


def check(host: Host, image: LazyImage, index: Path) -> None:
    """Read everything, twice, without help of the page cache."""
    with Client(host) as client:
        answer = client.acquire(index)
        assert answer["ok"], answer
        for _ in range(2):
            for name in FILES:
                assert (Path(answer["tree"]) / name).read_bytes() == content(image.seed, name)
            drop_page_cache()
    wait_for("the tree is unmounted", lambda: not trees(host))


@pytest.mark.parametrize("disk", [full, without_inodes, read_only], ids=lambda disk: disk.__name__)
def test_reads_go_on_from_memory(disk: Callable[[Host, Path], Iterator[None]]) -> None:
    with FaultServer() as server, Host(settings={"CLIP_SHIM_TREE_LINGER": "100ms"}) as host:
        host.trust_registry(server.host)
        image = serve(server, "app", 50)
        index = image.index(host.indexes / "app.clip")
        with ExitStack() as stack:
            stack.enter_context(disk(host, host.state_dir / "cache"))  # type: ignore[arg-type]
            check(host, image, index)
            wait_for(
                "it is said", lambda: log_lines(host, "the layer cache cannot be written; reads go on from memory")
            )
            check(host, image, index)
        assert not log_lines(host, "read failed")


def test_a_read_only_cache_is_still_used() -> None:
    with FaultServer() as server, Host(settings={"CLIP_SHIM_TREE_LINGER": "100ms"}) as host:
        host.trust_registry(server.host)
        image = serve(server, "app", 51)
        index = image.index(host.indexes / "app.clip")
        cache = host.state_dir / "cache"
        with tmpfs(cache, "8m"):
            host.start_daemon()
            check(host, image, index)
            assert stop(host.daemon)
            run("mount", "-o", "remount,ro", cache)
            server.faults.add("*", "", drop=True)
            server.reset_counts()
            host.start_daemon()
            check(host, image, index)
            assert server.count() == 0
            assert stop(host.daemon)
