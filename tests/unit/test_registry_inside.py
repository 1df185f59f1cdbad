"""Names that lead to this machine: the daemon's clients go there only if they are told to."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shim import settings
from shim.daemon.trust import registry_client
from shim.errors import RegistryError
from shim.registry.client import RegistryClient
from shim.registry.ref import ImageRef
from tests.support.faultserver import FaultServer
from tests.support.registry import sha256

DATA = random.Random(12).randbytes(10_000)
DIGEST = sha256(DATA)
PATH = f"/v2/team/app/blobs/{DIGEST}"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        running.serve(PATH, DATA)
        yield running


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DNS in which every name below .test is this machine."""
    real = socket.getaddrinfo

    def look_up(host: Any, *rest: Any, **more: Any) -> Any:
        return real("127.0.0.1" if str(host).endswith(".test") else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def client_for(tmp_path: Path, trusted: str, registries: dict[str, Any]) -> RegistryClient:
    env = {"CLIP_SHIM_TRUST_REGISTRIES": trusted, "CLIP_SHIM_CONFIG": str(tmp_path / "config.yaml")}
    (tmp_path / "config.yaml").write_text("{}")
    loaded = settings.load(env=env)
    return registry_client(settings.Settings({**loaded.values, "registries": registries}, loaded.source))


def read(client: RegistryClient, registry: str) -> bytes:
    with client.open_blob(ImageRef.parse(f"{registry}/team/app:v1"), DIGEST, 10, 20) as stream:
        return b"".join(stream)


def named(server: FaultServer, name: str) -> str:
    return server.host.replace("127.0.0.1", name)


def test_a_name_that_leads_here_is_refused(server: FaultServer, tmp_path: Path) -> None:
    where = named(server, "evil.test")
    client = client_for(tmp_path, "*", {where: {"plain_http": True}})
    with pytest.raises(RegistryError, match=r"leads to 127\.0\.0\.1.*refused") as caught:
        read(client, where)
    assert not caught.value.retryable
    assert "trust.registries" in str(caught.value.hint)
    assert server.count() == 0


@pytest.mark.parametrize("trusted", ["*,{}", "{}", "*,good.test", "good.test/team"])
def test_unless_it_is_named(server: FaultServer, tmp_path: Path, trusted: str) -> None:
    where = named(server, "good.test")
    client = client_for(tmp_path, trusted.format(where), {where: {"plain_http": True}})
    assert read(client, where) == DATA[10:20]


def test_or_the_configuration_says_where_it_is(server: FaultServer, tmp_path: Path) -> None:
    """Mirrors, and a registry's `host`: a cache on the node is usual."""
    mirror = {"host": f"http://{named(server, 'mirror.test')}"}
    client = client_for(tmp_path, "*", {"registry.example.com": {"mirrors": [mirror]}})
    assert read(client, "registry.example.com") == DATA[10:20]
    client = client_for(tmp_path, "*", {"registry.example.com": {"host": f"http://{named(server, 'here.test')}"}})
    assert read(client, "registry.example.com") == DATA[10:20]


def test_a_redirect_to_such_a_name_is_refused(server: FaultServer, tmp_path: Path) -> None:
    where = named(server, "good.test")
    server.faults.add("GET", PATH, redirect=f"http://{named(server, 'metadata.test')}/secrets", times=1)
    client = client_for(tmp_path, f"*,{where}", {where: {"plain_http": True}})
    with pytest.raises(RegistryError, match=r"metadata\.test.*leads to 127\.0\.0\.1"):
        read(client, where)
    assert server.count("GET", "/secrets") == 0


def test_a_token_service_of_such_a_name_is_refused(server: FaultServer, tmp_path: Path) -> None:
    where = named(server, "good.test")
    challenge = f'Bearer realm="http://{named(server, "metadata.test")}/token",service="x"'
    server.faults.add("GET", PATH, status=401, headers={"WWW-Authenticate": challenge})
    client = client_for(tmp_path, f"*,{where}", {where: {"plain_http": True}})
    with pytest.raises(RegistryError, match=r"metadata\.test.*leads to 127\.0\.0\.1"):
        read(client, where)
    assert server.count("GET", "/token") == 0


def test_a_person_may_type_any_name(server: FaultServer) -> None:
    where = named(server, "good.test")
    client = RegistryClient({where: {"plain_http": True}}, certs_dirs=())
    assert read(client, where) == DATA[10:20]
