"""Overlays of ours on the real kernel: both ways to make one must give the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shim.errors import MountError
from shim.mount import mountinfo, overlay, syscalls
from shim.mount.overlay import Layers

WAYS: dict[str, Callable[[Layers, bytes, bytes], int]] = {
    "context": overlay.build,
    "mount(2)": overlay.build_by_mount,
}
OPTIONS = overlay.stock_options([])


@pytest.fixture
def at(tmp_path: Path) -> Iterator[Path]:
    target = tmp_path / "merged"
    target.mkdir()
    yield target
    while mountinfo.at(target) is not None:
        syscalls.umount2(target, syscalls.MNT_DETACH)


def layers(base: Path, count: int, **more: object) -> Layers:
    lowers = []
    for number in range(count):
        place = base / f"layer {number:03},:\\"  # names that overlay's own syntax would trip over
        (place / "dir").mkdir(parents=True)
        (place / "dir" / f"file{number}").write_text(str(number))
        lowers.append(bytes(place))
    for name in ("upper", "work", "stage"):
        (base / name).mkdir()
    return Layers(lowers, bytes(base / "upper"), bytes(base / "work"), OPTIONS, **more)  # type: ignore[arg-type]


def attach(way: str, made: Layers, base: Path, target: Path) -> mountinfo.MountEntry:
    fd = WAYS[way](made, b"clip:test", bytes(base / "stage"))
    overlay.attach(fd, bytes(target))
    os.close(fd)
    assert mountinfo.at(base / "stage") is None
    entry = mountinfo.at(target)
    assert entry is not None
    assert entry.source == b"clip:test"
    return entry


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [1, 2, 130, 500])
def test_many_layers(tmp_path: Path, at: Path, way: str, count: int) -> None:
    attach(way, layers(tmp_path, count), tmp_path, at)
    assert len(os.listdir(at / "dir")) == count
    (at / "dir" / "file0").write_text("changed")
    assert (tmp_path / "upper" / "dir" / "file0").read_text() == "changed"
    assert os.getcwd() != "/proc/self/fd"


@pytest.mark.parametrize("way", WAYS)
def test_paths_longer_than_an_option(tmp_path: Path, at: Path, way: str) -> None:
    base = tmp_path / ("a" * 200) / ("b" * 200)
    base.mkdir(parents=True)
    attach(way, layers(base, 20), base, at)
    assert len(os.listdir(at / "dir")) == 20
    (at / "new").write_text("x")
    assert (base / "upper" / "new").exists()


@pytest.mark.parametrize("way", WAYS)
def test_without_an_upper(tmp_path: Path, at: Path, way: str) -> None:
    made = layers(tmp_path, 2)
    made.upper = made.work = b""
    attach(way, made, tmp_path, at)
    with pytest.raises(OSError, match="Read-only"):
        (at / "x").write_text("x")


@pytest.mark.parametrize("way", WAYS)
def test_attributes_and_options(tmp_path: Path, at: Path, way: str) -> None:
    made = layers(tmp_path, 1, attributes=overlay._ATTRIBUTES[b"nodev"] | overlay._ATTRIBUTES[b"noatime"])
    made.options = [*OPTIONS, ("volatile", None), ("xino", b"off")]
    entry = attach(way, made, tmp_path, at)
    assert b"nodev" in entry.options.split(b",")
    assert b"noatime" in entry.options.split(b",")
    again = overlay.stock_options(mountinfo.split_options(entry.super_options))
    assert ("volatile", None) in again


def test_round_trip_through_mountinfo(tmp_path: Path, at: Path) -> None:
    made = layers(tmp_path, 3)
    found = overlay.read_stock(attach("context", made, tmp_path, at))
    assert (found.lowers, found.upper, found.work) == (made.lowers, made.upper, made.work)


@pytest.mark.parametrize("way", WAYS)
def test_volatile_can_be_mounted_again(tmp_path: Path, at: Path, way: str) -> None:
    made = layers(tmp_path, 1)
    made.options = [*OPTIONS, ("volatile", None)]
    attach(way, made, tmp_path, at)
    overlay.detach(bytes(at))
    if way == "mount(2)":
        overlay.clear_volatile(made)
    attach(way, made, tmp_path, at)


def test_closing_leaves_nothing(tmp_path: Path) -> None:
    before = mountinfo.read_bytes()
    fds = sorted(os.listdir("/proc/self/fd"))
    for build in WAYS.values():
        os.close(build(layers(tmp_path / build.__name__, 3), b"clip:x", bytes(tmp_path / build.__name__ / "stage")))
    assert mountinfo.read_bytes() == before
    assert sorted(os.listdir("/proc/self/fd")) == fds


def test_falls_back_where_the_kernel_has_no_lowerdir_plus(
    tmp_path: Path, at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def old_kernel(*_: object) -> int:
        raise OSError(22, "fsconfig lowerdir+: Invalid argument")

    monkeypatch.setattr(syscalls, "new_mount", old_kernel)
    attach("context", layers(tmp_path, 2), tmp_path, at)
    assert len(os.listdir(at / "dir")) == 2


def test_errors_have_names(tmp_path: Path) -> None:
    made = layers(tmp_path, 1)
    made.lowers.append(made.lowers[0])
    with pytest.raises(MountError, match="ELOOP"):
        overlay.build(made, b"clip:x", bytes(tmp_path / "stage"))
    made.lowers.pop()
    (tmp_path / "shm").mkdir()
    nested = tmp_path / "nested"
    nested.mkdir()
    fd = overlay.build(made, b"clip:x", bytes(tmp_path / "stage"))
    overlay.attach(fd, bytes(nested))
    os.close(fd)
    try:
        for name in ("u", "w"):
            (nested / name).mkdir()
        with pytest.raises(MountError, match="EINVAL") as caught:
            overlay.build(Layers(made.lowers, bytes(nested / "u"), bytes(nested / "w"), OPTIONS), b"clip:x", b"/none")
        assert "plain disk" in caught.value.hint or caught.value.hint
    finally:
        overlay.detach(bytes(nested))


def test_options_that_mount_would_cut(tmp_path: Path) -> None:
    made = layers(tmp_path, 1)
    made.options = [*OPTIONS, ("context", b"x" * 4000)]
    with pytest.raises(MountError, match="mount\\(2\\) reads 4095"):
        overlay.build_by_mount(made, b"clip:x", bytes(tmp_path / "stage"))
