"""`clip-shim doctor` on kernel and disk: each thing is broken, in a mount namespace or by a filter, and named."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.doctor import doctor as run_doctor
from tests.support.host import Host

OPENAT2, FSOPEN = 437, 430  # the same on every architecture

Doctor = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def doctor() -> Iterator[Doctor]:
    """Runs chosen checks on a host; `before` are shell commands run first, in a mount namespace of their own."""
    with Host() as host:
        yield lambda *names, **more: {name: items[0] for name, items in run_doctor(host, *names, **more).items()}


def without(*numbers: int) -> str:
    return f"{sys.executable} -m tests.support.seccomp {','.join(map(str, numbers))}"


KERNEL = ("root", "fuse-device", "openat2", "mount-api", "fuse-resend", "erofs", "overlay-options", "lazy-tree")


def test_all_is_well_here(doctor: Doctor) -> None:
    found = doctor(*KERNEL, "state-dir", "space")
    assert {name: item["status"] for name, item in found.items()} == dict.fromkeys(
        [*KERNEL, "state-dir", "space"], "ok"
    )


def test_no_fuse_device(doctor: Doctor) -> None:
    """A container without it: /dev is another one."""
    before = "mount -t tmpfs tmpfs /dev && mknod /dev/null c 1 3"
    found = doctor("fuse-device", "fuse-resend", "lazy-tree", before=before)
    assert found["fuse-device"]["found"] == "/dev/fuse: No such file or directory"
    assert "modprobe fuse" in found["fuse-device"]["fix"]
    assert {item["status"] for item in found.values()} == {"failed"}


def test_another_file_in_its_place(doctor: Doctor) -> None:
    found = doctor("fuse-device", before="mount --bind /dev/null /dev/fuse")
    assert "is something else" in found["fuse-device"]["found"]


def test_no_openat2(doctor: Doctor) -> None:
    found = doctor("openat2", prefix=without(OPENAT2))["openat2"]
    assert found["status"] == "failed"
    assert "Function not implemented" in found["found"]


def test_no_mount_api(doctor: Doctor) -> None:
    found = doctor("mount-api", "erofs", prefix=without(FSOPEN))
    assert found["mount-api"]["status"] == "failed"
    assert "fsopen: Function not implemented" in found["mount-api"]["found"]
    assert found["erofs"]["status"] == "warning"
    assert "portable FUSE tree" in found["erofs"]["found"]


def test_not_allowed_to_mount(doctor: Doctor) -> None:
    found = doctor("mount-api", "lazy-tree", prefix="setpriv --bounding-set -sys_admin --inh-caps -sys_admin")
    assert {item["status"] for item in found.values()} == {"failed"}
    assert "Operation not permitted" in found["mount-api"]["found"]


def test_state_on_memory(doctor: Doctor) -> None:
    found = doctor("state-dir", "erofs", before="mount -t tmpfs tmpfs $BASE/state")
    assert found["state-dir"]["status"] == "warning"
    assert "is on tmpfs" in found["state-dir"]["found"]
    assert found["erofs"]["status"] == "warning"  # the kernel refuses an image on tmpfs, loop devices do not


def test_state_on_overlay(doctor: Doctor) -> None:
    before = "mkdir $BASE/u $BASE/w && mount -t overlay o -o lowerdir=/etc,upperdir=$BASE/u,workdir=$BASE/w $BASE/state"
    found = doctor("state-dir", "overlay-options", before=before)
    assert "is on overlayfs" in found["state-dir"]["found"]
    assert found["overlay-options"]["status"] == "failed"


def test_state_open_to_others(doctor: Doctor) -> None:
    found = doctor("state-dir", before="chmod 755 $BASE/state")["state-dir"]
    assert "has mode 0755" in found["found"]
    assert "chmod 700" in found["fix"]


def test_full_disk(doctor: Doctor) -> None:
    before = "mount -t tmpfs -o size=16m,nr_inodes=100 tmpfs $BASE/state"
    found = doctor("space", before=before)["space"]
    assert found["status"] == "failed"
    assert found["found"].startswith("0.0 GiB free")


def test_kernel_without_resend(disk_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is injected: no kernel here is that old."""
    from shim.doctor import kernel
    from shim.doctor.node import Node
    from shim.fuse import proto
    from shim.settings import load

    monkeypatch.setattr(proto, "HAS_RESEND", 0)
    node = Node(load(env={}, flags={"state_dir": str(disk_path)}), disk_path, lambda: None)
    assert [item.status for item in kernel.fuse_resend(node)] == ["warning"]
