"""What `status` says of images, containers, layers and waiting reads; and the log line of a read that fails."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import bundle, images
from tests.support.daemonclient import log_lines
from tests.support.host import CLIP_SHIM, Host, wait_for
from tests.support.proxy import Proxy
from tests.support.registry import Registry

WAITER = "trap 'go=1' USR1; echo ready; while [ -z \"$go\" ]; do sleep 0.05; done; "


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as registry:
        images.push(images.image("small"), registry.host)
        yield registry


def start(host: Host, made: Path) -> subprocess.Popen[bytes]:
    """A container that says "ready" and reads on USR1."""
    child = host.start(host.runtime, "run", "--bundle", made, made.name, log=made.name)
    output = host.base / "log" / made.name
    wait_for("the container is ready", lambda: b"ready" in output.read_bytes() or child.poll() is not None)
    assert child.poll() is None, host.logs()
    return child


def test_everything_is_named(registry: Registry, tmp_path: Path) -> None:
    with Proxy(registry.host) as proxy, Host(settings={"CLIP_SHIM_READ_DEADLINE": "6s"}) as host:
        host.trust_registry(proxy.address)
        daemon = host.start_daemon()
        index = host.index(f"{proxy.address}/small:latest", "small")
        script = WAITER + "cat /data/noise.bin >/dev/null; sleep 1000"
        made = bundle.make(tmp_path / "named", ["sh", "-c", script], index=index)
        child = start(host, made)
        status = host.status()
        assert status["daemon"]["pid"] != daemon.pid  # the server, not its supervisor
        assert status["daemon"]["supervisor"] == daemon.pid
        assert status["daemon"]["handover"] == ""
        (image,) = status["images"]
        assert image["image"] == f"{proxy.address}/small:latest"
        assert image["overlays"] == 1
        (container,) = status["containers"]
        assert container["id"] == "named"
        assert container["index"] == image["index"]
        assert container["rootfs"].startswith(f"{host.run_dir}/containers/")
        assert sorted(layer["diff_id"] for layer in status["layers"]) == sorted(image["layers"])
        for layer in status["layers"]:
            assert {"diff_id", "size", "cached_bytes", "fetched_bytes", "open"} <= set(layer)
            assert layer["open"] >= 1
        assert status["waiting"] == []
        text = host.clip("status").stdout
        assert f"pid {status['daemon']['pid']}" in text
        assert "named" in text
        assert "health  good" in text
        assert re.search(r"/small:latest +[0-9a-f]{12} +1 +\d+ +[0-9.]+ MiB +[0-9.]+ % ", text)
        assert host.clip("status", "--waiting").stdout == "no read is waiting\n"

        proxy.stall()
        host.run(host.runtime, "kill", "named", "USR1")
        wait_for("the read is waiting", lambda: host.status()["waiting"])
        assert "reads wait" in host.clip("status").stdout
        line = host.clip("status", "--waiting").stdout.splitlines()[1]
        for part in ("named", "/data/noise.bin", proxy.address, " s "):
            assert part in line
        row = host.status()["waiting"][0]
        assert row["process"] in ("cat", "busybox")
        assert row["container"] == "named"
        assert row["layer"] in image["layers"]

        wait_for("the read fails", lambda: log_lines(host, "read failed"))
        failed = log_lines(host, "read failed")[0]
        assert failed["file"] == "/data/noise.bin"
        assert failed["layer"] in image["layers"]
        assert failed["host"] == proxy.address
        assert failed["container"] == "named"
        assert failed["image"] == f"{proxy.address}/small:latest"
        assert "reads failed" in host.clip("status").stdout
        assert failed["waited"] >= 5.9
        assert failed["cause"]
        proxy.resume()
        host.run(host.runtime, "delete", "--force", "named", check=False)
        child.wait(30)
        wait_for("the container is gone", lambda: not host.status()["containers"])


def test_many_failures_cost_few_lines(registry: Registry) -> None:
    """A program that reads on after errors: lines are counted, not written."""
    with Proxy(registry.host) as proxy, Host(settings={"CLIP_SHIM_READ_DEADLINE": "300ms"}) as host:
        host.trust_registry(proxy.address)
        host.start_daemon()
        index = host.index(f"{proxy.address}/small:latest", "small")
        target = host.base / "tree"
        target.mkdir()
        host.clip("mount", index, target)
        proxy.stall()
        reader = "for n in $(seq 100); do cat $0/data/many/$(printf %03d $n) & done 2>/dev/null; wait"
        host.run("sh", "-c", reader, target, check=False)
        wait_for("failures are counted", lambda: log_lines(host, "more reads failed"))
        lines = log_lines(host, "read failed")
        assert 1 <= len(lines) <= 60
        assert all(line["file"].startswith("/data/") for line in lines)
        proxy.resume()
        host.clip("umount", target)


def test_json_is_one_document(registry: Registry) -> None:
    with Host() as host:
        host.start_daemon()
        document = json.loads(host.clip("status", "--json").stdout)
        assert set(document) >= {"daemon", "images", "containers", "layers", "waiting", "registries"}
        assert document["daemon"]["tier"] in ("erofs", "erofs-loop", "fuse")


def test_watch_shows_it_again(registry: Registry) -> None:
    with Host() as host:
        host.start_daemon()
        child = host.start(CLIP_SHIM, "status", "--watch", "0.1", "--json", log="watch")
        output = host.base / "log" / "watch"
        wait_for("three answers", lambda: output.read_text().count("\n") >= 3 or child.poll() is not None)
        first, second = map(json.loads, output.read_text().splitlines()[:2])
        assert first["daemon"]["pid"] == second["daemon"]["pid"]
        assert second["daemon"]["uptime"] >= first["daemon"]["uptime"]
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130
