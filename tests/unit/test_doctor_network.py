"""`doctor` on registries, clocks and stores: a real registry behind a server that does wrong what it is told to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from shim.doctor import network
from shim.doctor.node import KnownImage, Node
from shim.doctor.result import Result
from shim.registry.ref import ImageRef
from shim.settings import load
from tests.support.faultserver import FaultServer
from tests.support.registry import Registry, make_certificates, sha256, tar_of
from tests.support.s3 import S3

Make = Callable[..., Node]


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as made:
        yield made


@pytest.fixture
def server(registry: Registry) -> Iterator[FaultServer]:
    with FaultServer(upstream=registry.host) as made:
        yield made


@pytest.fixture
def make(registry: Registry, server: FaultServer, tmp_path: Path) -> Make:
    """A node that has an image of the registry behind the server, unless image=False."""
    data = tar_of({"a": b"x" * 1000})
    registry.push_image("small", "v1", [data])
    layer = sha256(data)

    def node(*, image: bool = True, **flags: Any) -> Node:
        settings = load(env={}, flags={"state_dir": str(tmp_path), "run_dir": str(tmp_path / "run"), **flags})
        made = Node(settings, tmp_path / "launcher", lambda: None)
        made.images = [KnownImage(ImageRef.parse(f"{server.host}/small:v1"), [layer])] if image else []
        return made

    return node


pytestmark = pytest.mark.filterwarnings("ignore:Unverified HTTPS request")


def one(results: Iterator[Result]) -> tuple[str, str]:
    [result] = list(results)
    assert result.status in ("ok", "skipped") or result.fix
    return result.status, result.found


def test_all_is_well(make: Make, server: FaultServer) -> None:
    node = make()
    assert one(network.reachable(node)) == ("ok", f"http://{server.host} gives layers of small, ranges work")
    assert one(network.clock(node)) == ("ok", f"the clock agrees with {server.host}")
    assert server.count("GET", "/blobs/") == 1  # asked once for both


def test_no_image_known(make: Make, server: FaultServer) -> None:
    node = make(image=False, registries={server.host: {}})
    assert one(network.reachable(node)) == ("ok", f"http://{server.host} answers without asking who we are")


@pytest.mark.parametrize(
    ("fault", "status", "text"),
    [
        ({"ignore_range": True}, "warning", "answered 200 where 206 was due"),
        ({"headers": {"Content-Range": "bytes 5-5/9"}}, "warning", "gave another range"),
        ({"status": 401}, "failed", "401"),
        ({"status": 403}, "failed", "403"),
        ({"status": 404}, "failed", "has no blob"),
        ({"status": 500}, "failed", "answered 500"),
        ({"drop": True}, "failed", ""),
        ({"redirect": "http://127.0.0.1:1/elsewhere"}, "failed", "127.0.0.1:1"),
    ],
)
def test_what_a_registry_does_wrong(
    make: Make, server: FaultServer, fault: dict[str, Any], status: str, text: str
) -> None:
    server.faults.add("GET", r"/blobs/", **fault)
    found = one(network.reachable(make()))
    assert found[0] == status
    assert text in found[1]


def test_redirect_is_named(make: Make, server: FaultServer, registry: Registry) -> None:
    """Layers that lie elsewhere, as at most public registries."""
    server.faults.add("GET", r"/blobs/", redirect=lambda path: f"http://{registry.host}{path}")
    status, found = one(network.reachable(make()))
    assert (status, found) == (
        "ok",
        f"http://{server.host} gives layers of small, redirects to {registry.host}, ranges work",
    )


def test_registry_that_is_away(make: Make) -> None:
    node = make(image=False, registries={"127.0.0.1:1": {}})
    assert one(network.reachable(node))[0] == "failed"
    assert one(network.clock(node))[0] == "skipped"


def test_a_mirror_that_is_away_is_only_a_warning(make: Make, server: FaultServer) -> None:
    node = make(registries={server.host: {"mirrors": ["http://127.0.0.1:1"]}})
    assert [(item.status, "mirror of" in item.found) for item in network.reachable(node)] == [
        ("warning", True),
        ("ok", False),
    ]


def test_certificate_that_is_not_trusted(make: Make, tmp_path: Path) -> None:
    (tmp_path / "pki").mkdir()
    make_certificates(tmp_path / "pki")
    with Registry(tls=tmp_path / "pki") as secure:
        node = make(image=False, registries={secure.host: {"plain_http": False}})
        status, found = one(network.reachable(node))
        assert status == "failed"
        assert "certificate" in found
        node = make(image=False, registries={secure.host: {"plain_http": False, "skip_verify": True}})
        status, found = one(network.reachable(node))
        assert status == "warning"
        assert "is not looked at" in found


@pytest.mark.parametrize(
    ("seconds", "status", "text"),
    [(3600, "failed", "s behind"), (-3600, "failed", "s before"), (90, "warning", "s behind")],
)
def test_clock(make: Make, server: FaultServer, seconds: int, status: str, text: str) -> None:
    server.faults.add("GET", r"/blobs/", headers={"Date": formatdate(time.time() + seconds, usegmt=True)})
    found = one(network.clock(make()))
    assert found[0] == status
    assert text in found[1]


def test_clock_of_the_past(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is injected: the clock belongs to this whole machine."""
    monkeypatch.setattr(network.time, "time", lambda: 1e9)
    status, found = one(network.clock(make()))
    assert status == "failed"
    assert "before this program was installed" in found


def test_local_store(make: Make, tmp_path: Path) -> None:
    assert one(network.stores(make()))[0] == "skipped"
    (tmp_path / "indexes").mkdir()
    assert one(network.stores(make())) == ("ok", f"{tmp_path}/indexes can be read and written")
    assert list((tmp_path / "indexes").iterdir()) == []
    (tmp_path / "indexes").rmdir()
    (tmp_path / "indexes").symlink_to("/proc/1")  # where nothing can be made
    assert one(network.stores(make()))[0] == "failed"


def test_store_beside_the_image(make: Make, server: FaultServer) -> None:
    node = make(**{"stores.lookup": ["oci"], "stores.write": ["oci"]})
    found = [(item.status, item.found) for item in network.stores(node)]
    assert found[1] == ("ok", f"{server.host}/small can be read and pushed to")
    server.faults.add("*", r"/blobs/", status=403)
    found = [(item.status, item.found) for item in network.stores(node)]
    assert found[1][0] == "failed"


@pytest.mark.parametrize("url", ["/no/such/directory/", "s3://indexes/team/"])
def test_store_that_is_away(make: Make, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    s3 = {"*": {"endpoint": "http://127.0.0.1:1", "path_style": True}}
    found = list(network.stores(make(**{"stores.lookup": [url], "stores.s3": s3})))
    assert [item.status for item in found] == ["skipped", "failed"]
    assert found[1].found.startswith(url)


def test_s3_store(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where indexes are put, a small object is written; credentials that may only read are found out."""
    with S3() as s3:
        for name, value in s3.env.items():
            monkeypatch.setenv(name, value)
        flags = {"stores.write": ["s3://indexes/team"], "stores.s3": {"*": s3.options}}
        found = list(network.stores(make(**flags)))
        assert [item.status for item in found] == ["skipped", "ok"]
        assert found[1].found == "s3://indexes/team can be read and written"
        for name, value in s3.reader_env.items():
            monkeypatch.setenv(name, value)
        assert [item.status for item in network.stores(make(**flags))] == ["skipped", "failed"]
        flags = {"stores.lookup": ["s3://indexes/team"], "stores.s3": {"*": s3.options}}
        assert [item.status for item in network.stores(make(**flags))] == ["skipped", "ok"]
