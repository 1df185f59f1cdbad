"""What a reader of a lazy tree sees when the registry misbehaves: right bytes, a wait, or EIO with one log line.

Against a real HTTP server in front of a real registry; the whole path runs: index, daemon, EROFS over FUSE, fetch.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator

import pytest

from tests.support import images
from tests.support.faultserver import FaultServer
from tests.support.lazytree import FILES, drop_page_cache, failures, log_lines, read_error, right, sha256, tree
from tests.support.registry import Registry


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as registry:
        images.push(images.image("shared-a"), registry.host)
        yield registry


def test_wrong_bytes_are_never_served_and_are_fetched_again(registry: Registry) -> None:
    with FaultServer(registry.host) as server, tree(server, CLIP_SHIM_READ_DEADLINE="2s") as (host, target):
        server.faults.add("GET", "/blobs/", corrupt_at=70_000, need=("Range", "bytes="))
        assert read_error(target / FILES[0]) == errno.EIO
        assert failures(host)
        server.faults.clear()
        assert sha256(target / FILES[0]) == right(FILES[0])


def test_one_wrong_answer_is_not_noticed_by_the_reader(registry: Registry) -> None:
    with FaultServer(registry.host) as server, tree(server) as (host, target):
        fault = server.faults.add("GET", "/blobs/", corrupt_at=70_000, need=("Range", "bytes="), times=1)
        assert sha256(target / FILES[0]) == right(FILES[0])
        assert fault.used == 1
        assert not log_lines(host, "read failed")


@pytest.mark.parametrize(
    "what",
    [
        {"truncate_at": 50_000},
        {"reset_at": 50_000},
        {"status": 503, "retry_after": "0"},
        {"status": 429, "retry_after": "0"},
        {"drop": True},
    ],
    ids=["truncated", "reset", "503", "429", "dropped"],
)
def test_passing_trouble_is_not_noticed_by_the_reader(registry: Registry, what: dict[str, object]) -> None:
    with FaultServer(registry.host) as server, tree(server) as (_, target):
        fault = server.faults.add("GET", "/blobs/", times=2, need=("Range", "bytes="), **what)
        for name in FILES:
            assert sha256(target / name) == right(name)
        assert fault.used == 2


def test_whole_answer_to_a_range_is_read_from_its_start(registry: Registry) -> None:
    with FaultServer(registry.host) as server, tree(server) as (_, target):
        server.faults.add("GET", "/blobs/", ignore_range=True)
        for name in reversed(FILES):
            assert sha256(target / name) == right(name)


def test_a_read_waits_for_its_deadline_then_fails_with_one_line(registry: Registry) -> None:
    with FaultServer(registry.host) as server, tree(server, CLIP_SHIM_READ_DEADLINE="1s") as (host, target):
        server.faults.add("GET", "/blobs/", hang=True)
        fd = os.open(target / FILES[0], os.O_RDONLY)
        try:
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(fd, 4096, 0)
        finally:
            os.close(fd)
        line = failures(host)[-1]
        assert line["file"] == f"/{FILES[0]}"
        assert line["host"] == server.host
        assert str(line["layer"]).startswith("sha256:")
        assert line["cause"]


def test_a_registry_that_comes_back_in_time_is_waited_for(registry: Registry) -> None:
    with FaultServer(registry.host) as server, tree(server) as (host, target):
        server.faults.add("GET", "/blobs/", drop=True, times=4)
        assert sha256(target / FILES[7]) == right(FILES[7])
        assert not log_lines(host, "read failed")


def test_what_is_cached_needs_no_registry(registry: Registry) -> None:
    with FaultServer(registry.host) as server, tree(server) as (_, target):
        for name in FILES:
            sha256(target / name)
        drop_page_cache()
        server.faults.add("*", "", drop=True)
        server.reset_counts()
        for name in FILES:
            assert sha256(target / name) == right(name)
        assert server.count() == 0


def test_one_registrys_trouble_does_not_hold_up_another_image(registry: Registry) -> None:
    images.push(images.image("small"), registry.host)
    with FaultServer(registry.host) as server, tree(server) as (host, target):
        host.trust_registry(registry.host)
        server.faults.add("GET", "/blobs/", hang=True)
        waiting = [host.start("cat", target / name, log="cat") for name in FILES]
        other = host.base / "other"
        other.mkdir()
        host.clip("mount", host.index(f"{registry.host}/small:latest", "s"), other)
        try:
            assert host.output("sh", "-c", f"cat {other}/etc/passwd", timeout=20).startswith("root:")
            assert all(child.poll() is None for child in waiting)
        finally:
            for child in waiting:
                child.kill()
            ended = [child.wait(10) for child in waiting]
            host.clip("umount", other)
        assert ended == [-signal.SIGKILL] * len(FILES)
