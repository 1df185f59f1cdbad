"""Plan B: each step of `fallback`, reached by breaking the one before; what is logged, and what `status` says."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from shim.index import codec
from tests.support.daemonclient import Client, log_lines, trees
from tests.support.faultserver import FaultServer
from tests.support.host import Host, wait_for
from tests.support.ocitar import DIR, Entry, gzip_bytes, tar
from tests.support.registry import Registry
from tests.support.s3 import S3

LOADER = random.Random(1).randbytes(3 << 20)
REST = random.Random(2).randbytes(6 << 20)
LAYERS = [
    gzip_bytes(tar([Entry(name.encode(), DIR, 0o755) for name in ("proc", "dev", "sys", "lib", "data")])),
    gzip_bytes(tar([Entry(b"lib/ld-linux-x86-64.so.2", mode=0o755, data=LOADER)])),
    gzip_bytes(tar([Entry(b"data/rest", data=REST)])),
]
RANGED = ("Range", "bytes=")


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as registry:
        registry.push_image("app", "v1", LAYERS)
        yield registry


@pytest.fixture
def server(registry: Registry) -> Iterator[FaultServer]:
    with FaultServer(upstream=registry.host) as made:
        yield made


def make_host(server: FaultServer, fallback: str, **settings: str) -> Host:
    host = Host(settings={"CLIP_SHIM_FALLBACK": fallback, "CLIP_SHIM_LAZY_DEADLINE": "1500ms", **settings})
    host.trust_registry(server.host)
    return host


def acquire(host: Host, index: Path) -> dict[str, Any]:
    with Client(host) as client:
        answer = client.acquire(index)
        while "wait" in answer:
            answer = client.receive()
        return answer


def steps(host: Host) -> list[tuple[str, str]]:
    """(step, what went wrong) of the steps that failed."""
    return [(line["step"], line["error"]) for line in log_lines(host, "plan B: a step failed")]


def check_tree(answer: dict[str, Any]) -> None:
    """The whole of it: no byte may be asked for any more."""
    tree = Path(answer["tree"])
    assert hashlib.sha256((tree / "lib/ld-linux-x86-64.so.2").read_bytes()).digest() == hashlib.sha256(LOADER).digest()
    assert hashlib.sha256((tree / "data/rest").read_bytes()).digest() == hashlib.sha256(REST).digest()


@pytest.mark.parametrize(
    ("fault", "settings"),
    [
        ({"status": 400}, {}),
        ({"hang": True}, {}),
    ],
    ids=["ranges are refused", "ranges hang"],
)
def test_eager_when_lazy_does_not_work(server: FaultServer, fault: dict[str, Any], settings: dict[str, str]) -> None:
    """A registry that gives whole blobs only; the deadline of the lazy step is what ends it where nothing else does."""
    with make_host(server, "lazy,archive,eager", **settings) as host:
        index = host.index(f"{server.host}/app:v1", "app")
        host.start_daemon()
        server.faults.add("GET", r"/blobs/", need=RANGED, **fault)
        answer = acquire(host, index)
        assert answer["ok"], answer
        assert answer["step"] == "eager"
        (failed,) = [error for step, error in steps(host) if step == "lazy"]
        assert [step for step, _ in steps(host)] == ["lazy", "archive"]
        (taken,) = log_lines(host, "plan B: another step was taken")
        assert (taken["step"], taken["reason"]) == ("eager", failed)
        (shown,) = host.status()["images"]
        assert (shown["step"], shown["reason"]) == ("eager", failed)
        assert "eager" in host.clip("status").stdout
        server.faults.add("*", r"/", status=500)
        check_tree(answer)


@pytest.mark.parametrize("store", ["local", "s3"])
def test_archive_when_lazy_does_not_work(server: FaultServer, store: str) -> None:
    """A known archive of the image has all its bytes: the registry is not asked for one."""
    with ExitStack() as stack:
        host = stack.enter_context(make_host(server, "lazy,archive,eager"))
        index = host.index(f"{server.host}/app:v1", "app")
        url = f"{host.state_dir}/indexes/"
        if store == "s3":
            s3 = stack.enter_context(S3())
            host.env |= s3.env
            url = f"s3://{s3.bucket}/archives/"
            config = {"stores": {"lookup": [url], "s3": {s3.bucket: s3.options}}}
            (host.base / "config.yaml").write_text(json.dumps(config))
        archive = host.base / "app-archive.clip"
        host.clip("archive", f"{server.host}/app:v1", "-o", archive)
        pushed = host.clip("push", archive, url).stdout.strip()
        archive.unlink()
        assert pushed.endswith("-archive.clip")
        host.start_daemon()
        server.faults.add("GET", r"/blobs/", status=400)
        answer = acquire(host, index)
        assert answer["ok"], answer
        assert answer["step"] == "archive"
        assert [step for step, _ in steps(host)] == ["lazy"]
        (shown,) = host.status()["images"]
        assert (shown["step"], shown["reason"]) == ("archive", steps(host)[0][1])
        check_tree(answer)


def test_an_archive_goes_when_nobody_reads_from_it(server: FaultServer) -> None:
    """It was fetched whole, from beside the image."""
    with make_host(server, "lazy,archive", CLIP_SHIM_TREE_LINGER="100ms") as host:
        (host.base / "config.yaml").write_text(json.dumps({"stores": {"lookup": ["oci"]}}))
        index, archive = host.index(f"{server.host}/app:v1", "app"), host.base / "app-archive.clip"
        host.clip("archive", f"{server.host}/app:v1", "-o", archive)
        artifact = host.clip("push", archive, f"oci://{server.host}/app").stdout.strip()
        archive.unlink()
        host.start_daemon()
        for layer in codec.read_index(index).layers:
            server.faults.add("GET", f"/blobs/{layer.digest}", status=400)

        def archives() -> list[Path]:
            return list((host.state_dir / "indexes").rglob("*-archive.clip"))

        with Client(host) as client:
            answer = client.acquire(index)
            while "wait" in answer:
                answer = client.receive()
            assert (answer["ok"], answer.get("step")) == (True, "archive"), (answer, artifact)
            host.clip("cache", "clean", "--max-age", "0")
            assert len(archives()) == 1
            check_tree(answer)
        wait_for("it goes", lambda: host.clip("cache", "clean", "--max-age", "0") and not archives())
        answer = acquire(host, index)
        assert answer["step"] == "archive"
        check_tree(answer)


def test_an_index_that_is_wrong_is_made_again(server: FaultServer) -> None:
    """Its digests are not those of the layers' bytes: nobody can say which of the two is wrong but the registry."""
    with make_host(server, "lazy,eager") as host:
        index = codec.read_index(host.index(f"{server.host}/app:v1", "app"))
        for layer in index.layers:
            layer.spans.digests[:] = bytes(len(layer.spans.digests))
        wrong = host.indexes / "wrong.clip"
        codec.write_index(wrong, index)
        host.start_daemon()
        answer = acquire(host, wrong)
        assert answer["ok"], answer
        assert answer["step"] == "eager"
        assert answer["index"] != codec.index_digest(wrong.read_bytes())
        assert len(log_lines(host, "indexed")) == 1
        server.faults.add("*", r"/blobs/", status=500)
        check_tree(answer)
        again = acquire(host, wrong)
        assert (again["step"], again["index"]) == ("eager", answer["index"])
        assert len(log_lines(host, "indexed")) == 1, "the one that was made is kept"


def test_all_steps_broken_say_why(server: FaultServer) -> None:
    with make_host(server, "lazy,archive,eager") as host:
        index = host.index(f"{server.host}/app:v1", "app")
        host.start_daemon()
        server.faults.add("GET", r"/blobs/", status=404)
        answer = acquire(host, index)
        assert answer["ok"] is False
        assert "plan B failed too: eager: " in answer["error"]
        assert "404" in answer["error"] or "has no" in answer["error"]
        assert trees(host) == []


def test_only_the_steps_that_are_configured(server: FaultServer) -> None:
    with make_host(server, "lazy", CLIP_SHIM_MOUNT_DEADLINE="3s") as host:
        index = host.index(f"{server.host}/app:v1", "app")
        host.start_daemon()
        server.faults.add("GET", r"/blobs/", need=RANGED, status=400)
        answer = acquire(host, index)
        assert answer["ok"] is False
        assert "plan B" not in json.dumps(answer)
        assert steps(host) == []


def test_eager_first_fetches_all_before_the_mount(server: FaultServer) -> None:
    with make_host(server, "eager") as host:
        index = host.index(f"{server.host}/app:v1", "app")
        host.start_daemon()
        seen = server.count("GET", r"/blobs/")
        answer = acquire(host, index)
        assert (answer["ok"], answer["step"]) == (True, "eager"), answer
        assert server.count("GET", r"/blobs/") - seen == len(LAYERS), "each layer by one request"
        server.faults.add("*", r"/", status=500)
        check_tree(answer)


def test_the_deadline_of_an_eager_fetch(server: FaultServer) -> None:
    with make_host(server, "eager", CLIP_SHIM_IMAGE_DEADLINE="500ms") as host:
        index = host.index(f"{server.host}/app:v1", "app")
        host.start_daemon()
        server.faults.add("GET", r"/blobs/", drip=(200_000, 0.1))
        answer = acquire(host, index)
        assert (answer["ok"], answer.get("kind")) == (False, "DaemonError"), answer
        assert "not fetched in time" in answer["error"]
        assert trees(host) == []
