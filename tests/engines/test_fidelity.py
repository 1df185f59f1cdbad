"""The lazy tree equals what umoci and Docker unpack from the same layers, in all that POSIX can see.

Both ways of showing a tree are compared: EROFS in the kernel, and the portable FUSE tree.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import expected, images, recipes
from tests.support.compare import compare, report
from tests.support.engines import Docker
from tests.support.host import Host

PACKED_OTHERWISE = tuple(name for name in recipes.SMALL_VARIANTS if name != "small")


@pytest.fixture(scope="module", params=["auto", "fuse"])
def tree_host(request: pytest.FixtureRequest, registry_address: str) -> Iterator[Host]:
    with Host(settings={"CLIP_SHIM_TREE": request.param}) as host:
        host.trust_registry(registry_address)
        host.start_daemon()
        yield host


@contextmanager
def mounted(host: Host, index: Path) -> Iterator[Path]:
    """The tree of an index on a directory."""
    where = host.base / f"mnt-{index.stem}"
    where.mkdir()
    host.clip("mount", index, where)
    try:
        yield where
    finally:
        host.clip("umount", where)
        where.rmdir()


def check(image: images.Image, root: Path) -> None:
    found = compare(expected.tree(image), root, unset=expected.unset(image))
    if image.name == "small-estargz":  # files that its writer adds to each layer
        found = [d for d in found if (d.path, d.what) not in {(p, "unexpected") for p in expected.ESTARGZ_EXTRAS}]
    assert not found, report(found)


@pytest.mark.parametrize("name", ["small", "odd", "shared-a", "debian"])
def test_equal_to_umoci(tree_host: Host, pushed: Callable[[str], str], name: str) -> None:
    with mounted(tree_host, tree_host.index(pushed(name), name)) as root:
        check(images.image(name), root)


@pytest.mark.parametrize("name", PACKED_OTHERWISE)
def test_every_compression_gives_the_same_tree(tree_host: Host, pushed: Callable[[str], str], name: str) -> None:
    with mounted(tree_host, tree_host.index(pushed(name), name)) as root:
        check(images.image(name), root)


def test_platform_is_chosen(tree_host: Host, pushed: Callable[[str], str]) -> None:
    """The tag `multi` is an index of two platforms: the host's by default, another by --platform."""
    reference = pushed("small").replace(":latest", ":multi")
    with mounted(tree_host, tree_host.index(reference, "multi-own")) as root:
        check(images.image("small"), root)
    other = "linux/arm64" if images.host_architecture() != "arm64" else "linux/amd64"
    with mounted(tree_host, tree_host.index(reference, "multi-other", "--platform", other)) as root:
        assert [path.name for path in root.iterdir()] == ["other-platform"]
    failed = tree_host.clip(
        "index", reference, "-o", tree_host.base / "none.clip", "--platform=linux/s390x", check=False
    )
    assert failed.returncode == 1
    assert "s390x" in failed.stderr
    assert not (tree_host.base / "none.clip").exists()


def test_equal_to_docker(pushed: Callable[[str], str], registry_address: str) -> None:
    """The second opinion: what dockerd made of the same image, its own overlay mounted read-only."""
    image = images.image("small")
    with Host() as host:
        host.trust_registry(registry_address)
        host.start_daemon()
        index = host.index(pushed("small"), "small")
        with Docker(host, clip=False) as docker, mounted(host, index) as root:
            extracted = host.base / "extracted"
            docker.extracted(docker.pull(pushed("small")), extracted)
            found = compare(extracted, root, unset=expected.unset(image))
            subprocess.run(["umount", extracted], check=True)
        assert not found, report(found)
