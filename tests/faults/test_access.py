"""Who gets what is cached: an image's own registry has to let it have the layer first (`trust.cached`)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemonclient import Client, acquire, trees
from tests.support.faultserver import FaultServer
from tests.support.host import Host, stop, wait_for
from tests.support.lazyimage import FILES, LazyImage, content, serve
from tests.support.lazytree import drop_page_cache


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


def make_host(*servers: FaultServer, **settings: str) -> Host:
    host = Host(settings={"CLIP_SHIM_TREE_LINGER": "100ms", "CLIP_SHIM_MOUNT_DEADLINE": "3s", **settings})
    for server in servers:
        host.trust_registry(server.host)
    return host


@pytest.fixture
def host(server: FaultServer) -> Iterator[Host]:
    with make_host(server) as made:
        made.start_daemon()
        yield made


def read_all(host: Host, image: LazyImage, index: Path) -> dict[str, Any]:
    """Acquire an image and read all of it."""
    drop_page_cache()
    with Client(host) as client:
        answer = client.acquire(index)
        if answer["ok"]:
            for name in FILES:
                assert (Path(answer["tree"]) / name).read_bytes() == content(image.seed, name)
    wait_for("the tree is unmounted", lambda: not trees(host))
    return answer


@pytest.mark.parametrize(("status", "kind"), [(401, "AuthError"), (403, "AuthError"), (404, "NotFoundError")])
def test_another_tenants_layer(server: FaultServer, host: Host, status: int, kind: str) -> None:
    """The layer is in the cache; another repository, which may not have it, claims it."""
    mine, theirs = serve(server, "team/mine", 1), serve(server, "team/theirs", 1)
    index, false = mine.index(host.indexes / "mine.clip"), theirs.index(host.indexes / "theirs.clip")
    assert read_all(host, mine, index)["ok"]
    server.faults.add("*", theirs.blob, status=status)
    answer = read_all(host, theirs, false)
    assert (answer["ok"], answer["kind"]) == (False, kind)
    assert f"does not confirm that {server.host}/team/theirs may read its layer {mine.layer[7:19]}" in answer["error"]
    assert not trees(host)
    # and while the rightful one is in use
    with Client(host) as client:
        assert client.acquire(index)["ok"]
        assert acquire(host, false)["kind"] == kind
    # until its registry allows it; the question is asked once
    server.faults.clear()
    server.reset_counts()
    assert read_all(host, theirs, false)["ok"]
    assert read_all(host, theirs, false)["ok"]
    assert [(seen.method, seen.path) for seen in server.requests()] == [("HEAD", theirs.blob)]


def test_a_registry_that_never_had_the_layer_must_show_it(server: FaultServer) -> None:
    """Its word alone is worth nothing: it may be the attacker's own."""
    with FaultServer() as other, make_host(server, other) as host:
        host.start_daemon()
        mine, liar = serve(server, "team/mine", 2), serve(other, "liar", 2)
        index, false = mine.index(host.indexes / "mine.clip"), liar.index(host.indexes / "liar.clip")
        assert read_all(host, mine, index)["ok"]
        data = other.blobs[liar.blob]
        other.blobs[liar.blob] = bytes(len(data))  # HEAD says: it is here, and as long as it should be
        answer = read_all(host, liar, false)
        assert (answer["ok"], answer["kind"]) in ((False, "IntegrityError"), (False, "LayerError"))
        other.blobs[liar.blob] = data
        other.reset_counts()
        assert read_all(host, liar, false)["ok"]
        assert [seen.method for seen in other.requests()] == ["HEAD", "GET"]
        assert read_all(host, liar, false)["ok"]
        assert other.count() == 2


def test_what_is_cached_starts_after_a_reboot_without_a_registry(server: FaultServer) -> None:
    """RUN is gone, STATE is kept, the registry is away and nobody is logged in: what was let in once still starts.
    Nobody else is let in meanwhile."""
    image, other = serve(server, "team/app", 3), serve(server, "team/other", 3)
    with make_host(server) as host:
        host.start_daemon()
        index, another = image.index(host.indexes / "app.clip"), other.index(host.indexes / "other.clip")
        assert read_all(host, image, index)["ok"]
        stop(host.daemon)
        shutil.rmtree(host.run_dir)
        host.env["DOCKER_CONFIG"] = str(host.base / "nothing")
        server.faults.add("*", "", drop=True)
        server.reset_counts()
        host.start_daemon()
        assert read_all(host, image, index)["ok"]
        assert server.count() == 0
        answer = read_all(host, other, another)
        assert (answer["ok"], answer["kind"]) == (False, "RegistryError")


def test_policy_if_cached(server: FaultServer) -> None:
    image, other = serve(server, "team/app", 4), serve(server, "team/other", 4)
    with make_host(server, CLIP_SHIM_TRUST_CACHED="if-cached") as host:
        host.start_daemon()
        index, another = image.index(host.indexes / "app.clip"), other.index(host.indexes / "other.clip")
        assert read_all(host, image, index)["ok"]
        server.faults.add("*", "", drop=True)
        server.reset_counts()
        assert read_all(host, other, another)["ok"]
        assert server.count() == 0


def test_a_registry_without_head(server: FaultServer, host: Host) -> None:
    image = serve(server, "team/app", 5)
    index = image.index(host.indexes / "app.clip")
    server.faults.add("HEAD", "", status=405, body=b"")
    assert read_all(host, image, index)["ok"]
    assert server.count("GET", image.blob) >= 2


def test_a_registry_that_is_back_before_the_deadline(server: FaultServer, host: Host) -> None:
    image = serve(server, "team/app", 6)
    index = image.index(host.indexes / "app.clip")
    server.faults.add("HEAD", "", drop=True, times=3)
    assert read_all(host, image, index)["ok"]
