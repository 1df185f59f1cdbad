"""Packages built once, and clean Debian roots to install them in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.debianroot import NEXT, DebianRoot, builder


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the deb and the rpm of this version, and the deb of a next one."""
    directory = tmp_path_factory.mktemp("packages")
    module = builder()
    module.build(directory, ["deb", "rpm"])
    module.build(directory, ["deb"], NEXT)
    return directory


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def root(request: pytest.FixtureRequest) -> Iterator[DebianRoot]:
    root = DebianRoot(request.param)
    try:
        resolver = Path("/etc/resolv.conf")
        (root.path / "etc/resolv.conf").write_bytes(resolver.read_bytes())
        root.start()
        yield root
    finally:
        root.close()
