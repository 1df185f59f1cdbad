"""Manifests and indexes that are wrong, hostile, or simply not images."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shim.errors import IntegrityError, NotFoundError, RegistryError, ShimError
from shim.registry import manifest as manifests
from shim.registry.manifest import Document
from shim.registry.ref import ImageRef
from tests.support.faultserver import FaultServer
from tests.support.registry import OCI, World, make_client, sha256

CONFIG = json.dumps({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": []}}).encode()
LAYER = {"mediaType": OCI + "layer.v1.tar+gzip", "digest": "sha256:" + "a" * 64, "size": 5}
IMAGE: dict[str, Any] = {
    "schemaVersion": 2,
    "mediaType": OCI + "manifest.v1+json",
    "config": {"mediaType": OCI + "config.v1+json", "digest": sha256(CONFIG), "size": len(CONFIG)},
    "layers": [LAYER],
}
INDEX: dict[str, Any] = {"schemaVersion": 2, "mediaType": OCI + "index.v1+json", "manifests": []}


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as running:
        running.serve(f"/v2/x/blobs/{sha256(CONFIG)}", CONFIG)
        yield running


def put(server: FaultServer, document: object, kind: str = "", tag: str = "") -> dict[str, Any]:
    """Serve a manifest by digest and tag; its descriptor."""
    raw = document if isinstance(document, bytes) else json.dumps(document).encode()
    kind = kind or (document.get("mediaType", "") if isinstance(document, dict) else "") or OCI + "manifest.v1+json"
    for name in (sha256(raw), tag or "v1"):
        server.serve(f"/v2/x/manifests/{name}", raw, kind)
    return {"mediaType": kind, "digest": sha256(raw), "size": len(raw)}


def resolve(server: FaultServer, tmp_path: Path, platform: str | None = "linux/amd64", ref: str = ":v1") -> Any:
    return make_client(tmp_path, hooks=World()).resolve(ImageRef.parse(f"{server.host}/x{ref}"), platform)


def changed(document: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    copied = copy.deepcopy(document)
    change(copied)
    return copied


def test_the_good_one(server: FaultServer, tmp_path: Path) -> None:
    put(server, IMAGE)
    assert resolve(server, tmp_path).layers[0].size == 5


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: d.update(manifests=[]), "ambiguous"),
        (lambda d: d.update(schemaVersion=1), "schema 1"),
        (lambda d: d.update(fsLayers=[]), "schema 1"),
        (lambda d: d.update(mediaType=5), "ambiguous"),
        (lambda d: d.update(mediaType=OCI + "index.v1+json"), "not an image"),
        (lambda d: d.update(mediaType="application/x"), "not an image"),
        (lambda d: d.pop("layers"), "not an image"),
        (lambda d: d.update(layers={}), "list of layers"),
        (lambda d: d.update(layers=[LAYER] * 2000), "list of layers"),
        (lambda d: d.update(layers=[5]), "layer 0 .* not an object"),
        (lambda d: d.update(config=None), "config .* not an object"),
        (lambda d: d["config"].update(mediaType="application/vnd.cncf.helm.config.v1+json"), "not a container image"),
        (lambda d: d["config"].update(size=-1), "valid size"),
        (lambda d: d["config"].update(size=True), "valid size"),
        (lambda d: d["config"].update(size=1e3), "valid size"),
        (lambda d: d["config"].update(size=10**30), "valid size"),
        (lambda d: d["config"].update(size=1 << 40), "more than the"),
        (lambda d: d["config"].update(digest="sha256:../../x"), "valid digest"),
        (lambda d: d["config"].update(digest=["x"]), "valid digest"),
        (lambda d: d["layers"][0].update(digest="md5:" + "a" * 32), "valid digest"),
        (lambda d: d["layers"][0].update(mediaType=None), "valid mediaType"),
        (lambda d: d["layers"][0].update(urls=["https://example.com/l"]), "foreign layer"),
    ],
)
def test_bad_manifests(
    server: FaultServer, tmp_path: Path, change: Callable[[dict[str, Any]], object], why: str
) -> None:
    put(server, changed(IMAGE, change), OCI + "manifest.v1+json")
    with pytest.raises(RegistryError, match=why) as caught:
        resolve(server, tmp_path)
    assert not caught.value.retryable
    assert caught.value.hint


@pytest.mark.parametrize("raw", [b"", b"[]", b"nonsense", b"{" * 100_000, b"[" * 100_000, b'{"a":' * 5000, b"\xff\xfe"])
def test_not_json(server: FaultServer, tmp_path: Path, raw: bytes) -> None:
    put(server, raw)
    with pytest.raises(RegistryError, match="JSON"):
        resolve(server, tmp_path)


def test_too_large(server: FaultServer, tmp_path: Path) -> None:
    put(server, json.dumps(IMAGE).encode() + b" " * manifests.MAX_MANIFEST)
    with pytest.raises(RegistryError, match="more than 4194304 bytes"):
        resolve(server, tmp_path)


def test_schema_1_by_content_type(server: FaultServer, tmp_path: Path) -> None:
    put(server, {"name": "x"}, "application/vnd.docker.distribution.manifest.v1+prettyjws; charset=utf-8")
    with pytest.raises(RegistryError, match="schema 1"):
        resolve(server, tmp_path)


@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/octet-stream"])
def test_a_server_that_does_not_know_types(server: FaultServer, tmp_path: Path, kind: str) -> None:
    bare = changed(IMAGE, lambda d: d.pop("mediaType"))
    put(server, bare, kind)
    assert resolve(server, tmp_path).media_type == OCI + "manifest.v1+json"


def test_digests_are_checked(server: FaultServer, tmp_path: Path) -> None:
    put(server, IMAGE)
    server.serve("/v2/x/manifests/sha256:" + "b" * 64, json.dumps(IMAGE).encode(), OCI + "manifest.v1+json")
    with pytest.raises(IntegrityError, match="hashes to"):
        resolve(server, tmp_path, ref="@sha256:" + "b" * 64)
    server.faults.add("GET", "manifests", headers={"Docker-Content-Digest": "sha256:" + "c" * 64}, times=1)
    with pytest.raises(IntegrityError):
        resolve(server, tmp_path)
    server.faults.add("GET", "manifests", headers={"Docker-Content-Digest": "nonsense"})
    assert resolve(server, tmp_path).digest == sha256(json.dumps(IMAGE).encode())


def test_a_config_that_is_not_what_the_manifest_says(server: FaultServer, tmp_path: Path) -> None:
    put(server, IMAGE)
    server.serve(f"/v2/x/blobs/{sha256(CONFIG)}", CONFIG.replace(b"amd64", b"arm64"))
    with pytest.raises(IntegrityError):
        resolve(server, tmp_path)
    server.serve(f"/v2/x/blobs/{sha256(CONFIG)}", CONFIG + b" ")
    with pytest.raises(RegistryError, match="more than"):
        resolve(server, tmp_path)
    del server.blobs[f"/v2/x/blobs/{sha256(CONFIG)}"]
    with pytest.raises(NotFoundError):
        resolve(server, tmp_path)


def test_indexes_in_indexes_have_an_end(server: FaultServer, tmp_path: Path) -> None:
    entry = {**put(server, IMAGE), "platform": {"os": "linux", "architecture": "amd64"}}
    for _ in range(2):
        entry = put(server, {**INDEX, "manifests": [entry]})
    assert resolve(server, tmp_path).layers, "an index in an index is fine"
    for _ in range(3):
        entry = put(server, {**INDEX, "manifests": [entry]})
    with pytest.raises(NotFoundError, match="no image for linux/amd64"):
        resolve(server, tmp_path)
    many = [put(server, {**INDEX, "annotations": {"n": str(n)}}, tag=f"t{n}") for n in range(60)]
    put(server, {**INDEX, "manifests": many})
    server.reset_counts()
    with pytest.raises(RegistryError, match="more than 24 manifests"):
        resolve(server, tmp_path)
    assert server.count() < 30
    put(server, {**INDEX, "manifests": many * 20})
    with pytest.raises(RegistryError, match="list of manifests"):
        resolve(server, tmp_path)


def test_index_entries_that_lie(server: FaultServer, tmp_path: Path) -> None:
    image = put(server, IMAGE)
    platform = {"os": "linux", "architecture": "amd64"}
    put(server, {**INDEX, "manifests": [{**image, "size": image["size"] + 1, "platform": platform}]})
    with pytest.raises(IntegrityError, match="size"):
        resolve(server, tmp_path)
    put(server, {**INDEX, "manifests": [{**image, "size": 1 << 30, "platform": platform}]})
    with pytest.raises(RegistryError, match="more than registries accept"):
        resolve(server, tmp_path)
    put(server, {**INDEX, "manifests": [{**image, "digest": "sha256:" + "d" * 64, "platform": platform}]})
    with pytest.raises(NotFoundError, match="pushed incompletely"):
        resolve(server, tmp_path)
    inner = put(server, INDEX)
    put(server, {**INDEX, "manifests": [{**inner, "mediaType": OCI + "manifest.v1+json", "platform": platform}]})
    with pytest.raises(RegistryError, match="index where an image was due"):
        resolve(server, tmp_path)
    for platform in ({"os": 5, "architecture": []}, {"os": "x" * 1000, "architecture": "y"}, [], "linux"):
        put(server, {**INDEX, "manifests": [{**image, "platform": platform}]})
        assert resolve(server, tmp_path).digest == image["digest"]  # as if it stated none: its config says


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150)
@given(
    st.sampled_from([IMAGE, {**INDEX, "manifests": [{**LAYER, "platform": {"os": "linux", "architecture": "arm"}}]}]),
    st.lists(st.integers(0, 6), min_size=1, max_size=3),
    _JSON,
)
def test_one_typed_error_whatever_comes(document: dict[str, Any], path: list[int], value: object) -> None:
    """A value anywhere in a good document is replaced; reading gives a result or a ShimError."""
    broken = copy.deepcopy(document)
    spot: Any = broken
    for step in path[:-1]:
        inner = list(spot.values() if isinstance(spot, dict) else spot)
        if not inner or not isinstance(inner[step % len(inner)], dict | list):
            break
        spot = inner[step % len(inner)]
    if spot:
        spot[list(spot)[path[-1] % len(spot)] if isinstance(spot, dict) else path[-1] % len(spot)] = value
    raw = json.dumps(broken).encode()
    said = ""
    try:
        kind = manifests.media_type_of(raw, OCI + "manifest.v1+json", "it")
        document_read = Document("sha256:" + "0" * 64, kind, raw)
        if document_read.is_index:
            manifests.parse_index(document_read, "it")
        else:
            manifests.parse_manifest(document_read, "it")
    except ShimError as error:
        said = str(error)
    assert len(said) < 1000
