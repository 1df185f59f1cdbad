"""What all tiers share: directories on a disk, the local registry, the test images, hosts, and the look at what is
left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import leaks

os.environ.setdefault(leaks.MARK, f"{os.getpid()}")
if "PYTEST_XDIST_WORKER" in os.environ:  # each worker looks after its own
    os.environ[leaks.MARK] += f".{os.environ['PYTEST_XDIST_WORKER']}"
    if os.geteuid() == 0:
        leaks.own_mounts()


@pytest.fixture(scope="session", autouse=True)
def nothing_left() -> Iterator[None]:
    """At the end of the session nothing that bears the tests' marks is mounted or running that was not before."""
    before = leaks.snapshot()
    yield
    left = leaks.leaked(before, ours=True)
    assert not left, "left behind: " + "; ".join(left)


@pytest.fixture
def disk_path() -> Iterator[Path]:
    """A directory on a disk (pytest's own may be on tmpfs), removed at the end."""
    from tests.support.host import disk_directory

    path = disk_directory()
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def registry_address() -> Iterator[str]:
    """Host and port of a real registry that lives as long as the session."""
    from tests.support.registry import Registry

    with Registry() as registry:
        yield registry.host


@pytest.fixture(scope="session")
def pushed(registry_address: str) -> Callable[[str], str]:
    """Name of a test image → its reference in the local registry; built and pushed once."""
    from tests.support import images

    done: dict[str, str] = {}

    def push(name: str) -> str:
        if name not in done:
            done[name] = images.push(images.image(name), registry_address)
        return done[name]

    return push
