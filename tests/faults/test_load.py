"""Load in small: the rules that must hold whatever the speed. The figures are in tests/bench/load.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import images, load
from tests.support.daemonclient import log_lines, server_pid
from tests.support.faultserver import FaultServer
from tests.support.host import Host, wait_for
from tests.support.registry import Registry

IMAGES = ("small", "shared-a", "shared-b")


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with Registry() as registry:
        for name in IMAGES:
            images.push(images.image(name), registry.host)
        with FaultServer(upstream=registry.host) as server:
            yield server


def mounted(host: Host, server: FaultServer, name: str) -> Path:
    target = host.base / name
    target.mkdir()
    host.clip("mount", host.index(f"{server.host}/{name}:latest", name), target)
    return target


def test_every_span_is_fetched_once_whoever_reads(server: FaultServer) -> None:
    """60 readers of one cold layer, each in an order of its own."""
    image = images.image("shared-a")
    diff_id, data = load.largest(image)
    with Host() as host:
        host.trust_registry(server.host)
        host.start_daemon()
        target = mounted(host, server, "shared-a")
        seen = load.result(load.start_reader("readers", load.blob_of(host, diff_id), 60, 40))
        assert seen["errors"] == []
        assert seen["wrong"] == []
        assert load.check_sums(seen["sums"], data) == []
        row = load.layer_row(host, diff_id)
        assert row["demand_bytes"] + row["ahead_bytes"] == row["cached_bytes"] <= row["size"]
        host.clip("umount", target)


def test_many_containers_at_once(server: FaultServer, tmp_path: Path) -> None:
    with Host() as host:
        host.trust_registry(server.host)
        indexes = [host.index(f"{server.host}/{name}:latest", name) for name in IMAGES]
        ended = load.storm(host, indexes, 6, tmp_path)
        assert [(item.code, item.output) for item in ended if item.code] == []
        for index in indexes:
            assert len({item.output for item in ended if item.index == index}) == 1
        assert len({item.output for item in ended}) == len(IMAGES)
        rows = host.status()["layers"]
        assert all(row["demand_bytes"] + row["ahead_bytes"] <= row["size"] for row in rows)
        wait_for("no container is left", lambda: not host.status()["containers"])


def test_a_layer_that_hangs_holds_up_nobody_else(server: FaultServer) -> None:
    """More readers wait for it than there are threads; another layer's cached and missing bytes come all the same."""
    diff_id, data = load.largest(images.image("shared-a"))
    with Host() as host:
        host.trust_registry(server.host)
        host.start_daemon()
        slow, fast = mounted(host, server, "small"), mounted(host, server, "shared-a")
        held = server.faults.add("GET", r"/small/blobs/", hang=True)
        waiting = load.start_reader("readers", load.blob_of(host, load.largest(images.image("small"))[0]), 40, 1)
        wait_for("readers wait", lambda: len(host.status()["waiting"]) >= 20)
        seen = load.result(load.start_reader("readers", load.blob_of(host, diff_id), 8, 80))
        assert seen["errors"] == []
        assert load.check_sums(seen["sums"], data) == []
        times = load.result(load.start_reader("latency", load.blob_of(host, diff_id), 1))
        assert times[-1] < 1000  # ms
        assert len(host.status()["waiting"]) >= 20
        assert waiting.poll() is None
        held.times = 0
        server.faults.clear()
        waiting.kill()
        waiting.wait()
        for target in (slow, fast):
            host.clip("umount", target)


def test_with_little_memory_and_no_cpu(server: FaultServer) -> None:
    """The server in 96 MiB, page cache included, beside four processes that take all CPU."""
    diff_id, data = load.largest(images.image("shared-a"))
    with Host() as host:
        host.trust_registry(server.host)
        host.start_daemon()
        target = mounted(host, server, "shared-a")
        blob = load.blob_of(host, diff_id)
        with load.busy(4), load.little_memory(server_pid(host), 96 << 20):
            seen = load.result(load.start_reader("readers", blob, 20, 30))
        assert seen["errors"] == []
        assert load.check_sums(seen["sums"], data) == []
        assert log_lines(host, "read failed") == []
        host.clip("umount", target)
