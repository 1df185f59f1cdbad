"""Archives: made of an image or a directory, they mount, from a file and from S3, and unpack, as the image does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from fastcrc import crc64

from shim.goclip import files, write
from shim.index import container
from tests.support import expected, images
from tests.support.compare import compare, report
from tests.support.host import Host
from tests.support.registry import Registry
from tests.support.s3 import S3


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as registry:
        for name in ("small", "odd"):
            images.push(images.image(name), registry.host)
        yield registry


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with S3() as server:
        yield server


@pytest.fixture(scope="module", params=["auto", "fuse"])
def host(request: pytest.FixtureRequest, registry: Registry, s3: S3) -> Iterator[Host]:
    with Host(settings={"CLIP_SHIM_TREE": request.param}) as host:
        host.trust_registry(registry.host)
        host.env |= s3.env
        config = {"stores": {"s3": {s3.bucket: s3.options}}, "trust": {"stores": [f"s3://{s3.bucket}/"]}}
        (host.base / "config.yaml").write_text(json.dumps(config))
        host.start_daemon()
        yield host


GO = Path(__file__).parents[1] / "assets" / "goclip"
EXPECTED = {
    row_path: (row["sha256"] if row["type"] == "file" else row["target"])
    for row_path, row in json.loads((GO / "expected.json").read_text()).items()
    if not row_path.startswith("/usr/lib/big")
}


def content(root: Path) -> dict[str, str]:
    """Path → SHA-256 of a file, target of a symlink, "" for a directory."""
    found = {}
    for path in (root, *root.rglob("*")):
        name = "/" + str(path.relative_to(root)).removeprefix(".")
        if path.is_symlink():
            found[name] = str(path.readlink())
        else:
            found[name] = sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return found


def nodes_of(name: str) -> bytes:
    """The gob of a Go clip file's nodes."""
    data = (GO / name).read_bytes()
    header = files.read_header(lambda at, length: data[at : at + length], len(data))
    return data[header.index : header.index + header.index_length]


def fetched(host: Host) -> int:
    """Bytes that were fetched for the layers of what is mounted."""
    status = host.status()
    layers = {layer for image in status["images"] if image["leases"] for layer in image["layers"]}
    return sum(layer["fetched_bytes"] for layer in status["layers"] if layer["diff_id"] in layers)


@contextmanager
def mounted(host: Host, what: Path | str) -> Iterator[Path]:
    where = host.base / "mnt"
    where.mkdir()
    host.clip("mount", what, where)
    try:
        yield where
    finally:
        host.clip("umount", where)
        where.rmdir()


def check(name: str, root: Path) -> None:
    image = images.image(name)
    found = compare(expected.tree(image), root, unset=expected.unset(image))
    assert not found, report(found)


def archive(host: Host, registry: Registry, name: str, *more: str) -> Path:
    file = host.base / f"{name}.clip"
    if not file.exists():
        host.clip("archive", f"{registry.host}/{name}:latest", "-o", file, *more)
    return file


@pytest.mark.parametrize("name", ["small", "odd"])
def test_an_archive_mounts_and_unpacks(host: Host, registry: Registry, name: str) -> None:
    file = archive(host, registry, name)
    with mounted(host, file) as root:
        check(name, root)
    out = host.base / f"{name}-out"
    host.clip("extract", file, out)
    check(name, out)


def test_of_a_directory(host: Host, registry: Registry) -> None:
    source = expected.tree(images.image("small"))
    file = host.base / "rootfs.clip"
    host.clip("archive", "--rootfs", source, "-o", file)
    with mounted(host, file) as root:
        found = compare(source, root)
        assert not found, report(found)


def test_from_s3_by_ranges(host: Host, registry: Registry, s3: S3) -> None:
    """The small file that `--push` writes, and the archive's own URL: both lead to the object, and only what is read
    is fetched."""
    file = host.base / "pushed.clip"
    url = f"s3://{s3.bucket}/archives/small.clip"
    done = host.clip("archive", f"{registry.host}/small:latest", "-o", file, "--push", url, "--json")
    made = json.loads(done.stdout)
    assert (made["url"], made["pointer"]) == (url, str(file.with_suffix(".rclip")))
    size = file.stat().st_size
    file.unlink()
    assert file.with_suffix(".rclip").stat().st_size < size / 100
    with mounted(host, file.with_suffix(".rclip")) as root:
        assert (root / "etc" / "passwd").exists()
        assert fetched(host) < size / 2
        check("small", root)


def test_a_new_daemon_finds_the_archive(host: Host, registry: Registry) -> None:
    """The daemon is killed under a mounted archive: its successor opens the file where it was."""
    file = host.base / "kill.clip"
    host.clip("archive", "--rootfs", expected.tree(images.image("odd")), "-o", file)
    with mounted(host, file) as root:
        os.kill(host.status()["daemon"]["pid"], signal.SIGKILL)
        found = compare(expected.tree(images.image("odd")), root)
        assert not found, report(found)


def test_cached_data_are_not_for_who_has_only_the_index(host: Host, registry: Registry) -> None:
    """A file that ends in the index of an archive whose data are cached, but has other data."""
    file = archive(host, registry, "small")
    with mounted(host, file) as root:
        check("small", root)
    data = file.read_bytes()
    start = container.start_of_part(lambda at, length: data[at : at + length], len(data))
    forged = host.base / "forged.clip"
    forged.write_bytes(data[:54] + b"\xff" * (start - 54) + data[start:])  # unlike zeros, no span is that
    (host.base / "mnt4").mkdir(exist_ok=True)
    done = host.clip("mount", forged, host.base / "mnt4", check=False)
    assert done.returncode == 1
    assert "does not have the data" in done.stderr


def test_go_clips_archive(host: Host) -> None:
    """A file of Go's own making: indexed once, its CRCs compared, read where it lies."""
    file = host.base / "foreign.clip"
    shutil.copy(GO / "v1-local.clip", file)
    with mounted(host, file) as root:
        assert content(root) == EXPECTED
    out = host.base / "foreign-out"
    host.clip("extract", file, out)
    assert content(out) == EXPECTED
    assert [path.name for path in (host.base / "state/indexes/archives").iterdir()]


def test_a_forged_copy_harms_nobody(host: Host) -> None:
    """Its index is that of the real archive, byte for byte, and its CRCs are right: only the data are others."""
    data = bytearray((GO / "v1-local.clip").read_bytes())
    clip = files.read(lambda at, length: bytes(data[at : at + length]), len(data))
    node = max((node for node in clip.nodes if node.kind == "file"), key=lambda node: node.size)
    end = node.data + node.size
    data[node.data : end] = bytes(byte ^ 1 for byte in data[node.data : end])
    data[end : end + 8] = crc64.go_iso(bytes(data[node.data : end])).to_bytes(8, "big")
    forged, real = host.base / "forged.clip", host.base / "real.clip"
    forged.write_bytes(data)
    shutil.copy(GO / "v1-local.clip", real)
    with mounted(host, forged) as root:
        assert content(root) != EXPECTED
    with mounted(host, real) as root:
        assert content(root) == EXPECTED


def test_go_clips_archive_in_s3(host: Host, s3: S3) -> None:
    """Go's pointer to an archive in S3: read once, into the cache."""
    s3.client().upload_file(str(GO / "v1-local.clip"), s3.bucket, "go/v1-local.clip")
    with open(host.base / "archive.rclip", "wb") as out:
        place = files.S3Place(s3.bucket, "go/v1-local.clip", "us-east-1", s3.endpoint, True)
        out.write(write.encode_pointer(nodes_of("v1-local.clip"), place))
    with mounted(host, host.base / "archive.rclip") as root:
        assert content(root) == EXPECTED
        assert fetched(host) == 0


def test_another_endpoint_is_not_followed(host: Host, s3: S3) -> None:
    place = files.S3Place(s3.bucket, "go/v1-local.clip", "us-east-1", "http://169.254.169.254", True)
    (host.base / "evil.rclip").write_bytes(write.encode_pointer(nodes_of("v1-local.clip"), place))
    (host.base / "mnt2").mkdir(exist_ok=True)
    done = host.clip("mount", host.base / "evil.rclip", host.base / "mnt2", check=False)
    assert done.returncode == 1
    assert "another S3 endpoint" in done.stderr


def test_go_clips_index(host: Host, registry: Registry) -> None:
    """A v2 index: its image is indexed afresh, with all that v2 lost, and what came by is in the cache."""
    index = host.index(f"{registry.host}/odd:latest", "odd-v2", "--format", "clip")
    data = index.read_bytes()
    foreign = host.base / "go-v2.clip"
    foreign.write_bytes(data[: container.start_of_part(lambda at, length: data[at : at + length], len(data))])
    with mounted(host, foreign) as root:
        check("odd", root)
        assert fetched(host) == 0


WORKER = """
import os, sys
from shim import api
image, file, store, where = sys.argv[1:]
api.create_archive(image_ref=image, output_path=file)
for what in (file, api.push(file, store + "by-hand.clip")):
    api.mount_archive(what, where)
    print(sorted(os.listdir(where)))
    api.unmount(where)
print(api.build(image, store).kind)
"""


def test_a_build_worker(host: Host, registry: Registry, s3: S3) -> None:
    """The Python API in a process of its own: archive, mount from the file and from S3, build to S3."""
    where = host.base / "worker"
    where.mkdir()
    arguments = [f"{registry.host}/small:latest", host.base / "worker.clip", f"s3://{s3.bucket}/worker/", where]
    done = host.output(sys.executable, "-c", WORKER, *arguments)
    from_file, from_s3, kind = done.splitlines()
    assert from_file == from_s3 == str(sorted(path.name for path in expected.tree(images.image("small")).iterdir()))
    assert kind == "index"
    assert list(where.iterdir()) == []


def test_damage_is_found(host: Host, registry: Registry) -> None:
    file = archive(host, registry, "odd")
    data = bytearray(file.read_bytes())
    at = data.index(b"root:x:0:0") if b"root:x:0:0" in data else 600
    data[at] ^= 1
    bad = host.base / "bad.clip"
    bad.write_bytes(data)
    done = host.clip("extract", bad, host.base / "bad-out", check=False)
    assert done.returncode == 1
    assert "CRC-64 is wrong" in done.stderr
