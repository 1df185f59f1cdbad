"""Daemon and engine in different mount namespaces: an error that says so, never a container over an empty directory."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.index import codec
from tests.support import bundle, images
from tests.support.daemonclient import trees
from tests.support.host import CLIP_SHIM, Host, wait_for
from tests.support.registry import Registry


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Registry() as registry, Host(settings={"CLIP_SHIM_TREE_LINGER": "0s"}) as made:
        images.push(images.image("shared-a"), registry.host)
        made.trust_registry(registry.host)
        index = codec.decode(made.index(f"{registry.host}/shared-a:latest", "a").read_bytes())
        # neither /proc, /dev and /sys nor links: nothing in the tree by which an empty directory could be told from it
        children = index.tree.root.children or {}
        for name in [n for n, node in children.items() if n in (b"proc", b"dev", b"sys") or stat.S_ISLNK(node.mode)]:
            del children[name]
        index.tree.count_links()
        codec.write_index(made.indexes / "bare.clip", index)
        made.start_daemon()
        yield made


@pytest.fixture(autouse=True)
def unmounted(host: Host) -> None:
    """A new namespace begins with a copy of all mounts: that must not be one of the tree."""
    wait_for("no tree is mounted", lambda: not trees(host))


ELSEWHERE = ("unshare", "-m", "--propagation", "private")


@pytest.mark.parametrize("name", ["a", "bare"])
def test_a_container_from_another_namespace(host: Host, tmp_path: Path, name: str) -> None:
    made = bundle.make(tmp_path / f"ns-{name}", ["/busybox", "true"], index=host.indexes / f"{name}.clip")
    before = (made / "config.json").read_bytes()
    log = tmp_path / "log.json"
    words = [host.runtime, "--log", log, "--log-format", "json", "run", "--bundle", made, made.name]
    failed = host.run(*ELSEWHERE, *words, check=False)
    assert failed.returncode == 1
    entry = json.loads(log.read_text().splitlines()[-1])
    assert "not to be seen here" in entry["msg"]
    assert "another mount namespace" in entry["msg"]
    assert "Traceback" not in failed.stderr
    assert (made / "config.json").read_bytes() == before


@pytest.mark.parametrize("name", ["a", "bare"])
def test_a_mount_from_another_namespace(host: Host, name: str) -> None:
    target = host.base / f"target-{name}"
    target.mkdir()
    failed = host.run(*ELSEWHERE, CLIP_SHIM, "mount", host.indexes / f"{name}.clip", target, check=False)
    assert failed.returncode == 1
    assert "not to be seen here" in failed.stderr
    assert "hint: " in failed.stderr
    host.clip("mount", host.indexes / f"{name}.clip", target)
    assert (target / "common/00").stat().st_size == 400_000
    host.clip("umount", target)
