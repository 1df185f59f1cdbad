"""Each kind of trouble that a registry can have while a container reads: the read waits, `status --waiting` says for
what, and when the trouble is over the bytes are right. The whole path runs, against a real HTTP server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shim.index import codec
from tests.support.daemonclient import Client, log_lines
from tests.support.faultserver import FaultServer
from tests.support.host import Host, wait_for
from tests.support.lazyimage import FILES, LazyImage, content, serve
from tests.support.registry import make_certificates

_seeds = iter(range(100, 1000))


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        yield running


@pytest.fixture(scope="module")
def host(server: FaultServer) -> Iterator[Host]:
    with Host(settings={"CLIP_SHIM_FETCH_READAHEAD": "0"}) as made:
        made.trust_registry("127.0.0.1")
        made.start_daemon()
        yield made


@pytest.fixture
def image(server: FaultServer) -> Iterator[LazyImage]:
    """One whose layer nobody has yet."""
    seed = next(_seeds)
    yield serve(server, f"app{seed}", seed)
    server.faults.clear()


@contextmanager
def mounted(host: Host, image: LazyImage, index: Path | None = None) -> Iterator[Path]:
    """Its tree, with nothing of it read."""
    index = index or image.index(host.indexes / f"{image.seed}.clip")
    with Client(host) as client:
        answer = client.acquire(index)
        assert answer["ok"], answer
        yield host.seen(Path(answer["tree"]))


@contextmanager
def reading(tree: Path, image: LazyImage) -> Iterator[Future[bool]]:
    """A thread that reads the whole image; its result is whether every byte was right."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(lambda: all((tree / name).read_bytes() == content(image.seed, name) for name in FILES))


def waits(host: Host, reader: Future[bool], *said: str) -> None:
    """Return when a read waits and `status --waiting` says one of these words."""

    def seen() -> bool:
        assert not reader.done(), reader.result()
        return any(word in read["trouble"] for read in host.status()["waiting"] for word in said)

    wait_for(f"a read waits for {' or '.join(said)}", seen)


TROUBLE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "reset in the body": ({"reset_at": 5000}, ("cut the connection short", "reset")),
    "truncated body": ({"truncate_at": 5000}, ("cut the connection short", "ended", "bytes")),
    "wrong bytes": ({"corrupt_at": 5000}, ("hash", "digest", "wrong")),
    "416": ({"status": 416, "body": b""}, ("has no byte",)),
    "401": ({"status": 401}, ("needs credentials", "401")),
    "403": ({"status": 403}, ("403",)),
    "404": ({"status": 404}, ("has no blob",)),
    "429": ({"status": 429, "retry_after": "0"}, ("429",)),
    "503": ({"status": 503, "retry_after": "0"}, ("503",)),
    "hang": ({"hang": True}, ("no bytes came yet",)),
    "hang in the body": ({"hang_at": 5000}, ("no bytes came yet",)),
    "no answer": ({"drop": True}, ("cut the connection short",)),
    "redirect in a circle": ({"redirect": lambda path: path}, ("redirects more than",)),
}


@pytest.mark.parametrize("what", TROUBLE)
def test_trouble_is_waited_out(host: Host, server: FaultServer, image: LazyImage, what: str) -> None:
    fault, said = TROUBLE[what]
    with mounted(host, image) as tree:
        server.faults.add("GET", image.blob, **fault)
        with reading(tree, image) as reader:
            waits(host, reader, *said)
            server.faults.clear()
            assert reader.result(30)
    assert not [line for line in log_lines(host, "read failed") if line["image"] == image.reference]


@pytest.mark.parametrize("fault", [{"ignore_range": True}, {"drip": (30_000, 0.01)}], ids=["200 to a range", "drip"])
def test_what_is_no_trouble(host: Host, server: FaultServer, image: LazyImage, fault: dict[str, Any]) -> None:
    with mounted(host, image) as tree:
        server.faults.add("GET", image.blob, **fault)
        with reading(tree, image) as reader:
            assert reader.result(30)


def test_connection_refused(host: Host) -> None:
    with FaultServer() as server:
        image = serve(server, "app", next(_seeds))
        server.faults.add("HEAD", "", headers={"Connection": "close"})
        index = image.index(host.indexes / "refused.clip")
        blobs, port = server.blobs, int(server.host.rpartition(":")[2])
        with mounted(host, image, index) as tree:
            server.__exit__(None, None, None)
            with reading(tree, image) as reader:
                waits(host, reader, "refused")
                with FaultServer(port=port) as again:
                    again.blobs = blobs
                    assert reader.result(30)


def test_presigned_addresses_that_expire(host: Host, server: FaultServer, image: LazyImage) -> None:
    """A registry that redirects to storage: the signature is refused after a while, and a new one is got."""
    signatures = iter(range(100))
    server.serve("/storage/layer", server.blobs[image.blob])
    server.faults.add("GET", image.blob, redirect=lambda _: f"{server.url}/storage/layer?sig={next(signatures)}")
    with mounted(host, image) as tree:
        with (tree / FILES[0]).open("rb") as file:
            file.read(4096)
        assert server.count("GET", "sig=0") >= 1
        server.faults.add("GET", r"sig=[012]$", status=403, body=b"<Error><Code>AccessDenied</Code></Error>")
        with reading(tree, image) as reader:
            assert reader.result(30)


def test_wrong_bytes_of_a_mirror() -> None:
    """They are fetched from the registry instead; nobody sees them, nobody waits."""
    with FaultServer() as mirror, FaultServer() as server, Host() as host:
        seed = next(_seeds)
        image = serve(server, "app", seed)
        serve(mirror, "app", seed)
        mirror.faults.add("GET", image.blob, corrupt_at=5000)
        (host.base / "config.yaml").write_text(json.dumps({"registries": {server.host: {"mirrors": [mirror.host]}}}))
        host.start_daemon()
        with mounted(host, image) as tree, reading(tree, image) as reader:
            assert reader.result(30)
        assert mirror.count("GET", image.blob) >= 1
        assert server.count("GET", image.blob) >= 1


def test_a_certificate_that_is_not_trusted(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        make_certificates(tmp_path / name, "IP:127.0.0.1")
    ca = tmp_path / "ca.crt"
    shutil.copy(tmp_path / "ours" / "ca.crt", ca)
    with FaultServer(tls=tmp_path / "ours") as server, Host() as host:
        image = serve(server, "app", next(_seeds))
        (host.base / "config.yaml").write_text(json.dumps({"registries": {server.host: {"ca": str(ca)}}}))
        index = host.index(image.reference, "app")
        host.start_daemon()
        with mounted(host, image, index) as tree:
            shutil.copy(tmp_path / "theirs" / "ca.crt", ca)
            with reading(tree, image) as reader:
                waits(host, reader, "is not trusted")
                shutil.copy(tmp_path / "ours" / "ca.crt", ca)
                assert reader.result(30)


NAME = "registry.clip-shim.test"


def test_a_name_that_cannot_be_resolved() -> None:
    with FaultServer() as server, Host("shared") as host:
        hosts = host.base / "hosts"
        hosts.write_text(f"127.0.0.1 localhost {NAME}\n")
        host.run("mount", "--bind", hosts, "/etc/hosts")
        where = server.host.replace("127.0.0.1", NAME)
        (host.base / "config.yaml").write_text(json.dumps({"registries": {where: {"plain_http": True}}}))
        host.trust_registry(NAME)
        image = serve(server, "app", next(_seeds))
        server.faults.add("HEAD", "", headers={"Connection": "close"})
        index = codec.read_index(image.index(host.indexes / "app.clip"))
        index.image = index.image.replace(server.host, where)
        codec.write_index(host.indexes / "app.clip", index)
        host.start_daemon()
        with mounted(host, image, host.indexes / "app.clip") as tree:
            hosts.write_text("127.0.0.1 localhost\n")
            with reading(tree, image) as reader:
                waits(host, reader, "cannot be resolved")
                hosts.write_text(f"127.0.0.1 localhost {NAME}\n")
                assert reader.result(30)
        host.run("umount", "/etc/hosts")
