"""Pushing blobs and manifests to real registries, open and guarded, and through interruptions."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from shim.errors import AuthError, IntegrityError, NotFoundError, RegistryError
from shim.registry import endpoint, transport
from shim.registry.client import RegistryClient
from shim.registry.manifest import OCI_MANIFEST
from shim.registry.push import Pusher
from shim.registry.ref import ImageRef
from tests.support.faultserver import FaultServer
from tests.support.registry import PASSWORD, USER, Registry, TokenServer, World, make_client, sha256
from tests.unit.test_registry_auth import BASIC, write_docker_config

PIECE = 1 << 20
BIG = random.Random(7).randbytes(5 * PIECE + 12345)
SMALL = b"a small blob"


@pytest.fixture(scope="module")
def open_registry() -> Iterator[Registry]:
    with Registry() as registry:
        yield registry


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenServer]:
    server = TokenServer(tmp_path_factory.mktemp("tokens"))
    yield server
    server.close()


@pytest.fixture(params=["open", "basic", "token"])
def registry(request: pytest.FixtureRequest, open_registry: Registry, tokens: TokenServer) -> Iterator[Registry]:
    if request.param == "open":
        yield open_registry
        return
    with Registry(htpasswd=True) if request.param == "basic" else Registry(tokens=tokens) as made:
        yield made


def client_of(registry: Registry | str, home: Path) -> RegistryClient:
    host = registry if isinstance(registry, str) else registry.host
    write_docker_config(home, {"auths": {host: {"auth": BASIC}}})
    return make_client(home)


def ref_of(registry: Registry | str, repository: str = "team/app", tag: str = "v1") -> ImageRef:
    host = registry if isinstance(registry, str) else registry.host
    return ImageRef(host, repository, tag)


def manifest_of(config: str, size: int, *layers: tuple[str, int]) -> bytes:
    kind = "application/vnd.oci.image."
    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {"mediaType": f"{kind}config.v1+json", "digest": config, "size": size},
            "layers": [{"mediaType": f"{kind}layer.v1.tar", "digest": d, "size": s} for d, s in layers],
        }
    ).encode()


def test_an_image_can_be_pulled_as_it_was_pushed(registry: Registry, tmp_path: Path) -> None:
    client = client_of(registry, tmp_path)
    pusher, ref = Pusher(client, chunk=PIECE), ref_of(registry)
    big = tmp_path / "big"
    big.write_bytes(BIG)
    config = pusher.push_blob(ref, b'{"os":"linux","architecture":"amd64","rootfs":{}}')
    seen: list[int] = []
    layer = pusher.push_blob(ref, big, "application/vnd.oci.image.layer.v1.tar", progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == len(BIG) == layer.size
    raw = manifest_of(config.digest, config.size, (layer.digest, layer.size))
    put = pusher.put_manifest(ref, raw, OCI_MANIFEST)
    assert put.digest == sha256(raw)
    found = client.resolve(ref, "linux/amd64")
    assert found.digest == put.digest
    assert b"".join(client.open_blob(ref, layer.digest)) == BIG
    by_digest = pusher.put_manifest(ImageRef(ref.registry, ref.repository), raw + b" ", OCI_MANIFEST)
    assert client.manifest(ref.with_digest(by_digest.digest)).raw == raw + b" "


def test_what_is_there_is_not_sent_again_and_is_mounted_from_beside(open_registry: Registry, tmp_path: Path) -> None:
    with FaultServer(upstream=open_registry.host) as server:
        client = client_of(server.host, tmp_path)
        pusher, ref = Pusher(client, chunk=PIECE), ref_of(server.host, "here/a")
        assert not pusher.has_blob(ref, sha256(SMALL))
        pusher.push_blob(ref, SMALL)
        assert pusher.has_blob(ref, sha256(SMALL))
        writes = server.count("PUT", "/blobs/") + server.count("POST", "/blobs/")
        pusher.push_blob(ref, SMALL)
        assert server.count("PUT", "/blobs/") + server.count("POST", "/blobs/") == writes
        other = ref_of(server.host, "here/b")
        pusher.push_blob(other, SMALL, mount_from="here/a")
        assert server.count("PUT", "/blobs/") == 1
        assert pusher.has_blob(other, sha256(SMALL))
        pusher.push_blob(other, b"in neither", mount_from="here/a")
        assert pusher.has_blob(other, sha256(b"in neither"))


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECE + 1, 3 * PIECE])
def test_sizes_about_the_bounds(open_registry: Registry, tmp_path: Path, size: int) -> None:
    client = client_of(open_registry, tmp_path)
    ref = ref_of(open_registry, "sizes")
    data = hashlib.sha256(str(size).encode()).digest() * (size // 32 + 1)
    found = Pusher(client, chunk=PIECE).push_blob(ref, data[:size])
    assert client.blob(ref, found, 4 * PIECE) == data[:size]


@pytest.mark.parametrize(
    "fault",
    [
        {"method": "PATCH", "drop": True, "times": 2},
        {"method": "PATCH", "status": 503, "times": 2},
        {"method": "PATCH", "status": 416, "times": 1},
        {"method": "PATCH", "truncate_at": 0, "reset_at": 0, "times": 1},
        {"method": "PUT", "status": 500, "times": 2},
        {"method": "POST", "drop": True, "times": 2},
        {"method": "HEAD", "status": 502, "times": 2},
        {"method": "GET", "status": 404, "times": 0},
    ],
    ids=str,
)
def test_interrupted_uploads_go_on(open_registry: Registry, tmp_path: Path, fault: dict[str, object]) -> None:
    data = BIG + repr(fault).encode()
    with FaultServer(upstream=open_registry.host) as server:
        more = {key: value for key, value in fault.items() if key != "method"}
        server.faults.add(str(fault["method"]), r"/blobs/", **more)
        client = client_of(server.host, tmp_path)
        ref = ref_of(server.host, "faulty")
        found = Pusher(client, chunk=PIECE).push_blob(ref, data)
        sent = sum(len(seen.body) for seen in server.seen if seen.method == "PATCH")
        assert sent <= len(data) + 3 * PIECE
    assert b"".join(client_of(open_registry, tmp_path).open_blob(ref_of(open_registry, "faulty"), found.digest)) == data


def test_a_lost_session_begins_again(open_registry: Registry, tmp_path: Path) -> None:
    data = BIG + b"lost"
    with FaultServer(upstream=open_registry.host) as server:
        server.faults.add("PATCH", r"/blobs/", status=500, times=1)
        server.faults.add("GET", r"/uploads/", status=404, times=1)
        client = client_of(server.host, tmp_path)
        Pusher(client, chunk=PIECE).push_blob(ref_of(server.host, "lost"), data)
        assert server.count("POST", "/uploads/") == 2


def test_an_end_without_an_end_is_told(open_registry: Registry, tmp_path: Path) -> None:
    with FaultServer(upstream=open_registry.host) as server:
        server.faults.add("PATCH", r"/blobs/", status=503)
        client = make_client(tmp_path, hooks=World())
        with pytest.raises(RegistryError, match="503"):
            Pusher(client, chunk=PIECE).push_blob(ref_of(server.host, "never"), BIG + b"never")
        server.faults.add("POST", r"/blobs/", status=404)
        with pytest.raises(NotFoundError):
            Pusher(client).push_blob(ref_of(server.host, "never"), b"x")


def test_who_asks_to_wait_long_is_not_asked_again(open_registry: Registry, tmp_path: Path) -> None:
    with FaultServer(upstream=open_registry.host) as server:
        server.faults.add("PATCH", r"/blobs/", status=429, retry_after="3600")
        client = client_of(server.host, tmp_path)
        with pytest.raises(RegistryError, match="asks to wait 3600 s"):
            Pusher(client, chunk=PIECE).push_blob(ref_of(server.host, "busy"), BIG + b"busy")
        assert server.count("PATCH") == 1


@pytest.mark.parametrize("status", [202, 400])
def test_an_answer_that_drips_holds_nobody(
    open_registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """A push has no deadline of its own: its blobs may take hours."""
    monkeypatch.setattr(endpoint, "ERROR_SECONDS", 0.5)
    monkeypatch.setattr(transport, "DRAIN_SECONDS", 0.5)
    with FaultServer(upstream=open_registry.host) as server:
        for method in ("POST", "PUT"):
            server.faults.add(method, r"/uploads/", status=status, body=bytes(1000), drip=(1, 0.1))
        started = time.monotonic()
        with pytest.raises(RegistryError, match="400" if status == 400 else "where an upload goes on"):
            Pusher(client_of(server.host, tmp_path)).push_blob(ref_of(server.host, "slow"), b"slow")
        assert time.monotonic() - started < 20


@pytest.mark.parametrize("where", ["http://[bad", "ftp://example.com/x", "http://u:p@example.com/x"])
def test_an_upload_that_leads_nowhere(open_registry: Registry, tmp_path: Path, where: str) -> None:
    with FaultServer(upstream=open_registry.host) as server:
        server.faults.add("POST", r"/uploads/", status=202, headers={"Location": where})
        client = client_of(server.host, tmp_path)
        with pytest.raises(RegistryError, match="URL"):
            Pusher(client).push_blob(ref_of(server.host, "odd"), b"odd")


def test_an_upload_leads_where_redirects_may() -> None:
    """Answers' Location: into this machine never, to plain http only where TLS ends before the registry."""
    from shim.registry.endpoint import Endpoint
    from shim.registry.hosts import Hosts
    from shim.registry.push import _location
    from shim.registry.transport import Transport

    registry = Endpoint(Hosts().of("registry.example.com")[0], Transport(), None)  # type: ignore[arg-type]

    def lead(where: str) -> str:
        answer = SimpleNamespace(
            headers={"Location": where}, url="https://registry.example.com/v2/a", host="registry.example.com"
        )
        return _location(registry, answer)  # type: ignore[arg-type]

    for where in ("https://169.254.169.254/x", "https://localhost:6443/x", "http://other.example.com/x"):
        with pytest.raises(RegistryError, match="refused"):
            lead(where)
    assert lead("http://registry.example.com/v2/a/uploads/1") == "https://registry.example.com/v2/a/uploads/1"
    assert lead("https://storage.example.com/1") == "https://storage.example.com/1"


def test_who_may_not_write_is_told_so(tokens: TokenServer, tmp_path: Path) -> None:
    with Registry(htpasswd=True) as locked, Registry(tokens=tokens) as guarded:
        for registry in (locked, guarded):
            with pytest.raises(AuthError, match=r"needs credentials|no anonymous token"):
                Pusher(make_client(tmp_path / "nobody")).push_blob(ref_of(registry), SMALL)
        write_docker_config(tmp_path, {"auths": {locked.host: {"username": USER, "password": "wrong" + PASSWORD}}})
        with pytest.raises(AuthError, match="may not write") as caught:
            Pusher(make_client(tmp_path)).push_blob(ref_of(locked), SMALL)
        assert PASSWORD not in str(caught.value)


def test_a_file_that_shrinks_is_noticed(
    open_registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "shrinks"
    file.write_bytes(BIG)
    measured = sha256(BIG), len(BIG)
    monkeypatch.setattr("shim.registry.push._measure", lambda _: measured)
    file.write_bytes(BIG[: 2 * PIECE])
    client = client_of(open_registry, tmp_path)
    with pytest.raises(IntegrityError, match="cut short"):
        Pusher(client, chunk=PIECE).push_blob(ref_of(open_registry, "shrinks"), file)
