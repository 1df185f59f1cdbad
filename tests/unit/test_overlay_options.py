"""From what mountinfo shows of an engine's overlay to the options of ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from shim.errors import MountError
from shim.mount.mountinfo import MountEntry
from shim.mount.overlay import Layers, check, read_stock, stock_options

OFF = [("index", b"off"), ("nfs_export", b"off"), ("metacopy", b"off"), ("redirect_dir", b"off")]


def entry(options: str, mount_point: str = "/m/merged", flags: str = "rw,relatime") -> MountEntry:
    return MountEntry(f"50 30 0:44 / {mount_point} {flags} shared:7 - overlay overlay {options}".encode())


def test_docker() -> None:
    layers = read_stock(entry("rw,lowerdir=/l/B:/l/A,upperdir=/x/diff,workdir=/x/work"))
    assert layers.lowers == [b"/l/B", b"/l/A"]
    assert (layers.upper, layers.work, layers.attributes) == (b"/x/diff", b"/x/work", 0)
    assert layers.options == OFF
    assert layers.all == [b"/x/diff", b"/l/B", b"/l/A"]


def test_mounted_by_descriptor_calls() -> None:
    layers = read_stock(entry("rw,lowerdir+=/l/a:b,lowerdir+=/l/c,upperdir=/u,workdir=/w"))
    assert layers.lowers == [b"/l/a:b", b"/l/c"]


def test_without_an_upper() -> None:
    layers = read_stock(entry("ro,lowerdir=/l/B:/l/A", flags="ro,relatime"))
    assert (layers.upper, layers.work, layers.attributes) == (b"", b"", 1)


def test_mount_flags_are_kept() -> None:
    layers = read_stock(entry("rw,lowerdir=/a,upperdir=/u,workdir=/w", flags="rw,nosuid,nodev,noexec,noatime"))
    assert layers.attributes == 2 | 4 | 8 | 0x10


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ([(b"rw", None), (b"uuid", b"on"), (b"seclabel", None)], OFF),
        ([(b"fsync", b"volatile")], [*OFF, ("volatile", None)]),
        ([(b"volatile", None)], [*OFF, ("volatile", None)]),
        ([(b"xino", b"off")], [*OFF, ("xino", b"off")]),
        ([(b"index", b"on"), (b"nfs_export", b"on")], OFF),
        ([(b"metacopy", b"on"), (b"redirect_dir", b"on")], [*OFF[:2], ("metacopy", b"on"), ("redirect_dir", b"on")]),
        ([(b"redirect_dir", b"nofollow")], [*OFF[:3], ("redirect_dir", b"nofollow")]),
        ([(b"userxattr", None), (b"redirect_dir", b"nofollow")], [("index", b"off"), ("userxattr", None)]),
        ([(b"context", b"u:r:t:s0:c1,c2")], [*OFF, ("context", b"u:r:t:s0:c1,c2")]),
    ],
)
def test_options(shown: list[tuple[bytes, bytes | None]], expected: list[tuple[str, bytes | None]]) -> None:
    assert stock_options(shown) == expected


def test_label_with_commas() -> None:
    layers = read_stock(entry('rw,context="u:r:t:s0:c1,c2",lowerdir=/a,upperdir=/u,workdir=/w'))
    assert ("context", b"u:r:t:s0:c1,c2") in layers.options
    assert layers.volatile is False


def test_containerds_relative_layers(tmp_path: Path) -> None:
    for number in (70, 71, 72):
        (tmp_path / "snapshots" / str(number) / "fs").mkdir(parents=True)
    upper = f"{tmp_path}/snapshots/72/fs"
    layers = read_stock(entry(f"rw,lowerdir=71/fs:70/fs,upperdir={upper},workdir={tmp_path}/snapshots/72/work"))
    assert layers.lowers == [f"{tmp_path}/snapshots/{number}/fs".encode() for number in (71, 70)]
    assert layers.upper == upper.encode()


def test_dockers_relative_layers(tmp_path: Path) -> None:
    home = tmp_path / "overlay2"
    for name in ("l/AB", "l/CD", "id/diff", "id/work", "id/merged"):
        (home / name).mkdir(parents=True)
    layers = read_stock(entry("rw,lowerdir=l/AB:l/CD,upperdir=id/diff,workdir=id/work", f"{home}/id/merged"))
    assert layers.lowers == [f"{home}/l/AB".encode(), f"{home}/l/CD".encode()]
    assert (layers.upper, layers.work) == (f"{home}/id/diff".encode(), f"{home}/id/work".encode())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("rw,lowerdir=3:4:5,upperdir=/u,workdir=/w", "open descriptors"),
        ("rw,lowerdir=no/such:dir,upperdir=/u,workdir=/w", "relative layers"),
        ("rw,lowerdir=/a::/data,upperdir=/u,workdir=/w", "data-only"),
        ("rw,lowerdir+=/a,datadir+=/data,upperdir=/u,workdir=/w", "data-only"),
        ("rw,lowerdir=/a,upperdir=/u,workdir=/w,verity=require", "fs-verity"),
        ("rw", "no lower directories"),
    ],
)
def test_what_cannot_be_made_again(options: str, message: str) -> None:
    with pytest.raises(MountError, match=message):
        read_stock(entry(options))


def test_layers_that_are_gone(tmp_path: Path) -> None:
    check(Layers([bytes(tmp_path)]))
    with pytest.raises(MountError, match="no directory") as caught:
        check(Layers([bytes(tmp_path), bytes(tmp_path / "mapped" / "0")]))
    assert "idmapped" in caught.value.hint


def test_too_many_layers(tmp_path: Path) -> None:
    with pytest.raises(MountError, match="at most 500"):
        check(Layers([bytes(tmp_path)] * 501))
