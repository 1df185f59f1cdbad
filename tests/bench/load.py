"""Load: fifty containers at once, two hundred readers of one cold layer, a daemon that is short of CPU and memory, a
layer whose registry hangs beside one that is read."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.bench.common import Row, drop_caches, mb
from tests.support import images, load
from tests.support.daemonclient import log_lines, server_pid
from tests.support.faultserver import FaultServer
from tests.support.host import Host, wait_for
from tests.support.registry import Registry

IMAGES = ("small", "odd", "app", "shared-a", "shared-b")
CONTAINERS = 50
READERS = 200
SECONDS = 5
BAR = 5.0  # ms, the 99th percentile of cached reads


def measure(registry: Registry) -> list[Row]:
    for name in (*IMAGES, "debian"):
        images.push(images.image(name), registry.host)
    with FaultServer(upstream=registry.host) as server:
        return [*_storm(server), *_readers(server), *_pressure(server), _beside(server)]


def _host(server: FaultServer) -> Host:
    host = Host()
    host.trust_registry(server.host)
    return host


def _mount(host: Host, server: FaultServer, name: str) -> str:
    """Mounts the image; returns the diff id of its largest layer."""
    target = host.base / name
    target.mkdir()
    host.clip("mount", host.index(f"{server.host}/{name}:latest", name), target)
    return load.largest(images.image(name))[0]


def _storm(server: FaultServer) -> list[Row]:
    with _host(server) as host, tempfile.TemporaryDirectory() as work:
        indexes = [host.index(f"{server.host}/{name}:latest", name) for name in IMAGES]
        host.start_daemon()
        drop_caches()
        ended = load.storm(host, indexes, CONTAINERS, Path(work))
        failed = sum(1 for item in ended if item.code)
        outputs = {(item.index, item.output) for item in ended}
        right = not failed and len(outputs) == len(IMAGES)
        first = sorted(item.first for item in ended)
        last = max(item.seconds for item in ended)
        layers = host.status()["layers"]
        twice = [row for row in layers if row["demand_bytes"] + row["ahead_bytes"] > row["size"]]
        fetched = sum(row["fetched_bytes"] for row in layers)
        wait_for("the containers are gone", lambda: not host.status()["containers"])
    return [
        Row(
            f"{CONTAINERS} containers of {len(IMAGES)} images at once, cold, each hashes all its files",
            f"first line after {load.percentile(first, 0.5):.1f} s median, {first[-1]:.1f} s last; "
            f"all done in {last:.1f} s; {mb(fetched)} fetched, {failed} failed",
            "all right, nothing fetched twice",
            right and not twice,
        )
    ]


def _readers(server: FaultServer) -> list[Row]:
    with _host(server) as host:
        host.start_daemon()
        diff_id = _mount(host, server, "debian")
        data = load.largest(images.image("debian"))[1]
        drop_caches()
        seen = load.result(load.start_reader("readers", load.blob_of(host, diff_id), READERS, 40))
        row = load.layer_row(host, diff_id)
        twice = row["demand_bytes"] + row["ahead_bytes"] - row["cached_bytes"]
        wrong = len(load.check_sums(seen["sums"], data)) + len(seen["wrong"]) + len(seen["errors"])
        host.clip("umount", host.base / "debian")
    return [
        Row(
            f"{READERS} readers of one cold layer ({mb(len(data))}), 40 × 128 KiB each, no page cache",
            f"{seen['seconds']:.1f} s, {mb(READERS * 40 * load.PIECE / seen['seconds'])}/s; "
            f"{mb(row['cached_bytes'])} fetched once, {twice} bytes twice, {wrong} wrong",
            "each span once, none wrong",
            not twice and not wrong,
        )
    ]


def _pressure(server: FaultServer) -> list[Row]:
    rows = []
    with _host(server) as host:
        host.start_daemon()
        diff_id = _mount(host, server, "debian")
        data = load.largest(images.image("debian"))[1]
        blob = load.blob_of(host, diff_id)
        load.result(load.start_reader("readers", blob, 16, 1 << 20))  # all of it is cached now
        calm = load.result(load.start_reader("latency", blob, SECONDS))
        with load.busy(8):
            loaded = load.result(load.start_reader("latency", blob, SECONDS))
        with load.little_memory(server_pid(host), 96 << 20) as limited:
            seen = load.result(load.start_reader("readers", blob, 16, 200))
            tight = load.result(load.start_reader("latency", blob, SECONDS))
        wrong = len(load.check_sums(seen["sums"], data)) + len(seen["errors"]) + len(log_lines(host, "read failed"))
        host.clip("umount", host.base / "debian")
    for what, times, bar in (
        ("cached reads of 4 KiB past the page cache, nothing else running", calm, BAR),
        ("the same beside 8 processes that use all CPU", loaded, None),
        (
            "the same with the daemon in 96 MiB, page cache included" if limited else "(no memory controller)",
            tight,
            None,
        ),
    ):
        rows.append(_row(what, times, bar))
    rows.append(Row("wrong or failed reads meanwhile", str(wrong), "0", wrong == 0))
    return rows


def _beside(server: FaultServer) -> Row:
    with _host(server) as host:
        host.start_daemon()
        fast, slow = _mount(host, server, "debian"), _mount(host, server, "small")
        blob = load.blob_of(host, fast)
        load.result(load.start_reader("readers", blob, 16, 1 << 20))
        server.faults.add("GET", r"/small/blobs/", hang=True)
        stuck = load.start_reader("readers", load.blob_of(host, slow), 50, 1)
        wait_for("readers wait", lambda: len(host.status()["waiting"]) >= 20)
        times = load.result(load.start_reader("latency", blob, SECONDS))
        still = len(host.status()["waiting"])
        server.faults.clear()
        stuck.kill()
        stuck.wait()
        for name in ("debian", "small"):
            host.clip("umount", host.base / name)
    return _row(f"the same while {still} reads wait for a layer whose registry hangs", times, BAR)


def _row(what: str, times: list[float], bar: float | None) -> Row:
    p99 = load.percentile(times, 0.99)
    measured = (
        f"{load.percentile(times, 0.5):.2f} ms median, {p99:.2f} ms p99, {times[-1]:.1f} ms longest of {len(times)}"
    )
    return Row(what, measured, f"p99 < {bar:g} ms" if bar else "", None if bar is None else p99 < bar)
