"""The daemon is killed between any two steps of cleaning: containers read on, nothing in use is lost, the next run ends
what was begun."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import images, killing
from tests.support.daemonclient import Client, acquire, server_pid
from tests.support.host import Host, wait_for
from tests.support.lazytree import FILES, drop_page_cache, right, sha256
from tests.support.registry import Registry

POINTS = {
    "a directory is renamed": "shim.cache.discard set_aside after 1",
    "the next one is renamed": "shim.cache.discard set_aside after 2",
    "it is deleted": "shim.cache.discard delete after 1",
    "their bits are gone": "shim.cache.layer punch before 1",
    "their bytes are gone": "shim.cache.layer punch after 1",
}


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as registry:
        for name in ("small", "shared-a"):
            images.push(images.image(name), registry.host)
        yield registry


def clean(host: Host) -> None:
    host.clip("cache", "clean", "--max-bytes", "0", check=False)


def test_killed_between_any_two_steps(registry: Registry) -> None:
    """One server after the other dies at the next point; the mount is never renewed."""
    with Host(settings={"CLIP_SHIM_TREE_LINGER": "0s"}) as host:
        host.trust_registry(registry.host)
        plan, site = host.base / "plan", host.base / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(killing.SITE)
        plan.write_text("\n".join(POINTS.values()) + "\n")
        host.env |= {"PYTHONPATH": str(site), "CLIP_SHIM_TEST_PLAN": str(plan)}
        host.start_daemon()
        small, index = (host.index(f"{registry.host}/{name}:latest", name) for name in ("small", "shared-a"))
        target = host.base / "tree"
        target.mkdir()
        host.clip("mount", index, target)
        for point in POINTS:
            with Client(host) as client:
                answer = client.acquire(small)
                assert (Path(answer["tree"]) / "bin").is_dir(), point
            for name in FILES[:4]:
                assert sha256(target / name) == right(name), point
            wait_for("the other image is idle", lambda: len(host.status()["images"]) == 1)
            victim = server_pid(host)
            clean(host)
            wait_for(f"killed when {point}", lambda victim=victim: server_pid_or_none(host) not in (None, victim))
            drop_page_cache()
            for name in FILES[:4]:
                assert sha256(target / name) == right(name), point
        assert plan.read_text() == ""
        wait_for("the other image is idle", lambda: len(host.status()["images"]) == 1)
        clean(host)
        trees = [path.name for path in (host.state_dir / "trees").iterdir()]
        assert trees == [host.status()["images"][0]["index"].removeprefix("sha256:")]
        assert {path.name for path in (host.state_dir / "cache").iterdir() if path.is_dir()} == {
            layer["blob"] for layer in host.status()["layers"]
        }
        assert acquire(host, small)["ok"]
        for name in FILES:
            assert sha256(target / name) == right(name)
        host.clip("umount", target)


def server_pid_or_none(host: Host) -> int | None:
    try:
        return server_pid(host)
    except (OSError, AssertionError):
        return None  # the next one is not there yet
