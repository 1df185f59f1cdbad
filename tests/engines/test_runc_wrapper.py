"""The wrapper in front of real runc: overlays in place and beside, restarts, failures, concurrency.

A fake daemon hands out a directory as tree, so that what fails here is the wrapper.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.mount import syscalls
from tests.support.fakedaemon import DIGEST
from tests.support.wrapperbox import Box, busybox_tree

OURS = f"clip:{DIGEST}".encode()


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    made = Box(tmp_path)
    yield made
    made.close()
    assert made.mounts() == []


# --- a rootfs that is no overlay ---


def test_run_on_a_plain_directory(box: Box) -> None:
    place = box.bundle("b", "cat /data/file; echo made > /made; exit 7")
    before = (place / "config.json").read_bytes()
    done = box.run(place)
    assert (done.returncode, done.stdout, done.stderr) == (7, "of the image", "")
    request, content = box.daemon.requests[0]
    assert content is None
    assert (request["op"], request["source"], request["value"]) == (
        "acquire",
        "annotation",
        "oci://registry.test/busybox",
    )
    assert request["container"] == {"id": "c", "root": str(box.root), "bundle": str(place)}
    # the poststop hook has undone everything
    assert box.mounts() == []
    assert box.leftovers() == []
    assert (place / "config.json").read_bytes() == before
    assert list((place / "rootfs").iterdir()) == []
    assert not (box.tree / "made").exists()


def test_create_start_kill_delete(box: Box) -> None:
    place = box.bundle("b", "trap 'exit 3' TERM; : > /ready; while :; do sleep 0.05; done")
    assert box.create(place).returncode == 0
    state = json.loads(box.call("state", "c").stdout)
    assert state["status"] == "created"
    assert state["annotations"]["io.clip.index-digest"] == DIGEST
    merged = box.spec(place)["root"]["path"]
    assert merged == state["rootfs"]
    assert merged.startswith(str(box.run_dir / "containers"))
    assert box.mounts() == [merged]
    assert box.daemon.connections == 0
    assert box.call("start", "c").returncode == 0
    assert box.call("exec", "c", "/bin/cat", "/data/file").stdout == "of the image"
    assert box.call("kill", "c", "KILL").returncode == 0
    assert box.call("delete", "--force", "c").returncode == 0
    assert box.mounts() == []
    assert box.leftovers() == []


def test_delete_of_a_running_container_leaves_it_alone(box: Box) -> None:
    place = box.bundle("b", "while :; do sleep 0.05; done")
    assert box.create(place).returncode == 0
    assert box.call("start", "c").returncode == 0
    assert box.call("delete", "c").returncode == 1
    assert len(box.mounts()) == 1
    assert box.call("exec", "c", "/bin/true").returncode == 0


def test_files_of_the_rootfs_lie_over_the_tree(box: Box) -> None:
    place = box.bundle("b", "cat /data/file /own; ls -ld / | cat")
    (place / "rootfs" / "data").mkdir()
    (place / "rootfs" / "data" / "file").write_text("of the bundle ")
    (place / "rootfs" / "own").write_text("own ")
    (place / "rootfs").chmod(0o700)
    box.tree.chmod(0o755)
    done = box.run(place)
    assert done.stdout.startswith("of the bundle own drwxr-xr-x"), done


def test_rootfs_may_be_missing(box: Box) -> None:
    place = box.bundle("b", "cat /data/file")
    (place / "rootfs").rmdir()
    assert box.run(place).stdout == "of the image"


def test_own_upper_is_kept_on_request(box: Box) -> None:
    annotations = {"io.clip.index": "oci://x/y", "io.clip.upper": "keep"}
    place = box.bundle("b", "cat /kept 2>/dev/null || true; echo kept > /kept", annotations=annotations)
    assert box.run(place).stdout == ""
    assert box.run(place).stdout == "kept\n"
    box.configure(place, ["/bin/sh", "-c", "cat /kept || echo none"])
    assert box.run(place).stdout == "none\n"
    box.configure(place, ["/bin/sh", "-c", "cat /kept"], annotations)
    assert box.run(place).stdout == "kept\n"


def test_bundle_that_lost_power_starts_again(box: Box) -> None:
    """config.json still names our merged root, whose record and mount are gone."""
    place = box.bundle("b", "cat /data/file")
    assert box.create(place).returncode == 0
    (merged,) = box.mounts()
    subprocess.run(["cp", place / "config.json", place / "left.json"], check=True)
    assert box.call("delete", "--force", "c").returncode == 0
    (place / "left.json").rename(place / "config.json")
    assert box.spec(place)["root"]["path"] == merged
    done = box.run(place, "other")
    assert done.stdout == "of the image", done
    assert box.spec(place)["root"]["path"] == str(place / "rootfs")
    assert "poststop" not in json.dumps(box.spec(place)["hooks"].get("poststop"))


def test_late_hook_of_an_earlier_run_does_nothing(box: Box) -> None:
    place = box.bundle("b", "while :; do sleep 0.05; done")
    assert box.create(place).returncode == 0
    (hook,) = box.spec(place)["hooks"]["poststop"]
    assert hook["path"] == str(box.launcher)
    late = [*hook["args"][:-1], "1-1"]
    assert subprocess.run(late, env={}, check=False).returncode == 0
    assert len(box.mounts()) == 1
    outside = [*hook["args"][:2], "/etc/containers/x/y", "1-1"]
    assert subprocess.run(outside, env={}, check=False, capture_output=True).returncode == 2
    for _ in range(2):  # the right one, and once more
        assert subprocess.run(hook["args"], env=dict(e.split("=", 1) for e in hook["env"]), check=False).returncode == 0
        assert box.mounts() == []


# --- an engine's overlay ---


def test_overlay_is_replaced_in_place(box: Box) -> None:
    thin = box.layer("thin", {"engine/file": "of the layer"})
    place = box.bundle("b", "cat /data/file /engine/file; echo written > /data/new; rm /data/file")
    upper = box.overlay(place, thin, options=",index=off")
    assert box.create(place).returncode == 0
    assert box.source(place) == OURS
    assert box.mounts() == [str(place / "rootfs")]
    spec = box.spec(place)
    assert spec["root"]["path"] == str(place / "rootfs")
    assert "hooks" not in spec
    assert (place / "rootfs" / "data" / "file").read_text() == "of the image"  # what `docker cp` sees
    assert box.call("start", "c").returncode == 0
    assert (
        subprocess.run(["tail", f"--pid={(place / 'pid').read_text()}", "-f", "/dev/null"], check=False).returncode == 0
    )
    assert box.call("delete", "c").returncode == 0
    assert box.output() == "of the imageof the layer"
    syscalls.umount2(place / "rootfs")  # as every engine does
    assert box.mounts() == []
    assert (upper / "data" / "new").read_text() == "written\n"

    # stop and start: the engine mounts its overlay and writes config.json again
    box.overlay(place, thin)
    box.configure(place, ["/bin/sh", "-c", "cat /data/new; cat /data/file || echo removed"])
    assert box.run(place).stdout == "written\nremoved\n"


def test_restart_with_ours_still_mounted(box: Box) -> None:
    """docker restart: the engine keeps what is mounted and creates again."""
    thin = box.layer("thin")
    place = box.bundle("b", "cat /count 2>/dev/null || true; echo more >> /count")
    box.overlay(place, thin)
    for turn in range(20):
        box.configure(place, ["/bin/sh", "-c", "cat /count 2>/dev/null; echo more >> /count"])
        done = box.run(place)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "more\n" * turn
        assert box.mounts() == [str(place / "rootfs")]


def test_restart_with_another_tree_is_built_anew(box: Box) -> None:
    """The daemon was lost with its mounts: the same index is now another superblock."""
    place = box.bundle("b", "echo one > /one")
    box.overlay(place, box.layer("thin", {"t": "thin"}))
    assert box.run(place).returncode == 0
    other = box.directory / "other"
    other.mkdir()
    syscalls.mount("tmpfs", other, "tmpfs")
    busybox_tree(other)
    (other / "data" / "file").write_text("of the other")
    assert isinstance(box.daemon.answer, dict)
    box.daemon.answer["tree"] = str(other)
    box.configure(place, ["/bin/sh", "-c", "cat /one /t /data/file"])
    assert box.run(place).stdout == "one\nthinof the other"
    assert box.mounts().count(str(place / "rootfs")) == 1
    # and with the record gone as well, from what mountinfo shows
    for path in (box.run_dir / "containers").glob("*/c/state.json"):
        path.unlink()
    box.daemon.answer["tree"] = str(box.tree)
    box.configure(place, ["/bin/sh", "-c", "cat /one /t /data/file"])
    assert box.run(place).stdout == "one\nthinof the image"
    syscalls.umount2(place / "rootfs")
    assert box.mounts() == [str(other)]


def test_engine_that_mounts_over_ours(box: Box) -> None:
    thin = box.layer("thin")
    place = box.bundle("b", ":")
    for _ in range(3):
        box.overlay(place, thin)
        box.configure(place, ["/bin/true"])
        assert box.run(place).returncode == 0
        assert box.mounts() == [str(place / "rootfs")]


def test_marker_in_a_lower_layer(box: Box) -> None:
    place = box.bundle("b", "cat /data/file", annotations={})
    box.overlay(place, box.layer("thin", {".clip/index.clip": "the index"}))
    assert box.run(place).stdout == "of the image"
    request, content = box.daemon.requests[0]
    assert request["source"] == "marker"
    assert content == b"the index"
    # docker restart: our overlay is there, the marker is found in the engine's layers again
    box.configure(place, ["/bin/cat", "/data/file"], {})
    assert box.run(place).stdout == "of the image"
    assert len(box.daemon.requests) == 2


def test_marker_in_the_upper_counts_for_nothing(box: Box) -> None:
    place = box.bundle("b", ":", annotations={})
    upper = box.overlay(place, box.tree)
    (upper / ".clip").mkdir()
    (upper / ".clip" / "index.clip").write_text("chosen by the container")
    assert box.run(place).returncode == 0
    assert box.daemon.requests == []
    assert box.source(place) == b"overlay"


def test_index_in_the_bundle(box: Box) -> None:
    place = box.bundle("b", "cat /data/file", annotations={})
    (place / "index.clip").write_text("in the bundle")
    assert box.run(place).stdout == "of the image"
    assert box.daemon.requests[0][1] == b"in the bundle"


def test_no_reference_changes_nothing(box: Box) -> None:
    place = box.bundle("b", "echo plain", annotations={"other": "x"})
    box.overlay(place, box.tree)
    before = (place / "config.json").read_bytes(), os.stat(place / "config.json").st_mtime_ns
    assert box.run(place).stdout == "plain\n"
    assert ((place / "config.json").read_bytes(), os.stat(place / "config.json").st_mtime_ns) == before
    assert box.daemon.requests == []
    assert box.source(place) == b"overlay"
    assert not (box.run_dir / "containers").exists()


def test_read_only_without_an_upper(box: Box) -> None:
    place = box.bundle("b", "cat /data/file /a", readonly=True)
    box.overlay(place, box.layer("one", {"a": "A"}), box.layer("two"), upper=False)
    assert box.run(place).stdout == "of the imageA"
    assert box.source(place) == OURS


def test_missing_mount_points_are_made(box: Box) -> None:
    for name in ("proc", "sys", "dev"):
        (box.tree / name).rmdir()
    assert isinstance(box.daemon.answer, dict)
    box.daemon.answer["dirs"] = []
    place = box.bundle("b", "ls /proc/self/status")
    upper = box.overlay(place, box.layer("thin"))
    assert box.run(place, umask=0o077).stdout == "/proc/self/status\n"
    assert [(upper / name).stat().st_mode & 0o777 for name in ("proc", "sys", "dev")] == [0o555, 0o555, 0o755]


def test_volatile_overlay(box: Box) -> None:
    place = box.bundle("b", "cat /data/file")
    box.overlay(place, box.layer("thin"), options=",volatile")
    assert box.run(place).stdout == "of the image"


def test_busy_overlay_of_the_engine(box: Box) -> None:
    """Something holds the engine's overlay: it is unmounted lazily."""
    place = box.bundle("b", "cat /data/file")
    box.overlay(place, box.layer("thin"))
    held = os.open(place / "rootfs", os.O_RDONLY)
    assert box.run(place).stdout == "of the image"
    assert box.mounts() == [str(place / "rootfs")]
    os.close(held)


def test_link_that_a_higher_layer_overrides(box: Box) -> None:
    (box.tree / "usr" / "lib").mkdir()
    (box.tree / "lib").symlink_to("usr/lib")
    assert isinstance(box.daemon.answer, dict)
    box.daemon.answer["symlinks"]["lib"] = {"target": "usr/lib", "resolves": True}
    thin = box.layer("thin", {"lib/own": "x"})  # a real directory where the image has a link
    place = box.bundle("b", "cat /lib/own; rm -r /usr/lib")
    box.overlay(place, thin)
    assert box.run(place).stdout == "x"


def test_container_may_remove_what_a_link_leads_to(box: Box) -> None:
    (box.tree / "usr" / "lib").mkdir()
    (box.tree / "lib").symlink_to("usr/lib")
    assert isinstance(box.daemon.answer, dict)
    box.daemon.answer["symlinks"]["lib"] = {"target": "usr/lib", "resolves": True}
    place = box.bundle("b", "rm -r /usr/lib")
    box.overlay(place, box.layer("thin"))
    assert box.run(place).returncode == 0
    box.configure(place, ["/bin/sh", "-c", "test -e /usr/lib || echo gone"])
    assert box.run(place).stdout == "gone\n"


def test_from_the_command_line(box: Box) -> None:
    """`clip-shim run …` is the same wrapper, only slower; its hook runs without the launcher."""
    place = box.bundle("b", "cat /data/file; exit 5")
    before = (place / "config.json").read_bytes()
    environ = os.environ | {"CLIP_SHIM_RUN_DIR": str(box.run_dir), "CLIP_SHIM_STATE_DIR": str(box.state_dir)}
    line = [sys.executable, "-m", "shim", "--root", str(box.root), "run", "--bundle", str(place), "c"]
    done = subprocess.run(line, capture_output=True, text=True, env=environ, check=False)
    assert (done.returncode, done.stdout) == (5, "of the image"), done.stderr
    assert box.mounts() == []
    assert box.leftovers() == []
    assert (place / "config.json").read_bytes() == before
