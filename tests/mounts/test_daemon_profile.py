"""A start profile, from the first container's reads into the index, and from there to a host that knows nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.index import codec
from tests.support import images
from tests.support.daemonclient import Client
from tests.support.host import Host, stop, wait_for
from tests.support.registry import Registry


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as registry:
        images.push(images.image("shared-a"), registry.host)
        yield registry


def read(tree: Path, *names: str) -> list[bytes]:
    return [(tree / name).read_bytes() for name in names]


def test_recorded_put_into_the_index_and_fetched_ahead(registry: Registry, tmp_path: Path) -> None:
    carried = tmp_path / "carried.clip"
    with Host() as host:
        host.trust_registry(registry.host)
        index = host.index(f"{registry.host}/shared-a:latest", "a")
        daemon = host.start_daemon()
        nothing = host.clip("profile", index, check=False)
        assert nothing.returncode == 2
        assert "nothing is known" in nothing.stderr
        with Client(host) as client:
            tree = Path(client.acquire(index)["tree"])
            expected = read(tree, "common/03", "common/00")
            done = host.clip("profile", index, "-o", carried)
        assert "start profile of" in done.stdout
        stop(daemon)  # keeps it at once
        (kept,) = (host.state_dir / "trees").glob("*/profile.json")
        assert tuple(map(tuple, json.loads(kept.read_text())["spans"])) == codec.read_index(carried).profile
    before, after = codec.read_index(index := carried), None
    assert before.profile
    with Host() as host:
        host.trust_registry(registry.host)
        index = host.indexes / "carried.clip"
        shutil.copy(carried, index)
        host.start_daemon()
        with Client(host) as client:
            tree = Path(client.acquire(index)["tree"])
            wanted = {(layer, span) for layer, span in before.profile}

            def cached() -> int:
                return sum(layer["readahead"] + layer["demand"] for layer in host.status()["layers"])

            wait_for("what the profile names is here", lambda: cached() >= len(wanted))
            assert sum(layer["misses"] for layer in host.status()["layers"]) <= 1  # the look at the mounted tree
            assert read(tree, "common/03", "common/00") == expected
            after = host.status()["layers"]
        assert sum(layer["misses"] for layer in after) <= 1


def test_switched_off(registry: Registry) -> None:
    with Host(settings={"CLIP_SHIM_FETCH_PROFILE": "false"}) as host:
        host.trust_registry(registry.host)
        index = host.index(f"{registry.host}/shared-a:latest", "a")
        daemon = host.start_daemon()
        with Client(host) as client:
            read(Path(client.acquire(index)["tree"]), "common/03")
            assert host.clip("profile", index, check=False).returncode == 2
        stop(daemon)
        assert not list((host.state_dir / "trees").glob("*/profile.json"))
