"""Per-registry settings: validation, TLS trust, client certificates, headers, mirrors in order and their failures."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shim.errors import ConfigError, IntegrityError, NotFoundError, RegistryError
from shim.registry.client import RegistryClient
from shim.registry.hosts import Hosts
from shim.registry.ref import ImageRef
from shim.registry.transport import TLS, is_internal, is_loopback
from tests.support.faultserver import FaultServer
from tests.support.registry import Registry, World, gzip_of, make_certificates, make_client, sha256, tar_of

pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
LAYER = gzip_of(tar_of({"x": bytes(range(256)) * 400}))


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    make_certificates(directory)
    return directory


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as running:
        running.push_image("team/app", "v1", [LAYER])
        yield running


def bases(table: dict[str, Any], registry: str) -> list[str]:
    return [host.base for host in Hosts(table, ()).of(registry)]


@pytest.mark.parametrize(
    ("table", "registry", "urls"),
    [
        ({}, "docker.io", ["https://registry-1.docker.io"]),
        ({}, "r.io", ["https://r.io"]),
        ({}, "r.io:5000", ["https://r.io:5000"]),
        ({}, "localhost:5000", ["http://localhost:5000"]),
        ({}, "127.0.0.9", ["http://127.0.0.9"]),
        ({}, "[::1]:5000", ["http://[::1]:5000"]),
        ({}, "127.0.0.1:443", ["https://127.0.0.1:443"]),
        ({}, "127.0.0.1.example.com", ["https://127.0.0.1.example.com"]),
        ({}, "10.0.0.1:5000", ["https://10.0.0.1:5000"]),
        ({"r.io": {"plain_http": True}}, "r.io", ["http://r.io"]),
        ({"localhost:1": {"plain_http": False}}, "localhost:1", ["https://localhost:1"]),
        ({"localhost:1": {"skip_verify": True}}, "localhost:1", ["https://localhost:1"]),
        (
            {"r.io": {"mirrors": ["m.io", {"host": "http://n.io/p/"}]}},
            "r.io",
            ["https://m.io", "http://n.io/p", "https://r.io"],
        ),
        ({"docker.io": {"mirrors": ["m.io/v2"]}}, "docker.io", ["https://m.io", "https://registry-1.docker.io"]),
        ({"index.docker.io": {"mirrors": ["m.io"]}}, "docker.io", ["https://m.io", "https://registry-1.docker.io"]),
        ({"*": {"mirrors": ["m.io"]}, "a.io": {}}, "b.io", ["https://m.io", "https://b.io"]),
        ({"*": {"mirrors": ["m.io"]}, "a.io": {}}, "a.io", ["https://a.io"]),
        ({"r.io": {"host": "https://real.io/base"}}, "r.io", ["https://real.io/base"]),
    ],
)
def test_urls(table: dict[str, Any], registry: str, urls: list[str]) -> None:
    assert bases(table, registry) == urls


@pytest.mark.parametrize(
    ("table", "registry", "keys"),
    [
        ({}, "docker.io", ["docker.io"]),
        ({}, "r.io", ["r.io"]),
        ({}, "r.io:443", ["r.io:443"]),  # what `docker login r.io:443` writes
        ({"r.io": {"mirrors": ["m.io:443"], "host": "real.io"}}, "r.io", ["m.io", "real.io"]),
    ],
)
def test_names_in_credential_files(table: dict[str, Any], registry: str, keys: list[str]) -> None:
    assert [host.credential_key for host in Hosts(table, ()).of(registry)] == keys


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        (5, "registries.r.io"),
        ({"mirors": []}, "unknown key `mirors`"),
        ({"mirrors": {}}, "registries.r.io.mirrors"),
        ({"mirrors": [5]}, r"registries.r.io.mirrors\[0\]"),
        ({"mirrors": [{}]}, r"registries.r.io.mirrors\[0\].host"),
        ({"mirrors": ["a.io", {"host": "ftp://x"}]}, r"registries.r.io.mirrors\[1\].host"),
        ({"mirrors": [{"host": "https://u:p@x"}]}, "without credentials"),
        ({"mirrors": [{"host": "https://x/?q"}]}, "query"),
        ({"mirrors": [{"host": "a b"}]}, "not a host"),
        ({"mirrors": [{"host": "x:99999"}]}, "not a host"),
        ({"mirrors": [{"host": "https://x", "plain_http": True}]}, "contradicts"),
        ({"mirrors": [{"host": "x", "mirrors": []}]}, "unknown key"),
        ({"mirrors": ["x"] * 40}, "at most"),
        ({"plain_http": "yes"}, "registries.r.io.plain_http"),
        ({"skip_verify": 1}, "registries.r.io.skip_verify"),
        ({"ca": "relative.pem"}, "registries.r.io.ca"),
        ({"ca": 7}, "registries.r.io.ca"),
        ({"client": ["/a", "/b", "/c"]}, r"registries.r.io.client\[0\]"),
        ({"client": 7}, "registries.r.io.client"),
        ({"headers": ["x"]}, "registries.r.io.headers"),
        ({"headers": {"a b": "x"}}, "registries.r.io.headers"),
        ({"headers": {"a": "x\r\ny"}}, "registries.r.io.headers"),
        ({"headers": {"a": 5}}, "registries.r.io.headers"),
        ({"capabilities": ["fly"]}, "registries.r.io.capabilities"),
        ({"capabilities": []}, "registries.r.io.capabilities"),
    ],
)
def test_wrong_settings_name_their_key(entry: Any, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        RegistryClient({"r.io": entry})


def test_wrong_names() -> None:
    for name in ("https://r.io", "r.io/x", "", "u@r.io", "r.io:x"):
        with pytest.raises(ConfigError, match="registry host"):
            Hosts({name: {}})
    with pytest.raises(ConfigError) as caught:
        Hosts({"r.io": {"mirors": []}})
    assert caught.value.hint == "did you mean `mirrors`?"


def test_a_header_value_is_never_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        Hosts({"r.io": {"headers": {"X-Key": "s3cret\n"}}})
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(Hosts({"r.io": {"headers": {"X-Key": "s3cret"}}}).of("r.io"))


def test_certs_d(tmp_path: Path) -> None:
    for name in ("r.io:5000", "s.io"):
        (tmp_path / name).mkdir()
        for file in ("ca.crt", "me.cert", "me.key", "other.cert", "README"):
            (tmp_path / name / file).touch()
    hosts = Hosts({"t.io": {"ca": "/own.pem"}}, (str(tmp_path / "none"), str(tmp_path)))
    expected = TLS(
        (f"{tmp_path}/r.io:5000/ca.crt",), ((f"{tmp_path}/r.io:5000/me.cert", f"{tmp_path}/r.io:5000/me.key"),)
    )
    assert hosts.of("r.io:5000")[0].tls == expected
    assert hosts.of("s.io")[0].tls.ca == (f"{tmp_path}/s.io/ca.crt",)
    assert hosts.of("t.io")[0].tls.ca == ("/own.pem",)
    assert hosts.of("u.io")[0].tls == TLS()


def test_loopback_and_internal() -> None:
    for host in ("localhost", "LOCALHOST", "a.localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]", "::ffff:127.0.0.1"):
        assert is_loopback(host)
        assert is_internal(host)
    for host in ("localhost.example.com", "128.0.0.1", "10.0.0.1", "fe80::1", "r.io", "127.0.0.1.nip.io"):
        assert not is_loopback(host)
    for host in ("169.254.169.254", "[fe80::1]", "fe80::1%eth0", "0.0.0.0", "::"):
        assert is_internal(host)
    assert not is_internal("10.0.0.1")


def test_private_ca(pki: Path, tmp_path: Path) -> None:
    with Registry(tls=pki) as registry:
        registry.push_image("team/app", "v1", [LAYER])
        port = registry.host.partition(":")[2]
        for name in (registry.host, f"localhost:{port}"):
            ref = ImageRef.parse(f"{name}/team/app:v1")
            good = make_client(tmp_path, {name: {"ca": str(pki / "ca.crt")}})
            digest = good.resolve(ref).layers[0].digest
            assert b"".join(good.open_blob(ref, digest)) == LAYER
            assert make_client(tmp_path, {name: {"skip_verify": True}}).resolve(ref).layers
            with pytest.raises(RegistryError, match=r"certificate of .* is not trusted") as caught:
                make_client(tmp_path, {name: {"plain_http": False}}, hooks=World()).resolve(ref)
            assert not caught.value.retryable
            assert "ca" in (caught.value.hint or "")
        ref = ImageRef.parse(f"127.0.0.3:{port}/team/app:v1")  # trusted, but for other names
        table = {ref.registry: {"ca": str(pki / "ca.crt")}}
        with pytest.raises(RegistryError):
            make_client(tmp_path, table, hooks=World()).resolve(ref)
        with pytest.raises(RegistryError, match="speaks https") as caught:
            make_client(tmp_path).resolve(ImageRef.parse(registry.ref("team/app", "v1")))
        assert "plain_http: false" in (caught.value.hint or "")


def test_a_ca_for_one_registry_is_not_one_for_another(pki: Path, tmp_path: Path) -> None:
    with Registry(tls=pki) as registry:
        registry.push_image("a", "v1", [LAYER])
        port = registry.host.partition(":")[2]
        client = make_client(
            tmp_path,
            {registry.host: {"ca": str(pki / "ca.crt")}, f"localhost:{port}": {"plain_http": False}},
            hooks=World(),
        )
        assert client.resolve(ImageRef.parse(registry.ref("a", "v1")))
        with pytest.raises(RegistryError, match="not trusted"):
            client.resolve(ImageRef.parse(f"localhost:{port}/a:v1"))


def test_plain_http_where_tls_is_due(registry: Registry, tmp_path: Path) -> None:
    client = make_client(tmp_path, {registry.host: {"plain_http": False}}, hooks=World())
    with pytest.raises(RegistryError, match=r"TLS with .* failed") as caught:
        client.resolve(ImageRef.parse(registry.ref("team/app", "v1")))
    assert "plain_http: true" in (caught.value.hint or "")


def test_client_certificate(pki: Path, tmp_path: Path) -> None:
    with Registry(tls=pki, client_ca=pki / "ca.crt") as registry:
        registry.push_image("team/app", "v1", [LAYER])
        ref = ImageRef.parse(registry.ref("team/app", "v1"))
        ca, pair = str(pki / "ca.crt"), [str(pki / "client.crt"), str(pki / "client.key")]
        for client in (pair, [pair]):
            assert make_client(tmp_path, {registry.host: {"ca": ca, "client": client}}).resolve(ref).layers
        with pytest.raises(RegistryError):
            make_client(tmp_path, {registry.host: {"ca": ca}}, hooks=World()).resolve(ref)


def test_our_certificate_goes_to_no_other_host(pki: Path, tmp_path: Path) -> None:
    with Registry(tls=pki, client_ca=pki / "ca.crt") as storage, FaultServer(tls=pki) as server:
        digest = storage.push_blob("team/app", LAYER)
        server.faults.add("GET", "blobs", redirect=f"https://{storage.host}/v2/team/app/blobs/{digest}")
        entry = {"ca": str(pki / "ca.crt"), "client": [str(pki / "client.crt"), str(pki / "client.key")]}
        client = make_client(tmp_path, {server.host: entry, storage.host: entry}, hooks=World())
        assert b"".join(client.open_blob(ImageRef.parse(f"{storage.host}/team/app"), digest)) == LAYER
        with pytest.raises(RegistryError):
            client.open_blob(ImageRef.parse(f"{server.host}/team/app"), digest)
        assert server.count() > 0


def test_files_that_rotate(pki: Path, tmp_path: Path) -> None:
    with Registry(tls=pki) as registry:
        registry.push_image("a", "v1", [LAYER])
        make_certificates(tmp_path / "other")
        ca, ref = tmp_path / "ca.pem", ImageRef.parse(registry.ref("a", "v1"))
        ca.write_bytes((tmp_path / "other" / "ca.crt").read_bytes())
        client = make_client(tmp_path, {registry.host: {"ca": str(ca)}}, hooks=World())
        with pytest.raises(RegistryError, match="not trusted"):
            client.resolve(ref)
        ca.write_bytes((pki / "ca.crt").read_bytes())
        assert client.resolve(ref).layers


def test_proxies_from_the_environment(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer() as proxy:
        digest = sha256(LAYER)
        proxy.serve(f"http://registry.example.com/v2/team/app/blobs/{digest}", LAYER)
        for name in ("no_proxy", "NO_PROXY", "http_proxy", "HTTP_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("http_proxy", proxy.url)
        table = {"registry.example.com": {"plain_http": True}}
        ref = ImageRef.parse("registry.example.com/team/app")
        assert b"".join(make_client(tmp_path, table).open_blob(ref, digest, 3, 9)) == LAYER[3:9]
        assert proxy.count() == 1
        assert make_client(tmp_path).resolve(ImageRef.parse(registry.ref("team/app", "v1"))).layers
        assert proxy.count() == 1, "loopback is reached without the proxy"
        monkeypatch.setenv("no_proxy", "example.com")
        with pytest.raises(RegistryError, match=r"registry\.example\.com"):
            make_client(tmp_path, table, hooks=World()).open_blob(ref, digest)
        assert proxy.count() == 1


def test_files_that_cannot_be_used(pki: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("nonsense")
    subprocess.run(
        ["openssl", "ec", "-in", pki / "client.key", "-aes128", "-passout", "pass:x", "-out", tmp_path / "locked.key"],
        check=True,
        capture_output=True,
    )
    for entry, path in (
        ({"ca": f"{tmp_path}/none.pem"}, "none.pem"),
        ({"ca": f"{tmp_path}/bad.pem"}, "bad.pem"),
        ({"skip_verify": True, "client": [f"{tmp_path}/none.crt", f"{tmp_path}/none.key"]}, "none.crt"),
        ({"skip_verify": True, "client": [f"{pki}/client.crt", f"{tmp_path}/locked.key"]}, "client.crt"),
    ):
        with pytest.raises(ConfigError, match=path):
            make_client(tmp_path, {"localhost:1": entry}).resolve(ImageRef.parse("localhost:1/x"))


def test_mirrors_are_asked_in_order(registry: Registry, tmp_path: Path) -> None:
    with (
        FaultServer(registry.host) as first,
        FaultServer(registry.host) as second,
        FaultServer(registry.host) as upstream,
    ):
        table = {
            upstream.host: {
                "mirrors": [
                    {"host": first.host, "capabilities": ["pull"], "headers": {"X-Who": "me"}},
                    {"host": f"{second.url}", "plain_http": True},
                ]
            }
        }
        ref = ImageRef.parse(f"{upstream.host}/team/app:v1")
        client = make_client(tmp_path, table)
        assert client.hosts(ref) == [first.host, second.host, upstream.host]
        image = client.resolve(ref)
        # a tag is not asked of a mirror that may not resolve; what has a digest is
        assert (first.count(path="manifests"), second.count(path="manifests")) == (0, 1)
        assert (first.count(path="blobs"), second.count(path="blobs"), upstream.count()) == (1, 0, 0)
        assert first.requests()[0].headers["x-who"] == "me"
        assert first.requests()[0].path.endswith("?ns=" + upstream.host.replace(":", "%3A"))
        assert "x-who" not in second.requests()[0].headers
        first.faults.add("*", "", status=404)
        second.faults.add("*", "", status=500)
        with client.open_blob(ref, image.layers[0].digest) as stream:
            assert b"".join(stream) == LAYER
            assert stream.host == upstream.host
        # a mirror without the blob is asked for the next one; one that failed is left alone for a while
        second.reset_counts()
        assert client.open_blob(ref, image.layers[0].digest, 0, 10).host == upstream.host
        assert second.count() == 0


def test_mirror_that_is_down_or_hangs_or_refuses(registry: Registry, tmp_path: Path) -> None:
    with FaultServer(registry.host) as mirror:
        ref = ImageRef.parse(registry.ref("team/app", "v1"))
        for trouble in ({"hang": True}, {"drop": True}, {"status": 401}, {"status": 403}, {"drip_head": 0.2}):
            mirror.faults.clear()
            mirror.faults.add("*", "", **trouble)
            client = make_client(
                tmp_path, {registry.host: {"mirrors": [mirror.host]}}, hooks=World(), read_timeout=0.2, deadline=10.0
            )
            assert client.resolve(ref).layers
    client = make_client(tmp_path, {registry.host: {"mirrors": [mirror.host]}}, hooks=World())  # gone by now
    assert client.resolve(ref).layers


def test_a_mirror_that_hangs_leaves_time_for_the_next(registry: Registry, tmp_path: Path) -> None:
    with FaultServer(registry.host) as mirror:
        mirror.faults.add("*", "", hang=True)
        client = make_client(tmp_path, {registry.host: {"mirrors": [mirror.host]}}, deadline=3.0)
        assert client.resolve(ImageRef.parse(registry.ref("team/app", "v1"))).layers
        assert mirror.count() == 1


def test_a_mirror_with_wrong_bytes(registry: Registry, tmp_path: Path) -> None:
    with FaultServer(registry.host) as mirror:
        client = make_client(tmp_path, {registry.host: {"mirrors": [mirror.host]}}, hooks=World())
        mirror.faults.add("GET", "manifests", corrupt_at=20)
        mirror.faults.add("GET", "blobs", corrupt_at=20)
        ref = ImageRef.parse(registry.ref("team/app", "v1"))
        image = client.resolve(ref)
        assert client.counters.total("manifest").requests == 2
        client = make_client(tmp_path, {registry.host: {"mirrors": [mirror.host]}}, hooks=World())
        assert client.blob(ref, image.config) == image.config_raw
        # a range cannot be checked here: who finds it wrong says so, and the next host is asked
        client = make_client(tmp_path, {registry.host: {"mirrors": [mirror.host]}}, hooks=World())
        with client.open_blob(ref, image.layers[0].digest) as stream:
            assert b"".join(stream) != LAYER
            assert stream.host == mirror.host
            stream.report_corrupt()
        assert b"".join(client.open_blob(ref, image.layers[0].digest)) == LAYER
    with FaultServer(registry.host) as server:
        server.faults.add("GET", "manifests", corrupt_at=20)
        with pytest.raises(IntegrityError, match="hashes to"):
            make_client(tmp_path).resolve(ImageRef.parse(f"{server.host}/team/app:v1"))


def test_a_mirror_that_breaks_off_in_the_middle(registry: Registry, tmp_path: Path) -> None:
    data = bytes(range(251)) * 20000
    registry.push_blob("team/app", data)
    with FaultServer(registry.host) as mirror:
        client = make_client(tmp_path, {registry.host: {"mirrors": [mirror.host]}}, hooks=World())
        mirror.faults.add("GET", "blobs", truncate_at=3_000_000)
        ref = ImageRef.parse(registry.ref("team/app", "v1"))
        with client.open_blob(ref, sha256(data), 1000) as stream:
            assert b"".join(stream) == data[1000:]
            assert stream.host == registry.host
        assert client.counters.total("blob").bytes == len(data) - 1000, "nothing is read twice"


def test_all_fail_and_each_is_named(registry: Registry, tmp_path: Path) -> None:
    with FaultServer(registry.host) as mirror:
        mirror.faults.add("*", "", status=500)
        client = make_client(tmp_path, {registry.host: {"mirrors": [mirror.host]}}, hooks=World())
        with pytest.raises(NotFoundError) as caught:
            client.resolve(ImageRef.parse(registry.ref("team/app", "none")))
    assert f"{registry.host} has no manifest none" in str(caught.value)
    assert f"{mirror.host} answered 500" in str(caught.value)


def test_credentials_of_the_registry_are_not_given_to_a_mirror(tmp_path: Path) -> None:
    with Registry(htpasswd=True) as registry, FaultServer() as mirror:
        registry.push_image("team/app", "v1", [LAYER])
        mirror.faults.add("*", "", status=401, headers={"WWW-Authenticate": 'Basic realm="mirror"'})
        (tmp_path / ".docker").mkdir()
        auth = json.dumps({"auths": {registry.host: {"username": "alice", "password": "s3cret:pass"}}})
        (tmp_path / ".docker/config.json").write_text(auth)
        client = make_client(tmp_path, {registry.host: {"mirrors": [mirror.host]}}, hooks=World())
        assert client.resolve(ImageRef.parse(registry.ref("team/app", "v1"))).layers
        assert mirror.count() > 0
        assert not any("authorization" in seen.headers for seen in mirror.seen)
