"""Metrics, start lines and start records of a real daemon with real containers."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shim import settings
from tests.support import bundle
from tests.support.daemonclient import Client, log_lines
from tests.support.host import CLIP_SHIM, ROOT, Host, wait_for
from tests.support.proxy import Proxy

READS = ["sh", "-c", "sha256sum /data/noise.bin /data/text.txt"]
STEPS = ("resolve_ms", "mount_ms", "overlay_ms", "verify_ms", "exec_ms")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host(settings={"CLIP_SHIM_METRICS_LISTEN": "127.0.0.1:0", "CLIP_SHIM_REPORT_SECONDS": "4s"}) as host:
        host.start_daemon()
        yield host


@pytest.fixture(scope="module")
def index(host: Host, pushed: Callable[[str], str]) -> Path:
    return host.index(pushed("small"), "small")


def scrape(host: Host) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, sorted labels) → value, of every sample."""
    wait_for("metrics are served", lambda: log_lines(host, "metrics are served"))
    listen = log_lines(host, "metrics are served")[0]["listen"]
    with urllib.request.urlopen(f"http://{listen}/metrics", timeout=20) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_a_start_is_one_line_and_moves_the_metrics(host: Host, index: Path, tmp_path: Path) -> None:
    before = scrape(host)
    made = bundle.make(tmp_path / "m1", READS, index=index)
    host.run(*host.oci, "run", "--bundle", made, "m1")
    (line,) = [line for line in log_lines(host, "container started") if line["container"] == "m1"]
    assert line["image"].endswith("/small:latest")
    assert all(line[step] > 0 for step in STEPS)
    assert sum(line[step] for step in STEPS) == pytest.approx(line["total_ms"], abs=0.1)
    assert {"index", "tier", "source", "fetched_bytes", "requests"} <= set(line)
    after = scrape(host)

    def grown(name: str, **labels: str) -> float:
        key = (f"clip_shim_{name}", tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0)

    assert grown("container_start_seconds_count") == 1
    assert grown("mount_seconds_count") == 1
    assert grown("reads_total", result="miss") > 0
    assert grown("read_wait_seconds_count") == grown("reads_total", result="miss")
    assert grown("fetched_data_bytes_total", reason="demand") > 100_000
    assert grown("fetched_bytes_total") > 100_000
    assert grown("read_failures_total") == 0
    status = host.status()
    assert grown("fetched_bytes_total") == sum(layer["fetched_bytes"] for layer in status["layers"])
    assert after["clip_shim_trees_mounted", ()] == len(status["images"])
    assert after["clip_shim_layers_served", ()] == len(status["layers"])
    assert after["clip_shim_cache_bytes", ()] > 0
    assert after["process_resident_memory_bytes", ()] > 1 << 20


def test_the_record_of_a_start(host: Host, index: Path, tmp_path: Path) -> None:
    """Every byte that was read is in it, also what came from the cache; and it ends."""
    made = bundle.make(tmp_path / "m2", READS, index=index)
    host.run(*host.oci, "run", "--bundle", made, "m2")
    with Client(host) as client:
        record = client.ask({"op": "report", "container": "m2"})
        assert record["ok"], record
        assert record["recording"]
        assert set(record["timings_ms"]) == {step.removesuffix("_ms") for step in STEPS}
        assert client.ask({"op": "report", "container": "nobody"})["kind"] == "DaemonError"
    wait_for("the recording ends", lambda: [x for x in log_lines(host, "container read") if x["container"] == "m2"])
    for layer in host.status()["layers"]:
        assert layer["diff_id"] in {f"sha256:{name.partition('-')[0]}" for name in record["layers"]}


def test_a_cold_record_shows_what_waited(pushed: Callable[[str], str], registry_address: str, tmp_path: Path) -> None:
    with Host() as host, Proxy(registry_address) as proxy:
        host.trust_registry(proxy.address)
        host.start_daemon()
        index = host.index(pushed("small").replace(registry_address, proxy.address), "small")
        made = bundle.make(tmp_path / "m3", READS, index=index)
        host.run(*host.oci, "run", "--bundle", made, "m3")
        with Client(host) as client:
            record = client.ask({"op": "report", "container": "m3"})
        assert record["waited"] > 0
        assert any(row[4] > 0 for row in record["events"])
        assert record["events"] == sorted(record["events"], key=lambda row: row[3])
        assert 100_000 < record["needed_bytes"] <= record["demand_bytes"] + record["ahead_bytes"] + 512
        assert 0 < record["fetched_bytes"] <= proxy.answered
        assert not record["shared"]
        shown = json.loads(host.clip("report", "m3", "--json", "-o", tmp_path / "m3.html").stdout)
        assert {"/data/noise.bin", "/data/text.txt"} <= {path for path, _ in shown["files"]}
        assert len(shown["file_of"]) == len(shown["events"])
        assert "/data/noise.bin" in (tmp_path / "m3.html").read_text()
        text = host.clip("report", "m").stdout
        assert "container m3 of" in text
        assert "/data/noise.bin" in text
        refused = host.clip("report", "nobody", check=False)
        assert (refused.returncode, "m3" in refused.stderr) == (1, True)


def test_every_metric_is_told_of_and_every_one_that_is_told_of_exists(host: Host, index: Path) -> None:
    """Dashboard, alert rules and the operations page name no metric that is not there, and the page names all."""
    host.run(CLIP_SHIM, "status")
    told = {}
    for path in (*(ROOT / "packaging/monitoring").iterdir(), ROOT / "systemd/README.md"):
        told[path.name] = set(re.findall(r"\b(?:clip_shim|process)_[a-z_]*[a-z]\b", path.read_text()))
    there = {name for name, _ in scrape(host)}
    there |= {name.removesuffix("_bucket") for name in there if name.endswith("_bucket")}
    assert len(told["grafana-dashboard.json"]) > 20
    for name, metrics in told.items():
        assert metrics - there == set(), name
    plain = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in there if name.startswith("clip_shim_")}
    assert plain - told["README.md"] == set()


def test_on_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    with Host(settings={"CLIP_SHIM_METRICS_LISTEN": f"unix:{path}"}) as host:
        host.start_daemon()
        wait_for("the socket is there", path.exists)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            data = b""
            while piece := client.recv(65536):
                data += piece
        assert b"\nclip_shim_trees_mounted 0.0\n" in data
        assert path.stat().st_mode & 0o777 == 0o600


def test_off_by_default() -> None:
    """And then nothing of it is loaded."""
    code = "import shim.daemon.server, sys; print(sorted({'http.server', 'prometheus_client'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    assert settings.load(env={})["metrics.listen"] == ""


def test_an_address_that_is_taken_does_not_stop_the_daemon() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with Host(settings={"CLIP_SHIM_METRICS_LISTEN": f"127.0.0.1:{taken.getsockname()[1]}"}) as host:
            host.start_daemon()
            wait_for("it is said", lambda: log_lines(host, "no metrics are served"))
            assert host.status()["daemon"]["pid"]
