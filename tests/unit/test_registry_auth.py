"""Credentials and tokens, against real registries with htpasswd and with a token service; nothing secret is told."""

from __future__ import annotations

import base64
import json
import logging
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.errors import AuthError, RegistryError, ShimError
from shim.registry import helper
from shim.registry.credentials import Credentials, CredentialStore
from shim.registry.ref import ImageRef
from tests.support.faultserver import FaultServer
from tests.support.registry import PASSWORD, USER, Registry, TokenServer, World, gzip_of, make_client, sha256, tar_of

LAYER = gzip_of(tar_of({"x": b"y" * 1000}))
BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


@pytest.fixture(scope="module")
def locked() -> Iterator[Registry]:
    with Registry(htpasswd=True) as registry:
        registry.push_image("team/app", "v1", [LAYER])
        yield registry


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenServer]:
    server = TokenServer(tmp_path_factory.mktemp("tokens"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def guarded(tokens: TokenServer) -> Iterator[Registry]:
    with Registry(tokens=tokens) as registry:
        registry.push_image("team/app", "v1", [LAYER])
        yield registry


@pytest.fixture(autouse=True)
def fresh(tokens: TokenServer) -> None:
    tokens.anonymous, tokens.life, tokens.delay, tokens.issued = False, 300, 0.0, 0
    tokens.requests.clear()
    tokens.refresh_tokens.clear()


def write_docker_config(home: Path, config: object) -> Path:
    path = home / ".docker" / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def told(error: BaseException) -> str:
    """Everything that an error could show to somebody."""
    return "".join(traceback.format_exception(error)) + repr(error) + str(getattr(error, "hint", ""))


def test_basic(locked: Registry, tmp_path: Path) -> None:
    path = write_docker_config(tmp_path, {"auths": {locked.host: {"auth": BASIC}}})
    ref = ImageRef.parse(locked.ref("team/app", "v1"))
    image = make_client(tmp_path).resolve(ref)
    assert image.layers[0].digest == sha256(LAYER)
    write_docker_config(tmp_path, {"auths": {locked.host: {"auth": base64.b64encode(b"alice:wrong-horse").decode()}}})
    client = make_client(tmp_path)
    with pytest.raises(AuthError, match="401") as caught:
        client.resolve(ref)
    assert str(path) in str(caught.value)
    assert caught.value.status == 401
    assert "wrong-horse" not in told(caught.value)
    # the file is read again when it changes: no restart after a `docker login`
    write_docker_config(tmp_path, {"auths": {f"https://{locked.host}/v2/": {"auth": BASIC}}})
    assert client.resolve(ref).digest == image.digest


def test_no_credentials(locked: Registry, tmp_path: Path) -> None:
    ref = ImageRef.parse(locked.ref("team/app", "v1"))
    with pytest.raises(AuthError, match="needs credentials and none were found") as caught:
        make_client(tmp_path).resolve(ref)
    assert "docker login" in (caught.value.hint or "")
    # a file that cannot be used is named, as it is the likely cause
    path = write_docker_config(tmp_path, '{"auths": ')
    world = World()
    with pytest.raises(AuthError) as caught:
        make_client(tmp_path, hooks=world).resolve(ref)
    assert f"{path}: it is not valid JSON" in (caught.value.hint or "")
    assert world.warnings == [f"{path} is not used for credentials: it is not valid JSON"]


def test_netrc_is_not_read(locked: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text(f"machine 127.0.0.1\nlogin {USER}\npassword {PASSWORD}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(AuthError):
        make_client(tmp_path).resolve(ImageRef.parse(locked.ref("team/app", "v1")))


def test_anonymous_token(guarded: Registry, tokens: TokenServer, tmp_path: Path) -> None:
    tokens.anonymous = True
    ref = ImageRef.parse(guarded.ref("team/app", "v1"))
    client = make_client(tmp_path)
    digest = client.resolve(ref).layers[0].digest
    assert b"".join(client.open_blob(ref, digest)) == LAYER
    client.check_access(ref, digest)
    assert tokens.issued == 1, "one token does for all requests to a repository"
    query = tokens.requests[0]["query"]
    assert query["scope"] == ["repository:team/app:pull"]
    assert query["service"] == ["test-registry"]
    assert client.counters.total("token").requests == 1


def test_token_with_user_and_password(guarded: Registry, tokens: TokenServer, tmp_path: Path) -> None:
    write_docker_config(tmp_path, {"auths": {guarded.host: {"username": USER, "password": PASSWORD}}})
    client = make_client(tmp_path)
    assert client.resolve(ImageRef.parse(guarded.ref("team/app", "v1"))).layers
    assert tokens.requests[0]["authorization"] == f"Basic {BASIC}"
    write_docker_config(tmp_path, {"auths": {guarded.host: {"username": USER, "password": "wrong-horse"}}})
    with pytest.raises(AuthError, match=r"refused the credentials of .*config\.json") as caught:
        make_client(tmp_path).resolve(ImageRef.parse(guarded.ref("team/app", "v1")))
    assert "wrong-horse" not in told(caught.value)


def test_identity_token(guarded: Registry, tokens: TokenServer, tmp_path: Path) -> None:
    tokens.refresh_tokens.add("identity-0123456789")
    entry = {"auth": base64.b64encode(b"x:").decode(), "identitytoken": "identity-0123456789"}
    write_docker_config(tmp_path, {"auths": {guarded.host: entry}})
    client = make_client(tmp_path)
    assert client.resolve(ImageRef.parse(guarded.ref("team/app", "v1"))).layers
    assert tokens.requests[0]["method"] == "POST"
    assert tokens.requests[0]["query"]["grant_type"] == ["refresh_token"]
    tokens.refresh_tokens.clear()
    with pytest.raises(AuthError) as caught:
        make_client(tmp_path).resolve(ImageRef.parse(guarded.ref("team/app", "v1")))
    assert "identity-0123456789" not in told(caught.value)


def test_registry_token(guarded: Registry, tokens: TokenServer, tmp_path: Path) -> None:
    ready = tokens.sign(["repository:team/app:pull"])
    write_docker_config(tmp_path, {"auths": {guarded.host: {"registrytoken": ready}}})
    assert make_client(tmp_path).resolve(ImageRef.parse(guarded.ref("team/app", "v1"))).layers
    assert not tokens.requests


def test_a_token_is_renewed_before_it_expires(guarded: Registry, tokens: TokenServer, tmp_path: Path) -> None:
    tokens.anonymous = True
    world = World()
    client = make_client(tmp_path, hooks=world)
    ref = ImageRef.parse(guarded.ref("team/app", "v1"))
    client.check_access(ref, sha256(LAYER))
    errors = client.counters.total("check").errors
    assert errors == 1  # the first 401, which asks for a token
    for extra, issued in ((260.0, 1), (280.0, 2), (500.0, 2), (600.0, 3)):
        world.extra = extra
        client.check_access(ref, sha256(LAYER))
        assert tokens.issued == issued
    assert client.counters.total("check").errors == errors, "no request went out with a token that had expired"


def test_one_thread_fetches_the_token(guarded: Registry, tokens: TokenServer, tmp_path: Path) -> None:
    tokens.anonymous, tokens.delay = True, 0.1
    client = make_client(tmp_path)
    ref = ImageRef.parse(guarded.ref("team/app", "v1"))
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            client.check_access(ref, sha256(LAYER))
        except ShimError as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert tokens.issued == 1


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_refused_in_mid_life_is_renewed_once(
    guarded: Registry, tokens: TokenServer, tmp_path: Path, status: int
) -> None:
    tokens.anonymous = True
    with FaultServer(guarded.host) as server:
        ref = ImageRef.parse(f"{server.host}/team/app:v1")
        client = make_client(tmp_path)
        client.check_access(ref, sha256(LAYER))
        server.faults.add("GET", "/blobs/", status=status, times=1)
        assert b"".join(client.open_blob(ref, sha256(LAYER), 0, 10)) == LAYER[:10]
        assert tokens.issued == 2
        server.faults.add("GET", "/blobs/", status=status)
        with pytest.raises(AuthError, match=str(status)) as caught:
            client.open_blob(ref, sha256(LAYER), 0, 10)
        assert caught.value.status == status
        assert not caught.value.retryable
        assert tokens.issued == 3, "renewed once, then the refusal stands"


def test_token_service_trouble(tmp_path: Path) -> None:
    with FaultServer() as server, FaultServer() as service:
        challenge = f'Bearer realm="{service.url}/token",service="s"'
        server.faults.add("GET", "/v2/", status=401, headers={"WWW-Authenticate": challenge})
        ref = ImageRef.parse(f"{server.host}/team/app:v1")
        for body, why in (
            (b"not json", "did not answer with JSON"),
            (b"[1]", "did not answer with JSON"),
            (b"{}", "without a usable token"),
            (b'{"token": "a\\nb"}', "without a usable token"),
            (b'{"token": ""}', "without a usable token"),
            (json.dumps({"token": "x" * 70000}).encode(), "without a usable token"),
            (b" " * 300000, "more than"),
        ):
            service.faults.clear()
            service.faults.add("GET", "/token", status=200, body=body)
            with pytest.raises(RegistryError, match=why):
                make_client(tmp_path).resolve(ref)
        service.faults.clear()
        service.faults.add("GET", "/token", status=503, times=2)
        service.faults.add("GET", "/token", status=200, body=b'{"access_token": "abc", "expires_in": "nonsense"}')
        before = service.count()
        with pytest.raises(AuthError):  # the registry refuses that token; but it was got in the third attempt
            make_client(tmp_path, hooks=World()).resolve(ref)
        assert service.count() - before >= 3
        assert [s.headers.get("authorization") for s in server.requests()][-1] == "Bearer abc"


def test_where_tokens_may_be_asked_for(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from shim.registry.auth import Authenticator
    from shim.registry.transport import origin_of

    def never(*args: object) -> tuple[int, bytes]:
        raise AssertionError("no request may go out")

    store = CredentialStore({"HOME": str(tmp_path)})
    auth = Authenticator(origin_of("https://registry.example.com"), "registry.example.com", store, never, World())
    for realm in (
        "http://auth.example.com/token",
        "https://169.254.169.254/latest/meta-data",
        "https://127.0.0.1/token",
        "https://[::1]/token",
        "https://localhost:8080/token",
        "https://[::ffff:127.0.0.1]/x",
        "https://user:pw@auth.example.com/token",
        "https://user@auth.example.com/token",
        "file:///etc/passwd",
        "",
        "https://",
        "https://[",
        "https://x:99999/",
    ):
        with pytest.raises(RegistryError):
            auth.renew("a", "pull", None, f'Bearer realm="{realm}"', None)


def test_helpers(tmp_path: Path, locked: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    monkeypatch.setattr(helper, "PATH", str(bin_dir))
    monkeypatch.setattr(helper.run_helper, "__kwdefaults__", {"path": str(bin_dir), "timeout": 5.0})
    program = bin_dir / "docker-credential-test"
    log = tmp_path / "log"
    answer = json.dumps({"ServerURL": locked.host, "Username": USER, "Secret": PASSWORD})
    program.write_text(f"#!/bin/sh\n/bin/cat >>{log}; echo \" $1\" >>{log}\necho '{answer}'\n")
    program.chmod(0o755)
    ref = ImageRef.parse(locked.ref("team/app", "v1"))
    for config in ({"credsStore": "test", "auths": {locked.host: {}}}, {"credHelpers": {locked.host: "test"}}):
        write_docker_config(tmp_path, config)
        client = make_client(tmp_path)
        assert client.resolve(ref).layers
        client.check_access(ref, sha256(LAYER))
    assert log.read_text() == f"{locked.host} get\n" * 2, "asked once for each client, not for each request"
    world = World()
    store = CredentialStore({"HOME": str(tmp_path)}, hooks=world)
    for _ in range(3):
        assert store.lookup("r.io", "x") is None
        assert store.lookup(locked.host, "x") is not None
    assert len(log.read_text().splitlines()) == 3
    world.extra = 301.0
    store.lookup(locked.host, "x")
    store.forget(locked.host)
    store.lookup(locked.host, "x")
    assert len(log.read_text().splitlines()) == 5


def test_nothing_secret_is_shown(
    guarded: Registry, tokens: TokenServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With all logs on, through good and bad answers, even of a registry that repeats what it was sent."""
    caplog.set_level(logging.DEBUG)
    write_docker_config(tmp_path, {"auths": {"127.0.0.1": {}}})
    shown: list[str] = []
    with FaultServer(guarded.host) as server, FaultServer() as storage:
        entry = {"username": USER, "password": PASSWORD}
        write_docker_config(tmp_path, {"auths": {server.host: entry}})
        headers = {"X-Api-Key": "header-s3cret"}
        world = World()
        client = make_client(tmp_path, {server.host: {"headers": headers}}, hooks=world)
        ref = ImageRef.parse(f"{server.host}/team/app:v1")
        client.check_access(ref, sha256(LAYER))
        token = server.requests("HEAD")[-1].headers["authorization"].removeprefix("Bearer ")
        assert server.requests("HEAD")[-1].headers["x-api-key"] == "header-s3cret"
        echo = json.dumps({"errors": [{"message": f"header-s3cret {token} bad Bearer {token}"}]}).encode()
        signed = f"{storage.url}/blob?X-Amz-Signature=signed-s3cret"
        for trouble in (
            {"status": 400, "body": echo},
            {"status": 403, "body": echo},
            {"status": 503, "body": echo},
            {"status": 500, "body": f"Authorization: Bearer {token}; see {signed}".encode()},
            {"redirect": signed},
            {"redirect": f"http://u:signed-s3cret@{storage.host}/"},
            {"redirect": "http://127.0.0.9:9/?signed-s3cret"},
            {"drop": True},
            {"truncate_at": 5},
        ):
            server.faults.clear()
            server.faults.add("GET", "/blobs/", **trouble)
            with pytest.raises(RegistryError) as caught:
                b"".join(client.open_blob(ref, sha256(LAYER)))
            shown.append(told(caught.value))
        shown += [repr(client._credentials.lookup(server.host, "team/app")), *world.warnings]
        shown += [
            repr(vars(e.host) if hasattr(e.host, "__dict__") else e.host) for e in client._for(server.host, "pull")
        ]
    shown.append(caplog.text)
    assert len(caplog.records) < 1000
    for secret in (PASSWORD, BASIC, token[:40], token[-40:], "signed-s3cret", "header-s3cret"):
        for text in shown:
            assert secret not in text
    assert Credentials("u", PASSWORD).source not in (PASSWORD,)
    assert PASSWORD not in repr(Credentials("u", PASSWORD, PASSWORD, PASSWORD, "f"))
