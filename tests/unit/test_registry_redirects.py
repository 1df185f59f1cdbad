"""Redirects: where they may lead, what goes along, and what is remembered of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.errors import NotFoundError, RegistryError
from shim.registry.client import RegistryClient
from shim.registry.ref import ImageRef
from shim.registry.transport import origin_of
from tests.support.faultserver import FaultServer
from tests.support.registry import World, make_certificates, make_client, sha256

DATA = random.Random(11).randbytes(1 << 20)
DIGEST = sha256(DATA)
PATH = f"/v2/team/app/blobs/{DIGEST}"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        running.serve(PATH, DATA)
        yield running


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def client(tmp_path: Path, world: World) -> RegistryClient:
    return make_client(tmp_path, hooks=world, read_timeout=2.0)


@pytest.fixture
def ref(server: FaultServer) -> ImageRef:
    return ImageRef.parse(f"{server.host}/team/app:v1")


def read(client: RegistryClient, ref: ImageRef, start: int = 0, end: int | None = None, **options: float) -> bytes:
    with client.open_blob(ref, DIGEST, start, end, **options) as stream:
        return b"".join(stream)


def test_redirect_to_another_host_takes_no_secret_along(
    server: FaultServer, tmp_path: Path, world: World, ref: ImageRef
) -> None:
    with FaultServer(address="127.0.0.2") as storage:
        url = storage.serve("/bucket/blob", DATA) + "?sig=1"
        server.faults.add(
            "GET", "blobs", status=401, headers={"WWW-Authenticate": 'Basic realm="x"'}, need=("Authorization", r"\A\Z")
        )
        server.faults.add("GET", "blobs", redirect=url)
        (tmp_path / ".docker").mkdir()
        config = json.dumps({"auths": {server.host: {"username": "u", "password": "pw"}}})
        (tmp_path / ".docker/config.json").write_text(config)
        client = make_client(tmp_path, {server.host: {"headers": {"X-Key": "k"}}}, hooks=world)
        assert read(client, ref, 10, 20) == DATA[10:20]
        assert server.requests()[-1].headers["authorization"].startswith("Basic ")
        assert server.requests()[-1].headers["x-key"] == "k"
        seen = storage.requests()[0]
        assert seen.path == "/bucket/blob?sig=1"
        assert seen.headers["range"] == "bytes=10-19"
        assert set(seen.headers) <= {"host", "range", "user-agent", "accept-encoding", "accept"}
        # the place is remembered: the next ranges go there at once
        before = server.count()
        for start in range(0, 1000, 100):
            assert read(client, ref, start, start + 100) == DATA[start : start + 100]
        assert (server.count(), storage.count()) == (before, 11)


def test_redirect_to_another_port_and_back_takes_no_secret_along(
    server: FaultServer, tmp_path: Path, ref: ImageRef
) -> None:
    with FaultServer() as other:  # same address, another port
        server.serve("/back", DATA)
        server.faults.add("GET", "blobs", redirect=f"{other.url}/away")
        other.faults.add("GET", "/away", redirect=f"{server.url}/back")
        client = make_client(tmp_path, {server.host: {"headers": {"X-Key": "k"}}})
        assert read(client, ref, 0, 9) == DATA[:9]
        assert "x-key" in server.requests("GET", "blobs")[0].headers
        assert "x-key" not in other.requests()[0].headers
        assert "x-key" not in server.requests("GET", "/back")[0].headers


def test_redirect_on_the_same_host_keeps_headers(server: FaultServer, tmp_path: Path, ref: ImageRef) -> None:
    server.serve("/elsewhere", DATA)
    server.faults.add("GET", "blobs", redirect="/elsewhere")
    client = make_client(tmp_path, {server.host: {"headers": {"X-Key": "k"}}})
    assert read(client, ref, 0, 9) == DATA[:9]
    assert server.requests("GET", "/elsewhere")[0].headers["x-key"] == "k"


@pytest.mark.parametrize("status", [400, 403, 404, 410])
def test_an_expired_place_is_asked_for_again(
    server: FaultServer, client: RegistryClient, ref: ImageRef, status: int
) -> None:
    with FaultServer() as storage:
        storage.serve("/new", DATA)
        storage.serve("/old", DATA)
        server.faults.add("GET", "blobs", redirect=f"{storage.url}/old?sig=1", times=1)
        server.faults.add("GET", "blobs", redirect=f"{storage.url}/new?sig=2")
        assert read(client, ref, 0, 5) == DATA[:5]
        storage.faults.add("GET", "/old", status=status)
        assert read(client, ref, 5, 10) == DATA[5:10]
        assert server.count() == 2
        assert [seen.path for seen in storage.requests()] == ["/old?sig=1", "/old?sig=1", "/new?sig=2"]


def test_a_place_that_has_expired_on_arrival(server: FaultServer, client: RegistryClient, ref: ImageRef) -> None:
    with FaultServer() as storage:
        storage.serve("/x", DATA)
        server.faults.add("GET", "blobs", redirect=f"{storage.url}/x")
        storage.faults.add("GET", "/x", status=403, times=2)
        assert read(client, ref, 0, 5) == DATA[:5]
        assert (server.count(), storage.count()) == (3, 3)
        storage.faults.add("GET", "/x", status=403)
        with pytest.raises(RegistryError, match=f"{storage.host}, where {server.host} redirects to, answered 403"):
            read(client, ref, 1_000, 1_001)
        assert server.count() < 12


def test_a_place_that_is_gone_in_the_middle(server: FaultServer, client: RegistryClient, ref: ImageRef) -> None:
    with FaultServer() as storage, FaultServer() as other:
        storage.serve("/x", DATA)
        other.serve("/x", DATA)
        server.faults.add("GET", "blobs", redirect=f"{storage.url}/x", times=1)
        server.faults.add("GET", "blobs", redirect=f"{other.url}/x")
        storage.faults.add("GET", "/x", truncate_at=300_000, times=1)
        storage.faults.add("GET", "/x", status=403)
        assert read(client, ref) == DATA
        counts = client.counters.snapshot()
        assert counts[(storage.host, "blob")].bytes == 300_000
        assert counts[(other.host, "blob")].bytes == len(DATA) - 300_000


@pytest.mark.parametrize(
    "location",
    [
        "http://[",
        "ftp://x/y",
        "//user:pw@127.0.0.1/x",
        "http://127.0.0.1:99999/",
        "https://" + "x" * 20000,
    ],
)
def test_redirects_that_make_no_sense(
    server: FaultServer, client: RegistryClient, ref: ImageRef, location: str
) -> None:
    server.faults.add("GET", "blobs", redirect=location)
    with pytest.raises(RegistryError):
        read(client, ref)
    assert server.count() == 1


def test_redirects_without_end(server: FaultServer, client: RegistryClient, ref: ImageRef) -> None:
    server.faults.add("GET", "", redirect=lambda path: path + "x")
    with pytest.raises(RegistryError, match="redirects more than 8 times"):
        read(client, ref)
    assert server.count() == 8


def test_no_redirect_from_https_to_http(tmp_path: Path) -> None:
    make_certificates(tmp_path / "pki")
    with FaultServer(tls=tmp_path / "pki") as server, FaultServer() as plain:
        server.faults.add("GET", "blobs", redirect=plain.serve("/x", DATA))
        client = make_client(tmp_path, {server.host: {"ca": str(tmp_path / "pki" / "ca.crt")}})
        ref = ImageRef.parse(f"{server.host}/team/app:v1")
        with pytest.raises(RegistryError, match="from https to plain http"):
            read(client, ref)
        assert plain.count() == 0
        server.faults.clear()
        server.serve(PATH, DATA)
        assert read(client, ref) == DATA


def test_no_redirect_from_elsewhere_into_this_machine() -> None:
    from shim.registry.endpoint import Endpoint
    from shim.registry.hosts import Hosts
    from shim.registry.transport import Transport

    endpoint = Endpoint(Hosts().of("registry.example.com")[0], Transport(), None)  # type: ignore[arg-type]
    for target in (
        "https://127.0.0.1/x",
        "https://localhost:6443/x",
        "https://169.254.169.254/latest",
        "https://[::1]/",
    ):
        with pytest.raises(RegistryError, match="an address of this machine"):
            endpoint.target("https://registry.example.com/v2/", target)
    assert (
        endpoint.target("https://registry.example.com/v2/", "https://cdn.example.com/x") == "https://cdn.example.com/x"
    )


@pytest.mark.parametrize(
    "host", ["127.0.0.1\\\\.example.com", "127.0.0.1\\\\@example.com", "a b", "[::1]x", "b\u00fccher.example", "%31"]
)
def test_hosts_that_others_read_differently(host: str) -> None:
    """What is judged must be what is gone to."""
    with pytest.raises(RegistryError, match="led to a URL"):
        origin_of(f"http://{host}/x")


def test_head_may_redirect(server: FaultServer, client: RegistryClient, ref: ImageRef) -> None:
    server.faults.add("HEAD", "blobs", redirect="https://cdn.example.com/signed-for-get-only")
    client.check_access(ref, DIGEST)
    server.faults.clear()
    server.faults.add("HEAD", "blobs", status=404)
    with pytest.raises(NotFoundError):
        client.check_access(ref, DIGEST)
