"""`clip-shim convert`: from one real registry into it again, as people and scripts run it."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shim.cli.main import main
from shim.index import codec
from tests.support.ocitar import COMPRESS, DIR, LINK, SYM, Entry, tar
from tests.support.registry import Registry, sha256
from tests.support.smallimage import GROUP, PASSWD, noise, text

PIECES = ((4096, 600), (1_000_000, 1000), (3_000_000, 0))
LAYER = tar(
    [
        Entry(b"usr", DIR, 0o755),
        Entry(b"usr/tool", mode=0o4755, data=text(1, 400_000)),
        Entry(b"bin", SYM, 0o777, target=b"usr"),
        Entry(b"etc", DIR, 0o755),
        Entry(b"etc/passwd", data=PASSWD),
        Entry(b"etc/group", data=GROUP),
        Entry(b"data", DIR, 0o750, uid=7),
        Entry(b"data/noise", data=noise(1, 5_000_001)),
        Entry(b"data/text", data=text(2, 5_000_003)),
        Entry(b"data/again", LINK, target=b"data/text"),
        Entry(b"data/empty"),
        Entry(b"data/sparse", sparse=(3_000_000, PIECES), data=noise(8, 1600)),
        Entry(b"www", DIR, 0o755),
        Entry(b"www/page", data=b"hello"),
    ]
)
UPPER = tar([Entry(b"data/upper", data=noise(2, 3_000_000)), Entry(b"data/.wh.empty")])
CONFIG = {
    "created": "2024-01-02T03:04:05Z",
    "author": "somebody",
    "config": {
        "Env": ["PATH=/usr"],
        "User": "user",
        "Volumes": {"/data/": {}},
        "Healthcheck": {"Test": ["CMD", "/usr/tool"], "Interval": 1000000000},
        "OnBuild": ["RUN x"],
        "Labels": {"größe": "1"},
    },
    "history": [{"created_by": "ADD"}, {"created_by": "ENV", "empty_layer": True}, {"created_by": "COPY"}],
    "unknown": [1, {"x": None}],
}
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER = "application/vnd.docker."


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as running:
        layers = [gzip.compress(LAYER, 6, mtime=0), gzip.compress(UPPER, 1, mtime=0)]
        running.push_image("app", "1.0", layers, config=CONFIG)
        yield running


class Clip:
    """The command line, in this process: `done` gives (what it printed, what it complained about)."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def done(self, *args: str, code: int = 0) -> tuple[str, str]:
        actual = main([*args])
        out, err = self._capsys.readouterr()
        assert actual == code, (args, actual, out, err)
        return out, err

    def convert(self, *args: str) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self.done("convert", *args, "--json")[0])
        return facts


@pytest.fixture
def clip(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clip:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLIP_SHIM_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return Clip(capsys)


def pulled(registry: Registry, name: str, reference: str) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """(manifest, config, tar of the only layer) of an image, digests checked."""
    manifest = json.loads(registry.get(f"/v2/{name}/manifests/{reference}", name)[1])
    (layer,) = manifest["layers"]
    blobs = []
    for item in (manifest["config"], layer):
        data = registry.get(f"/v2/{name}/blobs/{item['digest']}", name)[1]
        assert (sha256(data), len(data)) == (item["digest"], item["size"])
        blobs.append(data)
    plain = gzip.decompress(blobs[1])
    config = json.loads(blobs[0])
    assert config["rootfs"] == {"type": "layers", "diff_ids": [sha256(plain)]}
    return manifest, config, plain


def content(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = [member for member in archive if member.isfile() or member.islnk()]
        return {member.name: archive.extractfile(member).read() for member in files}  # type: ignore[union-attr]


def sparse() -> bytes:
    whole, data = bytearray(3_000_000), noise(8, 1600)
    whole[4096:4696], whole[1_000_000:1_001_000] = data[:600], data[600:]
    return bytes(whole)


WANTED = {
    "etc/passwd": PASSWD,
    "etc/group": GROUP,
    "data/noise": noise(1, 5_000_001),
    "data/text": text(2, 5_000_003),
    "data/again": text(2, 5_000_003),
    "data/sparse": sparse(),
}


def test_pushes_index_skeleton_and_content(registry: Registry, clip: Clip) -> None:
    facts = clip.convert(registry.ref("app", "1.0"), registry.ref("thin/app", "a"))
    assert list(facts) == ["image", "thin", "digest", "images", "seconds"]
    (image,) = facts["images"]
    assert list(image) == [
        *("image", "digest", "platform", "layers", "entries", "image_bytes", "index_bytes", "seek_points"),
        *("thin_digest", "thin_bytes", "skeleton_entries", "content_bytes"),
    ]
    manifest, config, data = pulled(registry, "thin/app", "a")
    found = content(data)
    index = codec.decode(found.pop(".clip/index.clip"))
    assert (index.image, index.digest) == (facts["image"], image["digest"])
    assert found == WANTED | {"data/upper": noise(2, 3_000_000)}
    assert image["content_bytes"] == sum(map(len, found.values())) - len(found["data/again"])
    assert image["thin_bytes"] == manifest["layers"][0]["size"]
    assert facts["digest"] == image["thin_digest"] == sha256(registry.get("/v2/thin/app/manifests/a", "thin/app")[1])
    kept = {"rootfs", "history"}
    original = json.loads(index.config)
    assert {k: v for k, v in config.items() if k not in kept} == {k: v for k, v in original.items() if k not in kept}
    assert [step.get("empty_layer", False) for step in config["history"]] == [True, True, True, False]
    assert config["history"][-1]["created_by"] == f"clip-shim convert {index.image}@{index.digest}"


def test_same_input_same_digest(registry: Registry, clip: Clip) -> None:
    thin = registry.ref("thin/app", "b")
    said = clip.done("convert", registry.ref("app", "1.0"), thin)[0].splitlines()
    again = clip.convert(registry.ref("app", "1.0"), registry.ref("other", "c"))
    assert said[1].startswith(f"{thin}@{again['digest']}: run it with docker run --runtime=clip")
    assert said[0].startswith(f"{registry.ref('app', '1.0')} linux/amd64: 15 entries, ")


@pytest.mark.parametrize("kind", [kind for kind in COMPRESS if kind != "gzip"])
def test_content_of_layers_of_every_kind(registry: Registry, clip: Clip, kind: str) -> None:
    compress, media_type = COMPRESS[kind]
    registry.push_image(kind, "1", [compress(LAYER)], config=CONFIG, diff_ids=[sha256(LAYER)], layer_type=media_type)
    clip.convert(registry.ref(kind, "1"), registry.ref(kind, "thin"), "--volume=/www")
    found = content(pulled(registry, kind, "thin")[2])
    assert {k: v for k, v in found.items() if k[0] != "."} == WANTED | {"data/empty": b"", "www/page": b"hello"}


def test_an_image_without_layers(registry: Registry, clip: Clip) -> None:
    registry.push_image("nothing", "1", [])
    clip.convert(registry.ref("nothing", "1"), registry.ref("nothing", "thin"))
    assert list(content(pulled(registry, "nothing", "thin")[2])) == [".clip/index.clip"]


def test_dockers_own_types_stay(registry: Registry, clip: Clip) -> None:
    """Its config may hold what OCI's does not know, such as HEALTHCHECK: engines look at the type."""
    raw = json.loads(registry.get("/v2/app/manifests/1.0", "app")[1])
    raw["mediaType"] = DOCKER + "distribution.manifest.v2+json"
    raw["config"]["mediaType"] = DOCKER + "container.image.v1+json"
    for layer in raw["layers"]:
        layer["mediaType"] = DOCKER + "image.rootfs.diff.tar.gzip"
    registry.push_manifest("app", "docker", raw, raw["mediaType"])
    clip.convert(registry.ref("app", "docker"), registry.ref("app", "docker-thin"))
    manifest = pulled(registry, "app", "docker-thin")[0]
    assert manifest["mediaType"] == raw["mediaType"]
    assert manifest["config"]["mediaType"] == raw["config"]["mediaType"]
    assert manifest["layers"][0]["mediaType"] == raw["layers"][0]["mediaType"]


def test_several_platforms(registry: Registry, clip: Clip) -> None:
    platforms = ("linux/amd64", "linux/arm64", "linux/arm/v7", "windows/amd64")
    layers = {p: gzip.compress(tar([Entry(b"etc", DIR), Entry(b"etc/passwd", data=p.encode())])) for p in platforms}
    registry.push_index("multi", "1", {p: registry.push_image("multi", "", [layers[p]], platform=p) for p in platforms})
    ref = registry.ref("multi", "1")
    assert len(clip.convert(ref, registry.ref("multi", "one"), "--platform=linux/arm64")["images"]) == 1
    assert content(pulled(registry, "multi", "one")[2])["etc/passwd"] == b"linux/arm64"
    for choice, wanted in (("linux/arm/v7,linux/amd64", ["linux/arm/v7", "linux/amd64"]), ("all", list(platforms[:3]))):
        facts = clip.convert(ref, registry.ref("multi", "many"), "--platform", choice)
        assert [image["platform"] for image in facts["images"]] == wanted
        index = json.loads(registry.get("/v2/multi/manifests/many", "multi")[1])
        for entry, name in zip(index["manifests"], wanted, strict=True):
            parts = (entry["platform"]["os"], entry["platform"]["architecture"], entry["platform"].get("variant"))
            assert "/".join(filter(None, parts)) == name
            assert content(pulled(registry, "multi", entry["digest"])[2])["etc/passwd"] == name.encode()


def test_an_index_that_is_there_is_taken_with_its_profile(registry: Registry, clip: Clip, tmp_path: Path) -> None:
    ref, path = registry.ref("app", "1.0"), tmp_path / "app.clip"
    clip.done("index", ref, "-o", str(path))
    codec.write_index(path, replace(codec.read_index(path), profile=((0, 1), (1, 0))))
    before = registry.ref("thin/app", "without")
    plain = clip.convert(ref, before)
    given = clip.convert(ref, registry.ref("thin/app", "given"), "--index", str(path))
    assert plain["digest"] != given["digest"]
    found = content(pulled(registry, "thin/app", "given")[2])
    assert found.pop(".clip/index.clip") == path.read_bytes()
    plainly = content(pulled(registry, "thin/app", "without")[2])
    del plainly[".clip/index.clip"]
    assert found == plainly
    registry.push_manifest("app", "same", registry.get("/v2/app/manifests/1.0", "app")[1], OCI_MANIFEST)
    clip.convert(registry.ref("app", "same"), registry.ref("thin/app", "same"), "--index", str(path))
    index = codec.decode(content(pulled(registry, "thin/app", "same")[2])[".clip/index.clip"])
    assert (index.image, index.profile) == (registry.ref("app", "same"), ((0, 1), (1, 0)))
    registry.push_image("app", "changed", [gzip.compress(LAYER)], config=CONFIG)
    for args, said in (
        ([registry.ref("app", "changed"), before, "--index", str(path)], "the index is of"),
        ([ref, before, "--index", str(path), "--platform", "all"], "one index is of one platform"),
    ):
        assert said in clip.done("convert", *args, code=2)[1]
    assert "x.clip" in clip.done("convert", ref, before, "--index", "x.clip", code=1)[1]


def test_refused_with_a_reason_and_nothing_pushed(registry: Registry, clip: Clip) -> None:
    ref, thin = registry.ref("app", "1.0"), registry.ref("refused", "x")
    clip.convert(ref, registry.ref("was", "thin"))
    registry.push_image("root", "v", [gzip.compress(LAYER)], config={"config": {"Volumes": {"/data/..": {}}}})
    for args, code, said in (
        ([ref, ref], 2, "its tag would be lost"),
        ([ref, f"{registry.host}/app@sha256:{'0' * 64}"], 2, "under a tag"),
        ([ref, thin, "--max-volume-mib", "1"], 2, "most of it at /data"),
        ([ref, thin, "--max-volume-mib", "-1"], 2, "negative"),
        ([ref, thin, "--volume", "www"], 2, "begins with /"),
        ([ref, thin, "--platform", "linux/s390x"], 1, "linux/s390x"),
        ([ref, "./thin"], 2, "local path"),
        ([ref, "127.0.0.1:1/x:y"], 1, "127.0.0.1:1"),
        ([registry.ref("was", "thin"), thin], 1, "is a thin image"),
        ([registry.ref("root", "v"), thin], 2, "its whole root as a volume"),
        ([registry.ref("none", "x"), thin], 1, "manifest"),
    ):
        out, err = clip.done("convert", *args, code=code)
        assert out == ""
        assert err.startswith("error: "), err
        assert said in err.splitlines()[0], err
        assert "\nhint: " in err
    assert "is a thin image" in clip.done("index", registry.ref("was", "thin"), "-o", "thin.clip", code=1)[1]
    assert not Path("thin.clip").exists()
    assert registry.get("/v2/refused/tags/list", "refused")[0] == 404
