"""Drain, and what comes after it: a boot with the registry away, no network and no token."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import bundle, images
from tests.support.daemonclient import log_lines
from tests.support.faultserver import FaultServer
from tests.support.host import Host, stop, wait_for
from tests.support.lazytree import FILES, right, sha256, tree
from tests.support.load import EVERYTHING
from tests.support.registry import Registry


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with Registry() as registry:
        for name in ("small", "shared-a"):
            images.push(images.image(name), registry.host)
        with FaultServer(upstream=registry.host) as server:
            yield server


def drain(host: Host, *flags: str) -> tuple[int, dict[str, Any]]:
    done = host.clip("drain", "--json", *flags, check=False)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def run(host: Host, path: Path, index: Path | str, script: str) -> str:
    """A container from start to end; what it printed."""
    made = bundle.make(path, ["sh", "-c", script], index=index)
    return host.output(*host.oci, "run", "--bundle", made, path.name)


def test_a_boot_without_network(server: FaultServer, tmp_path: Path) -> None:
    with Host() as host:
        with FaultServer(upstream=server.upstream) as registry:
            host.trust_registry(registry.host)
            daemon = host.start_daemon()
            reference = f"image://{registry.host}/small:latest"
            index = host.index(f"{registry.host}/small:latest", "small")
            made = bundle.make(tmp_path / "first", ["sh", "-c", "echo ready; sleep 1000"], index=index)
            child = host.start(*host.oci, "run", "--bundle", made, "first", log="first")
            wait_for("the container runs", lambda: "ready" in (host.base / "log" / "first").read_text())
            expected = run(host, tmp_path / "sum", reference, EVERYTHING)
            code, answer = drain(host)
            assert (code, answer["independent"]) == (0, True)
            assert any(row["containers"] == ["first"] for row in answer["images"])
            assert all(row["missing_bytes"] == 0 for row in answer["images"])
            assert "nothing depends on a registry" in host.clip("drain").stdout
            host.run(*host.oci, "delete", "--force", "first")
            child.wait(30)
            stop(daemon)
        for _, point, _ in reversed(host.mounts()):
            host.run("umount", "-l", point)
        shutil.rmtree(host.run_dir)  # as a boot does
        host.run_dir.mkdir(mode=0o700)

        host.start_daemon()  # and nobody listens at the registry's address
        assert run(host, tmp_path / "second", index, EVERYTHING) == expected
        assert run(host, tmp_path / "third", reference, EVERYTHING) == expected
        assert drain(host)[0] == 0
        assert log_lines(host, "read failed") == []


def test_who_depends_on_the_registry_is_named(server: FaultServer, tmp_path: Path) -> None:
    with Host() as host:
        host.trust_registry(server.host)
        assert drain(host) == (0, {"independent": True, "images": []})  # no daemon, and nothing that needs one
        daemon = host.start_daemon()
        index = host.index(f"{server.host}/small:latest", "small")
        made = bundle.make(tmp_path / "box", ["sh", "-c", "echo ready; sleep 1000"], index=index)
        host.start(*host.oci, "run", "--bundle", made, "box", log="box")
        wait_for("the container runs", lambda: "ready" in (host.base / "log" / "box").read_text())
        fault = server.faults.add("GET", r"/blobs/", status=404)
        code, answer = drain(host)
        (row,) = answer["images"]
        assert (code, answer["independent"]) == (1, False)
        assert row["missing_bytes"] > 0
        assert row["containers"] == ["box"]
        assert row["errors"]
        text = host.clip("drain", "--timeout", "100ms", check=False).stdout
        assert "box" in text
        assert "1 of 1 images depend on a registry" in text
        fault.times = 0
        assert drain(host)[0] == 0
        stop(daemon)
        code, answer = drain(host)
        assert code == 1
        assert answer["images"][0]["errors"] == ["no daemon serves it"]
        assert answer["images"][0]["containers"] == ["box"]
        host.run(*host.oci, "delete", "--force", "box")


def test_a_quiet_container_is_completed(server: FaultServer) -> None:
    """The daemon's own thread, with a quiet time of a moment."""
    settings = {"CLIP_SHIM_BACKGROUND_ENABLED": "true", "CLIP_SHIM_BACKGROUND_AFTER": "300ms"}
    with tree(server, **settings) as (host, target):
        assert sha256(target / FILES[0]) == right(FILES[0])
        wait_for("everything is here", lambda: all(x["cached_bytes"] == x["size"] for x in host.status()["layers"]))
        server.faults.add("GET", r"/blobs/", status=503)
        for name in FILES:
            assert sha256(target / name) == right(name)
        done = subprocess.run(["find", target, "-type", "f", "-exec", "cat", "{}", "+"], capture_output=True)
        assert done.returncode == 0
        assert len(log_lines(host, "a layer is complete: it needs no registry any more")) >= 1
