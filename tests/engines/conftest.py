"""Hosts, indexes and thin images for the engine tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.host import Host

KINDS = ("plain", "shared")  # this mount namespace, and one with `/` rshared


@pytest.fixture(scope="module", params=KINDS)
def host(request: pytest.FixtureRequest, registry_address: str) -> Iterator[Host]:
    """A host with a running daemon, one of each kind."""
    with Host(request.param) as made:
        made.trust_registry(registry_address)
        made.start_daemon()
        yield made


@pytest.fixture(scope="module")
def indexed(host: Host, pushed: Callable[[str], str]) -> Callable[[str], Path]:
    """Name of a test image → its index file, where annotations may point to."""
    done: dict[str, Path] = {}

    def index(name: str) -> Path:
        if name not in done:
            done[name] = host.index(pushed(name), name)
        return done[name]

    return index


@pytest.fixture(scope="module")
def thin(host: Host, pushed: Callable[[str], str], registry_address: str) -> Callable[[str], str]:
    """Name of a test image → reference of its thin image in the local registry."""
    done: dict[str, str] = {}

    def push(name: str) -> str:
        if name not in done:
            done[name] = f"{registry_address}/{host.kind}/{name}-thin:latest"
            host.clip("convert", pushed(name), done[name], timeout=300)
        return done[name]

    return push
