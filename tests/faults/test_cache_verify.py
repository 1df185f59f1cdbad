"""`clip-shim cache ls` and `cache verify`: what a disk changed is found, given up and fetched again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.support.faultserver import FaultServer
from tests.support.host import Host, stop, wait_for
from tests.support.lazytree import FILES, drop_page_cache, right, sha256, tree
from tests.support.registry import Registry


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as registry:
        images.push(images.image("shared-a"), registry.host)
        yield registry


def verify(host: Host, layer: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and what was found in one layer."""
    done = host.clip("cache", "verify", "--json", *options, check=False)
    answer = json.loads(done.stdout)
    assert answer["ok"] == (done.returncode == 0), done.stderr
    (row,) = [row for row in answer["layers"] if row["name"] == layer.name]
    assert row["checked"]
    return done.returncode, {key: row[key] for key in ("wrong_spans", "mended")}


def listed(host: Host, layer: Path) -> dict[str, Any]:
    """A layer's row in `cache ls --json`."""
    rows = json.loads(host.clip("cache", "ls", "--json").stdout)["layers"]
    found: dict[str, Any]
    (found,) = [row for row in rows if row["name"] == layer.name]
    return found


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def big_layer(host: Host) -> Path:
    """The directory of the layer that the noise files are in."""
    (layer,) = [path for path in (host.state_dir / "cache").glob("*-*") if (path / "data").stat().st_size > 8_000_000]
    return layer


def all_right(target: Path) -> bool:
    drop_page_cache()
    return all(sha256(target / name) == right(name) for name in FILES)


def test_what_a_disk_changed_is_fetched_again(registry: Registry) -> None:
    with FaultServer(registry.host) as server, tree(server) as (host, target):
        assert all_right(target)
        layer = big_layer(host)
        wait_for("the bits are on disk", lambda: listed(host, layer)["cached_bytes"] > 8_000_000)
        assert listed(host, layer)["in_use"]
        assert listed(host, layer)["images"] == [f"{server.host}/shared-a:latest"]
        assert "open" in host.clip("cache", "ls").stdout
        assert verify(host, layer) == (0, {"wrong_spans": 0, "mended": False})

        # while the daemon serves the layer
        flip(layer / "data", 3_000_000)
        assert verify(host, layer, "--dry-run") == (1, {"wrong_spans": 1, "mended": False})
        done = host.clip("cache", "verify", check=False)
        assert done.returncode == 1
        assert "1 of" in done.stdout
        assert "fetched again" in done.stdout
        server.reset_counts()
        assert all_right(target)
        assert server.count("GET", "/blobs/") == 1
        wait_for("the bits are on disk", lambda: listed(host, layer)["cached_bytes"] > 8_000_000)
        assert verify(host, layer) == (0, {"wrong_spans": 0, "mended": False})


def test_the_cache_of_a_daemon_that_is_not_there(registry: Registry) -> None:
    with FaultServer(registry.host) as server, tree(server) as (host, target):
        assert all_right(target)
        layer = big_layer(host)
        host.clip("umount", target)
        stop(host.daemon)
        try:
            flip(layer / "data", 3_000_000)
            flip(layer / "data", 3_000_001)
            flip(layer / "data", 6_000_000)
            assert verify(host, layer) == (1, {"wrong_spans": 2, "mended": True})
            assert verify(host, layer) == (0, {"wrong_spans": 0, "mended": False})
            assert not listed(host, layer)["in_use"]
            os.truncate(layer / "data", 4_000_000)
            (layer / "meta.json").unlink()
            code, row = verify(host, layer)
            assert (code, row["mended"]) == (1, True)
            assert row["wrong_spans"] > 4
            (layer / "bitmap").write_bytes(b"torn")
            assert "torn" in host.clip("cache", "verify", check=False).stdout
            assert not (layer / "bitmap").exists()
        finally:
            host.start_daemon()
            host.clip("mount", host.indexes / "a.clip", target)
        assert all_right(target)
        wait_for("the bits are on disk", lambda: listed(host, layer)["cached_bytes"] > 8_000_000)
        assert verify(host, layer) == (0, {"wrong_spans": 0, "mended": False})


def test_an_empty_cache() -> None:
    with Host() as host:
        assert json.loads(host.clip("cache", "ls", "--json").stdout)["layers"] == []
        assert "0 layers checked" in host.clip("cache", "verify").stdout
        assert not (host.state_dir / "cache").exists()
