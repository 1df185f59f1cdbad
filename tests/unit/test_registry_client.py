"""The client against a real registry: resolving, whole blobs, ranges, counters."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.errors import IntegrityError, NotFoundError, RegistryError
from shim.registry.client import RegistryClient
from shim.registry.ref import ImageRef
from tests.support.registry import OCI, Registry, World, gzip_of, make_client, sha256, tar_of

LAYER = gzip_of(tar_of({"etc/motd": b"hello\n"}))
BIG = random.Random(7).randbytes(3 << 20)


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as running:
        yield running


@pytest.fixture
def client(tmp_path: Path) -> Iterator[RegistryClient]:
    made = make_client(tmp_path)
    yield made
    made.close()


def test_resolve_an_image(registry: Registry, client: RegistryClient) -> None:
    digest = registry.push_image("one/two", "v1", [LAYER, BIG], diff_ids=["sha256:" + "0" * 64] * 2)
    ref = ImageRef.parse(registry.ref("one/two", "v1"))
    image = client.resolve(ref, "linux/amd64")
    assert image.digest == digest == sha256(image.raw)
    assert image.index_digest is None
    assert image.media_type == OCI + "manifest.v1+json"
    assert [(layer.digest, layer.size) for layer in image.layers] == [
        (sha256(LAYER), len(LAYER)),
        (sha256(BIG), len(BIG)),
    ]
    assert image.platform == "linux/amd64"
    assert sha256(image.config_raw) == image.config.digest
    assert json.loads(image.config_raw)["rootfs"]["type"] == "layers"
    assert client.resolve(ref.with_digest(digest)).digest == digest
    assert client.blob(ref, image.config) == client.blob(ref, image.config.digest) == image.config_raw


def test_resolve_what_skopeo_pushed_as_docker_schema_2(
    registry: Registry, client: RegistryClient, tmp_path: Path
) -> None:
    blobs = tmp_path / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes) -> dict[str, object]:
        (blobs / sha256(data)[7:]).write_bytes(data)
        return {"digest": sha256(data), "size": len(data)}

    plain = tar_of({"a": b"b"})
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [sha256(plain)]}}
    manifest = {
        "schemaVersion": 2,
        "config": {"mediaType": OCI + "config.v1+json", **put(json.dumps(config).encode())},
        "layers": [{"mediaType": OCI + "layer.v1.tar+gzip", **put(gzip_of(plain))}],
    }
    top = {"mediaType": OCI + "manifest.v1+json", **put(json.dumps(manifest).encode())}
    (tmp_path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    (tmp_path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    registry.push_layout(tmp_path, "by/skopeo", "oci")
    ref = ImageRef.parse(registry.ref("by/skopeo", "oci"))
    assert client.resolve(ref).layers[0].digest == sha256(gzip_of(plain))  # no mediaType inside this manifest
    source, target = (f"docker://{registry.ref('by/skopeo', tag)}" for tag in ("oci", "docker"))
    flags = ["--insecure-policy", "--src-tls-verify=false", "--dest-tls-verify=false", "--format=v2s2"]
    subprocess.run(["skopeo", "copy", "-q", *flags, source, target], check=True, capture_output=True)
    image = client.resolve(ImageRef.parse(registry.ref("by/skopeo", "docker")))
    assert image.media_type == "application/vnd.docker.distribution.manifest.v2+json"
    assert image.layers[0].digest == sha256(gzip_of(plain))


def test_resolve_chooses_from_an_index(registry: Registry, client: RegistryClient) -> None:
    digests = {
        name: registry.push_image("multi", "", [gzip_of(tar_of({name: b""}))], platform=name)
        for name in ("linux/arm64", "linux/amd64", "linux/arm/v6")
    }
    attestation = registry.push_image("multi", "", [LAYER], platform="unknown/unknown")
    size = len(registry.get(f"/v2/multi/manifests/{attestation}")[1])
    entry = {
        "mediaType": OCI + "manifest.v1+json",
        "digest": attestation,
        "size": size,
        "platform": {"os": "unknown", "architecture": "unknown"},
    }
    index = registry.push_index("multi", "v1", digests, extra=[entry])
    ref = ImageRef.parse(registry.ref("multi", "v1"))
    for wanted, platform in (
        ("linux/amd64", "linux/amd64"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/arm/v7", "linux/arm/v6"),
    ):
        image = client.resolve(ref, wanted)
        assert (image.digest, image.platform, image.index_digest) == (digests[platform], platform, index)
    with pytest.raises(NotFoundError, match="no image for linux/s390x") as caught:
        client.resolve(ref, "linux/s390x")
    assert "linux/amd64, linux/arm/v6, linux/arm64" in (caught.value.hint or "")
    assert "unknown" not in (caught.value.hint or "")
    # an entry that states no platform is looked into; an index inside an index too
    size = len(registry.get(f"/v2/multi/manifests/{digests['linux/arm64']}")[1])
    bare = {"mediaType": OCI + "manifest.v1+json", "digest": digests["linux/arm64"], "size": size}
    inner = registry.push_index("multi", "inner", {}, extra=[bare])
    size = len(registry.get(f"/v2/multi/manifests/{inner}")[1])
    nested = {"mediaType": OCI + "index.v1+json", "digest": inner, "size": size}
    outer = registry.push_index("multi", "outer", {"linux/amd64": digests["linux/amd64"]}, extra=[nested])
    image = client.resolve(ImageRef.parse(registry.ref("multi", "outer")), "linux/arm64")
    assert (image.digest, image.index_digest) == (digests["linux/arm64"], outer)


def test_resolve_a_single_image_for_another_platform(registry: Registry, tmp_path: Path) -> None:
    registry.push_image("foreign", "v1", [LAYER], platform="linux/s390x")
    ref = ImageRef.parse(registry.ref("foreign", "v1"))
    world = World()
    client = make_client(tmp_path, hooks=world)
    assert client.resolve(ref).platform == "linux/s390x"
    assert "is for linux/s390x" in world.warnings[0]
    with pytest.raises(NotFoundError, match="no image for linux/arm64"):
        client.resolve(ref, "linux/arm64")


def test_what_is_not_there(registry: Registry, client: RegistryClient) -> None:
    registry.push_image("there", "v1", [LAYER])
    for ref in (registry.ref("there", "v2"), registry.ref("nowhere", "v1"), registry.host + "/there@" + sha256(b"x")):
        with pytest.raises(NotFoundError, match=registry.host) as caught:
            client.resolve(ImageRef.parse(ref))
        assert caught.value.status == 404
        assert not caught.value.retryable
    ref = ImageRef.parse(registry.ref("there", "v1"))
    with pytest.raises(NotFoundError):
        client.open_blob(ref, sha256(b"x"), 0, 1)
    with pytest.raises(NotFoundError):
        client.check_access(ref, sha256(b"x"))
    client.check_access(ref, sha256(LAYER))


def test_ranges(registry: Registry, client: RegistryClient) -> None:
    registry.push_blob("ranges", BIG)
    ref, digest, size = ImageRef.parse(registry.ref("ranges")), sha256(BIG), len(BIG)
    chance = random.Random(3)
    ranges = [(0, None), (0, size), (0, 0), (5, 5), (0, 1), (size - 1, size), (size - 1, None), (17, None)]
    ranges += [tuple(sorted((chance.randrange(size), chance.randrange(size)))) for _ in range(30)]
    for start, end in ranges:
        with client.open_blob(ref, digest, start, end) as stream:
            assert b"".join(stream) == BIG[start:end]
            assert stream.position == (size if end is None else end)
    for start, end in ((0, size + 1), (size, size + 1), (size + 5, None)):
        with pytest.raises(RegistryError, match=r"only \d+ bytes long|has no byte|was asked for") as caught:
            b"".join(client.open_blob(ref, digest, start, end))
        assert not caught.value.retryable
    with pytest.raises(ValueError, match="not a range"):
        client.open_blob(ref, digest, 5, 4)


def test_an_abandoned_stream_does_not_harm_the_next(registry: Registry, client: RegistryClient) -> None:
    registry.push_blob("ranges", BIG)
    ref, digest = ImageRef.parse(registry.ref("ranges")), sha256(BIG)
    for _ in range(3):
        with client.open_blob(ref, digest) as stream:
            next(stream)
        assert list(stream) == []
        assert b"".join(client.open_blob(ref, digest, 100, 200)) == BIG[100:200]


def test_small_blobs_are_bounded_and_verified(registry: Registry, client: RegistryClient) -> None:
    registry.push_blob("small", BIG)
    ref = ImageRef.parse(registry.ref("small"))
    with pytest.raises(RegistryError, match="more than 1000 bytes"):
        client.blob(ref, sha256(BIG), max_bytes=1000)
    path = next(registry.storage.glob(f"**/sha256/*/{sha256(BIG)[7:]}/data"))
    damaged = bytearray(BIG)
    damaged[5] ^= 1
    os.unlink(path)
    path.write_bytes(damaged)
    with pytest.raises(IntegrityError, match="hash to"):
        client.blob(ref, sha256(BIG))
    path.write_bytes(BIG)


def test_counters(registry: Registry, client: RegistryClient) -> None:
    registry.push_image("counted", "v1", [BIG], diff_ids=["sha256:" + "0" * 64])
    ref = ImageRef.parse(registry.ref("counted", "v1"))
    image = client.resolve(ref)
    b"".join(client.open_blob(ref, sha256(BIG), 1000, 51000))
    b"".join(client.open_blob(ref, sha256(BIG), 0, 10))
    counts = client.counters.snapshot()
    assert counts[(registry.host, "blob")].requests == 2
    assert counts[(registry.host, "blob")].bytes == 50010
    assert counts[(registry.host, "manifest")].bytes == len(image.raw)
    assert client.counters.total().requests == 4
    assert client.counters.total("config", "manifest").requests == 2


def test_many_threads(registry: Registry, client: RegistryClient) -> None:
    registry.push_blob("ranges", BIG)
    ref, digest = ImageRef.parse(registry.ref("ranges")), sha256(BIG)
    wrong: list[object] = []

    def read(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(20):
            start = chance.randrange(len(BIG) - 50000)
            data = b"".join(client.open_blob(ref, digest, start, start + 50000))
            if data != BIG[start : start + 50000]:
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert client.counters.total("blob").requests == 160


def test_heavy_imports_wait_for_the_first_request() -> None:
    code = (
        "import sys; from shim.registry.client import RegistryClient; RegistryClient({});"
        "late = {'requests', 'urllib3', 'ssl', 'http.client', 'subprocess'} & set(sys.modules); assert not late, late"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_registry_that_is_gone(tmp_path: Path) -> None:
    with Registry() as registry:
        ref = ImageRef.parse(registry.ref("x", "y"))
    world = World()
    with pytest.raises(RegistryError, match="connection refused") as caught:
        make_client(tmp_path, hooks=world).resolve(ref)
    assert caught.value.retryable
    assert len(world.sleeps) == 4
    assert registry.host in str(caught.value)


def test_a_registry_that_comes_back_is_read_on(tmp_path: Path) -> None:
    with Registry() as registry:
        registry.push_blob("x", BIG)
        ref = ImageRef.parse(registry.ref("x"))
        client = make_client(tmp_path)
        assert b"".join(client.open_blob(ref, sha256(BIG), 0, 10)) == BIG[:10]
        registry.kill()
        registry.start()
        assert b"".join(client.open_blob(ref, sha256(BIG), 10, 20)) == BIG[10:20]
