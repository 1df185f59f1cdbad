"""Which index a bundle asks for, and what is refused. Runs as root: ownership is what is checked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from shim.errors import BundleError, TrustError
from shim.runtime.bundle import Bundle
from shim.runtime.config import Config
from shim.runtime.reference import Reference, find, find_marker, open_trusted

CRI = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.container-name": "app"}


def config(tmp_path: Path, *sources: str) -> Config:
    compiled: dict[str, Any] = {
        "run_dir": str(tmp_path / "run"),
        "state_dir": str(tmp_path / "state"),
        "runtimes": [],
        "reference": {name: name in sources for name in ("annotation", "bundle", "marker", "env")},
        "trust_paths": [str(tmp_path / "trusted")],
        "mount_deadline": 30,
        "daemon_command": [],
        "launcher": "/x",
        "config_file": "/x",
        "config_stamp": None,
    }
    return Config(compiled, {})


ALL = ("annotation", "bundle", "marker", "env")


def bundle(tmp_path: Path, annotations: dict[str, str] | None = None, env: list[str] | None = None) -> Bundle:
    directory = tmp_path / "bundle"
    directory.mkdir(exist_ok=True)
    spec = {"root": {"path": "rootfs"}, "annotations": annotations or {}, "process": {"env": env or []}}
    (directory / "config.json").write_text(json.dumps(spec))
    return Bundle(str(directory))


def layer(tmp_path: Path, name: str, content: str | None = None) -> bytes:
    directory = tmp_path / name
    (directory / ".clip").mkdir(parents=True)
    if content is not None:
        (directory / ".clip" / "index.clip").write_text(content)
    return os.fsencode(directory)


def read(reference: Reference | None) -> bytes:
    assert reference is not None
    with os.fdopen(reference.fd, "rb") as file:
        return file.read()


def none() -> list[bytes]:
    return []


@pytest.fixture
def trusted(tmp_path: Path) -> Path:
    directory = tmp_path / "trusted"
    directory.mkdir(mode=0o755)
    (directory / "a.clip").write_text("index a")
    return directory


def test_nothing_is_nothing(tmp_path: Path) -> None:
    assert find(bundle(tmp_path), config(tmp_path, *ALL), none) is None
    # without markers config.json is not even decoded
    (tmp_path / "bundle" / "config.json").write_text("not json")
    assert find(Bundle(str(tmp_path / "bundle")), config(tmp_path, "annotation", "bundle", "env"), none) is None


@pytest.mark.parametrize("value", ["oci://registry.test/a:b", "image://docker.io/library/x", "s3://bucket/key"])
def test_annotation_urls_go_to_the_daemon(tmp_path: Path, value: str) -> None:
    found = find(bundle(tmp_path, {"io.clip.index": value}), config(tmp_path, *ALL), none)
    assert found is not None
    assert (found.source, found.value, found.fd) == ("annotation", value, -1)


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_annotation_path_is_opened_here(tmp_path: Path, trusted: Path, prefix: str) -> None:
    found = find(bundle(tmp_path, {"io.clip.index": f"{prefix}{trusted}/a.clip"}), config(tmp_path, *ALL), none)
    assert read(found) == b"index a"


def test_first_match_wins(tmp_path: Path, trusted: Path) -> None:
    box = bundle(tmp_path, {"io.clip.index": "oci://x/y"}, ["CLIP_INDEX=name"])
    (tmp_path / "bundle" / "index.clip").write_text("of the bundle")
    lowers = [layer(tmp_path, "l", "marker")]
    order = [("annotation", ALL), ("bundle", ALL[1:]), ("marker", ALL[2:]), ("env", ALL[3:])]
    for source, sources in order:
        found = find(box, config(tmp_path, *sources), lambda: lowers)
        assert found is not None
        assert found.source == source


def test_switched_off_sources_are_not_looked_at(tmp_path: Path) -> None:
    box = bundle(tmp_path, {"io.clip.index": "oci://x/y"}, ["CLIP_INDEX=name"])
    (tmp_path / "bundle" / "index.clip").write_text("x")
    assert find(box, config(tmp_path), none) is None


@pytest.mark.parametrize("key", ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"])
def test_sandboxes_are_skipped(tmp_path: Path, key: str) -> None:
    annotations = {"io.clip.index": "oci://x/y", key: "sandbox"}
    assert find(bundle(tmp_path, annotations), config(tmp_path, *ALL), none) is None


def test_containers_of_a_pod_have_their_own(tmp_path: Path) -> None:
    annotations = CRI | {
        "io.clip.index": "oci://x/pod",
        "io.clip.index.app": "oci://x/app",
        "io.clip.index.b": "oci://b",
    }
    found = find(bundle(tmp_path, annotations), config(tmp_path, *ALL), none)
    assert found is not None
    assert found.value == "oci://x/app"


def test_paths_from_a_pod_are_refused(tmp_path: Path, trusted: Path) -> None:
    for value in (f"{trusted}/a.clip", f"file://{trusted}/a.clip"):
        with pytest.raises(TrustError, match="never taken"):
            find(bundle(tmp_path, CRI | {"io.clip.index": value}), config(tmp_path, *ALL), none)


@pytest.mark.parametrize("value", ["name", "../x", "http://x/y", "x\n", "oci://\x00", "s3:/x", "o" * 5000, "./a.clip"])
def test_senseless_annotations(tmp_path: Path, value: str) -> None:
    with pytest.raises(BundleError) as caught:
        find(bundle(tmp_path, {"io.clip.index": value}), config(tmp_path, *ALL), none)
    assert "oci://" in caught.value.hint


def test_annotation_must_be_text(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        find(bundle(tmp_path, {"io.clip.index": 7}), config(tmp_path, *ALL), none)  # type: ignore[dict-item]


def refused(tmp_path: Path, path: Path | str) -> str:
    with pytest.raises(TrustError) as caught:
        open_trusted(str(path), [str(tmp_path / "trusted")])
    return str(caught.value)


def test_trusted_paths(tmp_path: Path, trusted: Path) -> None:
    os.close(open_trusted(f"{trusted}//a.clip", [f"{trusted}/"]))
    assert "below no directory" in refused(tmp_path, "/etc/passwd")
    assert "below no directory" in refused(tmp_path, f"{tmp_path}/trusted2/a.clip")
    assert ". or .." in refused(tmp_path, f"{trusted}/../secret")
    assert "cannot be opened" in refused(tmp_path, trusted / "missing")
    refused(tmp_path, f"{trusted}/")


def test_links_below_a_trusted_path(tmp_path: Path, trusted: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (trusted / "link").symlink_to(tmp_path / "secret")
    (trusted / "dir").symlink_to(tmp_path)
    assert "not a regular file" in refused(tmp_path, trusted / "link")
    assert "cannot be opened" in refused(tmp_path, trusted / "dir" / "secret")


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_file_that_others_can_write(tmp_path: Path, trusted: Path, mode: int) -> None:
    (trusted / "a.clip").chmod(mode)
    assert "others than root can write it" in refused(tmp_path, trusted / "a.clip")


def test_directory_that_others_can_write(tmp_path: Path, trusted: Path) -> None:
    trusted.chmod(0o777)
    assert "a directory on the way" in refused(tmp_path, trusted / "a.clip")
    trusted.chmod(0o1777)  # sticky, as /tmp: what is root's there stays root's
    os.close(open_trusted(str(trusted / "a.clip"), [str(trusted)]))


def test_owners(tmp_path: Path, trusted: Path) -> None:
    os.chown(trusted / "a.clip", 1000, 0)
    refused(tmp_path, trusted / "a.clip")
    os.chown(trusted / "a.clip", 0, 0)
    os.chown(trusted, 1000, 0)
    refused(tmp_path, trusted / "a.clip")


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "socket"])
def test_index_that_is_no_file(tmp_path: Path, trusted: Path, kind: str) -> None:
    make_odd(trusted / "odd", kind)
    assert "not a regular file" in refused(tmp_path, trusted / "odd")
    make_odd(tmp_path / "bundle" / "index.clip", kind) if bundle(tmp_path) else None
    with pytest.raises(TrustError, match="not a regular file"):
        find(bundle(tmp_path), config(tmp_path, *ALL), none)


def make_odd(path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        os.mknod(path, 0o020644, os.makedev(1, 3))
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as server:
            directory = os.open(path.parent, os.O_PATH)
            server.bind(f"/proc/self/fd/{directory}/{path.name}")
            os.close(directory)


@pytest.mark.parametrize("value", ["python-3.12", "sha256:" + "a" * 64, "team/app@sha256:" + "b" * 64])
def test_variable_with_a_name(tmp_path: Path, value: str) -> None:
    found = find(bundle(tmp_path, env=["CLIP_INDEX=old", f"CLIP_INDEX={value}"]), config(tmp_path, *ALL), none)
    assert found is not None
    assert (found.source, found.value) == ("env", value)


@pytest.mark.parametrize(
    "value", ["/etc/x", "../x", "a/../b", "file:///x", "oci://x/y", "a b", "x" * (1 << 20), "-x", "ü"]
)
def test_variable_that_leads_elsewhere(tmp_path: Path, value: str) -> None:
    with pytest.raises(TrustError):
        find(bundle(tmp_path, env=[f"CLIP_INDEX={value}"]), config(tmp_path, *ALL), none)


def test_marker_of_the_topmost_layer(tmp_path: Path) -> None:
    lowers = [
        os.fsencode(tmp_path / "gone"),
        layer(tmp_path, "empty"),
        layer(tmp_path, "a", "A"),
        layer(tmp_path, "b", "B"),
    ]
    assert read(find_marker(lowers)) == b"A"
    assert find_marker(lowers[:2]) is None


def test_marker_hidden_by_a_higher_layer(tmp_path: Path) -> None:
    below = layer(tmp_path, "below", "B")
    whiteout_dir = tmp_path / "w1"
    whiteout_dir.mkdir()
    os.mknod(whiteout_dir / ".clip", 0o020000, os.makedev(0, 0))
    assert find_marker([os.fsencode(whiteout_dir), below]) is None
    whiteout = layer(tmp_path, "w2")
    os.mknod(tmp_path / "w2" / ".clip" / "index.clip", 0o020000, os.makedev(0, 0))
    assert find_marker([whiteout, below]) is None
    opaque = layer(tmp_path, "w3")
    os.setxattr(tmp_path / "w3" / ".clip", "trusted.overlay.opaque", b"y")
    assert find_marker([opaque, below]) is None
    link = tmp_path / "w4"
    link.mkdir()
    (link / ".clip").symlink_to(os.fsdecode(below) + "/.clip")
    assert find_marker([os.fsencode(link), below]) is None


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "symlink"])
def test_marker_that_is_no_file(tmp_path: Path, kind: str) -> None:
    lower = layer(tmp_path, "l")
    path = tmp_path / "l" / ".clip" / "index.clip"
    if kind == "symlink":
        (tmp_path / "secret").write_text("x")
        path.symlink_to(tmp_path / "secret")
    else:
        make_odd(path, kind)
    with pytest.raises(TrustError):
        find_marker([lower])


def test_podman_is_no_pod(tmp_path: Path, trusted: Path) -> None:
    """podman writes some of CRI-O's keys on all its containers, and root alone sets the others."""
    annotations = {
        "io.container.manager": "libpod",
        "io.kubernetes.cri-o.Created": "2026-01-02T03:04:05Z",
        "io.kubernetes.cri-o.TTY": "false",
        "io.clip.index": f"{trusted}/a.clip",
    }
    assert read(find(bundle(tmp_path, annotations), config(tmp_path, *ALL), none)) == b"index a"
    # saying so does not make a pod's container podman's
    with pytest.raises(TrustError, match="never taken"):
        find(bundle(tmp_path, CRI | annotations), config(tmp_path, *ALL), none)
