"""References that are no files: image://REF, oci://, s3://, and names from an environment variable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.support.daemonclient import Client, log_lines
from tests.support.host import Host, wait_for
from tests.support.registry import Registry
from tests.support.s3 import S3


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as registry:
        images.push(images.image("small"), registry.host)
        yield registry


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with S3() as server:
        yield server


def make_host(registry: Registry, s3: S3 | None = None, **config: Any) -> Host:
    """A host whose settings name the registry, and the S3 server and its credentials if there is one."""
    host = Host()
    host.trust_registry(registry.host)
    if s3 is not None:
        config.setdefault("stores", {})["s3"] = {s3.bucket: s3.options}
        host.env |= s3.env
    (host.base / "config.yaml").write_text(json.dumps(config))
    return host


@pytest.fixture(scope="module")
def host(registry: Registry, s3: S3) -> Iterator[Host]:
    """Looks up and stores indexes in S3."""
    prefix = f"s3://{s3.bucket}/shared/"
    with make_host(registry, s3, stores={"lookup": [prefix, "oci"], "write": [prefix]}) as made:
        made.start_daemon()
        yield made


def ask(host: Host, value: str, source: str = "annotation") -> dict[str, Any]:
    """The daemon's last word: what may come before it says how long to wait."""
    with Client(host) as client:
        answer = client.ask({"op": "acquire", "source": source, "value": value})
        while "wait" in answer:
            answer = client.receive()
        return answer


def refused(answer: dict[str, Any], kind: str, said: str) -> None:
    assert (answer["ok"], answer["kind"]) == (False, kind), answer
    assert said in answer["error"], answer


def test_twenty_at_once_make_the_index_once(host: Host, registry: Registry, s3: S3) -> None:
    value = f"image://{registry.host}/small:latest"
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: ask(host, value), range(20)))
    assert {answer.get("ok") for answer in answers} == {True}, answers
    assert len({answer["index"] for answer in answers}) == 1
    assert len(log_lines(host, "indexed")) == 1
    assert Path(answers[0]["tree"], "bin").is_dir()
    assert ask(host, value)["index"] == answers[0]["index"]
    assert len(log_lines(host, "indexed")) == 1
    assert len(s3.keys()) == 2, "by image and by its own hash"
    with make_host(registry, s3, stores={"lookup": [f"s3://{s3.bucket}/shared/"]}) as other:
        other.start_daemon()
        assert ask(other, value)["index"] == answers[0]["index"]
        assert log_lines(other, "indexed") == []


def test_the_command_waits_as_long_as_it_is_told(registry: Registry) -> None:
    with make_host(registry) as host:
        target = host.base / "mnt"
        target.mkdir()
        host.clip("mount", f"image://{registry.host}/small:latest", target)
        assert (target / "bin").is_dir()
        host.clip("umount", target)


def test_what_cannot_be_made_is_told_to_all(host: Host, registry: Registry) -> None:
    answers = [ask(host, f"image://{registry.host}/{name}") for name in ("absent:latest", "small:absent", "Bad Name")]
    assert [answer["kind"] for answer in answers] == ["NotFoundError", "NotFoundError", "ImageReferenceError"]
    refused(ask(host, "image://169.254.169.254/small:latest"), "TrustError", "169.254.169.254")


def test_an_index_by_url(host: Host, registry: Registry, s3: S3) -> None:
    """In S3 and beside the image; what a URL gave serves while it cannot be reached."""
    path = host.index(f"{registry.host}/small:latest", "x", "--checkpoint-mib", "7")
    object_ = f"s3://{s3.bucket}/shared/x.clip"
    host.clip("push", path, object_)
    artifact = host.clip("push", path, f"oci://{registry.host}/small").stdout.strip()
    with Client(host) as client:
        index = client.acquire(path)["index"]
    values = (object_, artifact, f"oci://{registry.host}/small:latest")
    assert [ask(host, value).get("index") for value in values] == [index] * 3
    host.clip("push", host.index(f"{registry.host}/small:latest", "y", "--checkpoint-mib", "9"), object_)
    changed = ask(host, object_)["index"]
    assert changed != index, "another object at the same URL"
    registry.kill()
    try:
        assert ask(host, artifact)["index"] == index
        assert log_lines(host, "what was kept is used: the index cannot be fetched") == [], "a digest never changes"
        assert ask(host, f"oci://{registry.host}/small:latest")["index"] == index
        assert ask(host, f"image://{registry.host}/small:latest")["ok"]
        assert len(log_lines(host, "what was kept is used: the index cannot be fetched")) == 1
        assert not ask(host, f"oci://{registry.host}/other:latest")["ok"]
    finally:
        registry.start()


def test_urls_lead_only_where_the_settings_say(host: Host, registry: Registry, s3: S3) -> None:
    for value in (f"s3://{s3.bucket}/sharedx/y", f"s3://{s3.bucket}/x", "s3://other/shared/x"):
        refused(ask(host, value), "TrustError", "neither `stores` nor `trust.stores`")
    refused(ask(host, f"s3://{s3.bucket}/shared/../x"), "UsageError", "key")
    refused(ask(host, f"s3://{s3.bucket}/shared/none"), "AbsentError", "no such object")
    refused(ask(host, "oci://169.254.169.254/x"), "TrustError", "169.254.169.254")
    rules = {"annotation": {"registries": [f"{registry.host}/team"], "stores": [f"s3://{s3.bucket}/"]}}
    with make_host(registry, s3, trust={"sources": rules}) as narrow:
        narrow.start_daemon()
        refused(ask(narrow, f"image://{registry.host}/small:latest"), "TrustError", registry.host)
        refused(ask(narrow, f"s3://{s3.bucket}/shared/x.clip"), "TrustError", registry.host)  # by what is in it
        refused(ask(narrow, f"s3://{s3.bucket}/shared/x.clip", "mount"), "TrustError", "neither")
        assert ask(narrow, f"image://{registry.host}/small:latest", "mount")["ok"]


def test_a_variable_leads_to_what_the_stores_have(host: Host, registry: Registry, s3: S3) -> None:
    reference = f"{registry.host}/small"
    path = host.index(f"{reference}:latest", "named")
    with Client(host) as client:
        index = client.acquire(path)["index"]
    host.clip("push", path, f"s3://{s3.bucket}/shared/team/named.clip")
    host.clip("push", path, f"{host.state_dir}/indexes/here.clip")
    digest = json.loads(host.clip("inspect", path, "--json").stdout)["digest"]
    for value in ("team/named", "team/named.clip", "here", index):
        assert ask(host, value, "env").get("index") == index, value
    assert ask(host, f"{reference}@{digest}", "env")["ok"]
    for value, kind in (
        ("absent", "AbsentError"),
        ("sha256:" + "0" * 64, "AbsentError"),
        ("sha256:00", "ImageReferenceError"),
        (f"{reference}@sha256:{'0' * 64}", "AbsentError"),
        (f"image://{reference}:latest", "TrustError"),
        (str(path), "TrustError"),
        ("../indexes/named", "TrustError"),
        (".urls/x", "TrustError"),
        ("", "TrustError"),
    ):
        refused(ask(host, value, "env"), kind, "")
    (host.state_dir / "indexes" / f"sha256-{'1' * 64}.clip").write_bytes(path.read_bytes())
    refused(ask(host, "sha256:" + "1" * 64, "env"), "IntegrityError", "under the name of")


def test_a_store_that_lies_or_is_away_is_passed_over(registry: Registry, s3: S3) -> None:
    lookup = [f"s3://{s3.bucket}/lies/", "s3://no-such-bucket/x/"]
    with make_host(registry, s3, stores={"lookup": lookup}) as host:
        name = f"{registry.host}/small"
        path = host.index(f"{name}:latest", "x")
        digest = json.loads(host.clip("inspect", path, "--json").stdout)["digest"].replace(":", "-")
        host.clip("index", f"{name}:latest", "-o", host.indexes / "other.clip")
        s3.client().put_object(Bucket=s3.bucket, Key=f"lies/{name}/{digest}.clip", Body=b"no index")
        host.start_daemon()
        assert ask(host, f"image://{name}:latest")["ok"]
        assert len(log_lines(host, "a store has something else than an index")) == 1
        assert len(log_lines(host, "indexed")) == 1


def test_indexes_that_nobody_uses_go(registry: Registry) -> None:
    """Those that the node made or fetched; not while a container runs by them, and not what people put there."""
    with make_host(registry) as host:
        host.env["CLIP_SHIM_TREE_LINGER"] = "100ms"
        name = f"{registry.host}/small"
        host.clip("push", host.index(f"{name}:latest", "x", "--checkpoint-mib", "7"), f"oci://{name}:index")
        kept = host.state_dir / "indexes"
        host.clip("push", host.index(f"{name}:latest", "y", "--checkpoint-mib", "9"), f"{kept}/")
        own = sorted(kept.rglob("*.clip"))
        assert len(own) == 2, "by image and by its own hash"
        for path in own:
            path.rename(path.with_stem(f"{path.stem}-mine"))
        own = sorted(kept.rglob("*.clip"))
        host.start_daemon()

        def files() -> list[Path]:
            return sorted(path for path in kept.rglob("*") if path.is_file())

        def clean() -> None:
            host.clip("cache", "clean", "--max-age", "0")

        with Client(host) as client:
            answer = client.ask({"op": "acquire", "source": "annotation", "value": f"image://{name}:latest"})
            while "wait" in answer:
                answer = client.receive()
            assert answer["ok"], answer
            assert ask(host, f"oci://{name}:index")["ok"]
            assert len([path for path in files() if path.parent.name == ".urls"]) == 1
            wait_for("the other tree is unmounted", lambda: len(host.status()["images"]) == 1)
            clean()
            assert len(files()) == len(own) + 2, "the image's index and its copy by its own hash"
        wait_for("the tree is unmounted", lambda: not host.status()["images"])
        clean()
        assert files() == own
        assert ask(host, f"image://{name}:latest")["ok"]
        assert len(log_lines(host, "indexed")) == 2


def test_a_killed_job_is_told_and_made_again(registry: Registry) -> None:
    """Nothing half made is ever found."""
    with make_host(registry) as host:
        host.env["CLIP_SHIM_IMAGE_DEADLINE"] = "100ms"
        daemon = host.start_daemon()
        refused(ask(host, f"image://{registry.host}/small:latest"), "DaemonError", "took longer")
        assert list((host.state_dir / "indexes").rglob("*.clip")) == []
        wait_for("the job's file is gone", lambda: not list((host.state_dir / "indexes" / ".making").iterdir()))
        assert daemon.poll() is None
