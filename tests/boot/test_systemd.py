"""clip-shim under a real systemd, on Debian 13 with its newer engines: started, killed, restarted, hung, upgraded."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.boot.conftest import RUNTIME, pid
from tests.support import bundle, expected, images, silentmount
from tests.support.debianroot import NEXT, DebianRoot
from tests.support.host import wait_for

INDEX = "/var/lib/clip-shim/indexes/small.clip"
PYTHON = "/usr/lib/clip-shim/bin/python3"
SITE = "usr/lib/clip-shim/lib/python3/site-packages"
HANG = """
import os, sys, threading
if "daemon" in sys.orig_argv:
    threading.Thread(target=os.stat, args=("/run/silent/file",), daemon=True).start()
"""


@pytest.fixture(scope="module", autouse=True)
def index(machine: DebianRoot, pushed: Callable[[str], str]) -> None:
    machine.run("clip-shim", "index", pushed("small"), "-o", INDEX)


def make(machine: DebianRoot, name: str, *args: str) -> str:
    bundle.make(machine.path / "srv" / name, args, index=INDEX)
    spec = machine.path / "srv" / name / "config.json"
    config = json.loads(spec.read_text())
    config["linux"]["cgroupsPath"] = f"/clip-test/{name}"
    spec.write_text(json.dumps(config))
    return f"/srv/{name}"


def container(machine: DebianRoot, name: str, *args: str) -> str:
    return machine.output(RUNTIME, "run", "--bundle", make(machine, name, *args), name)


def running(machine: DebianRoot, name: str) -> None:
    """Start a container that sleeps."""
    place = make(machine, name, "sleep", "1000")
    machine.run("sh", "-c", f"{RUNTIME} run --detach --bundle {place} {name} </dev/null >/dev/null 2>&1")


def read_anew(machine: DebianRoot, name: str) -> None:
    """What it reads comes from the daemon, and is right."""
    said = machine.output(RUNTIME, "exec", name, "sha256sum", "/data/noise.bin")
    assert said.split()[0] == images.file_digest(expected.tree(images.image("small")) / "data/noise.bin")


def drop() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("1")


def test_the_units_are_up(machine: DebianRoot) -> None:
    units = ("clip-shim.service", "clip-shim.socket", "clip-shim-cache-clean.timer")
    assert machine.output("systemctl", "is-enabled", *units).split() == ["enabled"] * 3
    assert machine.unit("ActiveState") == "active"
    assert machine.unit("StatusErrno") == "0"
    status = json.loads(machine.output("clip-shim", "status", "--json"))
    assert status["daemon"]["pid"] == pid(machine)
    assert "clip" not in machine.output("systemctl", "list-units", "--failed", "--no-legend")
    # the daemon sees and makes mounts where the engines do
    assert machine.output("readlink", f"/proc/{pid(machine)}/ns/mnt") == machine.output("readlink", "/proc/1/ns/mnt")
    assert machine.unit("OOMScoreAdjust") == "-900"
    assert "NoNewPrivs:\t1" in machine.output("cat", f"/proc/{pid(machine)}/status")


def test_a_container_and_its_journal(machine: DebianRoot) -> None:
    assert container(machine, "first", "sha256sum", "/data/noise.bin").endswith("/data/noise.bin")
    (line,) = machine.journal("CLIP_EVENT=container started", "CLIP_CONTAINER=first").splitlines()
    assert "small:latest" in line
    entry = json.loads(machine.run("journalctl", "-o", "json", "CLIP_CONTAINER=first", "-n", "1").stdout)
    assert entry["SYSLOG_IDENTIFIER"] == "clip-shim"
    assert entry["_SYSTEMD_UNIT"] == "clip-shim.service"
    assert entry["CLIP_IMAGE"].endswith("/small:latest")


@pytest.mark.parametrize("how", ["SIGKILL", "SIGABRT", "SIGTERM"])
def test_a_daemon_that_dies_is_started_again(machine: DebianRoot, how: str) -> None:
    before = pid(machine)
    machine.run("kill", f"-{how.removeprefix('SIG')}", str(before))
    wait_for("another runs", lambda: pid(machine) not in (0, before) and machine.unit("ActiveState") == "active")
    assert container(machine, f"after-{how.lower()}", "cat", "/data/one")


@pytest.mark.parametrize("how", ["SIGKILL", "restart", "stop and start"])
def test_a_running_container_reads_on(machine: DebianRoot, how: str) -> None:
    """systemd keeps /dev/fuse: what the kernel does not have is answered by the next daemon."""
    name = f"on-{how.replace(' ', '-').lower()}"
    running(machine, name)
    before = pid(machine)
    trees = machine.output("grep", "-c", "/run/clip-shim/trees/", "/proc/self/mountinfo")
    drop()
    if how == "SIGKILL":
        machine.run("kill", "-KILL", str(before))
    else:
        for verb in how.split(" and "):
            machine.run("systemctl", verb, "clip-shim.service")
    read_anew(machine, name)
    assert pid(machine) not in (0, before)
    status = json.loads(machine.output("clip-shim", "status", "--json"))
    assert status["daemon"]["handover"] == ""
    assert [image["overlays"] for image in status["images"]] == [1]
    assert machine.output("grep", "-c", "/run/clip-shim/trees/", "/proc/self/mountinfo") == trees
    machine.run(RUNTIME, "delete", "--force", name)


def test_who_comes_while_it_is_down_waits(machine: DebianRoot) -> None:
    """The socket is systemd's: a container that is started meanwhile starts the daemon, and is served."""
    machine.run("systemctl", "stop", "clip-shim.service")
    assert machine.unit("ActiveState") == "inactive"
    assert container(machine, "waits", "cat", "/data/one")
    assert machine.unit("ActiveState") == "active"


def test_without_the_socket_the_wrapper_starts_the_unit(machine: DebianRoot) -> None:
    machine.run("systemctl", "stop", "clip-shim.socket", "clip-shim.service")
    assert container(machine, "starts", "cat", "/data/one")
    assert machine.unit("ActiveState") == "active"
    assert json.loads(machine.output("clip-shim", "status", "--json"))["daemon"]["pid"] == pid(machine)
    machine.run("systemctl", "stop", "clip-shim.service")
    machine.run("systemctl", "start", "clip-shim.socket")
    assert container(machine, "again", "cat", "/data/one")


def test_one_that_hangs_is_ended_by_the_watchdog(machine: DebianRoot) -> None:
    """With a shorter deadline than the unit's, so that the test is short."""
    drop_in = machine.path / "run-clip"
    drop_in.write_text("[Service]\nWatchdogSec=3s\n")
    machine.run("install", "-D", "/run-clip", "/run/systemd/system/clip-shim.service.d/short.conf")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "clip-shim.service")
    before = pid(machine)
    machine.run("kill", "-STOP", str(before))
    wait_for("it was ended and another runs", lambda: pid(machine) not in (0, before))
    machine.run("rm", "/run/systemd/system/clip-shim.service.d/short.conf")
    machine.run("systemctl", "daemon-reload")
    assert "Watchdog timeout" in machine.journal("UNIT=clip-shim.service")
    machine.run("systemctl", "restart", "clip-shim.service")
    assert container(machine, "after-hang", "cat", "/data/one")


@pytest.fixture
def hanging(machine: DebianRoot) -> Iterator[None]:
    """A thread of each daemon hangs in the kernel, and cannot be killed."""
    script = Path(silentmount.__file__)
    (machine.path / "srv/silent.py").write_text(script.read_text())
    (machine.path / SITE / "hang.py").write_text(HANG)
    (machine.path / SITE / "hang.pth").write_text("import hang\n")
    machine.run("mkdir", "-p", "/run/silent")
    machine.run("systemd-run", "--unit=silent", PYTHON, "/srv/silent.py", "/run/silent")
    wait_for("it is mounted", lambda: " /run/silent " in machine.output("cat", "/proc/self/mountinfo"))
    yield
    for name in ("hang.pth", "hang.py"):
        (machine.path / SITE / name).unlink()
    machine.run("umount", "-f", "-l", "/run/silent")
    machine.run("systemctl", "restart", "clip-shim.service")


@pytest.mark.parametrize("how", ["SIGKILL", "SIGABRT", "restart"])
@pytest.mark.usefixtures("hanging")
def test_the_dead_are_not_waited_for(machine: DebianRoot, how: str) -> None:
    """systemd hears of the end of a process when its last thread has ended: reads do not wait for that."""
    name = f"dead-{how.lower()}"
    machine.run("systemctl", "restart", "clip-shim.service")
    running(machine, name)
    took = []
    for _ in range(2):
        before = pid(machine)
        drop()
        begin = time.monotonic()
        if how == "restart":
            machine.run("systemctl", "restart", "clip-shim.service")
        else:
            machine.run("kill", f"-{how.removeprefix('SIG')}", str(before))
        read_anew(machine, name)
        took.append(time.monotonic() - begin)
        assert ") Z " in machine.output("cat", f"/proc/{before}/stat")
        assert pid(machine) not in (0, before)
    print("seconds:", [round(item, 2) for item in took])
    assert min(took) < 3
    machine.run(RUNTIME, "delete", "--force", name)


def test_a_wrong_configuration_is_said_once(machine: DebianRoot) -> None:
    """And to each container that is started, at once. What runs waits, and goes on when it is mended."""
    config = machine.path / "etc/clip-shim/config.yaml"
    right = config.read_text()
    running(machine, "goes-on")
    config.write_text(f"{right}\nmount_dedline: 5\n")
    drop()
    assert machine.run("systemctl", "restart", "clip-shim.service", check=False).returncode != 0
    begin = time.monotonic()
    make(machine, "refused", "cat", "/data/one")
    refused = machine.run(RUNTIME, "run", "--bundle", "/srv/refused", "refused", check=False)
    assert time.monotonic() - begin < 10
    assert "mount_dedline" in refused.stderr
    wait_for("it is left alone", lambda: machine.unit("ActiveState") == "failed")
    assert machine.unit("NRestarts") == "0"
    assert "mount_dedline" in machine.unit("StatusText")
    assert machine.unit("ActiveState", "clip-shim.socket") == "active"
    config.write_text(right)
    machine.run("systemctl", "restart", "clip-shim.service")
    read_anew(machine, "goes-on")
    assert container(machine, "mended", "cat", "/data/one")
    machine.run(RUNTIME, "delete", "--force", "goes-on")


def test_what_cannot_start_for_now_is_tried_again_and_again(machine: DebianRoot) -> None:
    """And keeps no engine from starting."""
    machine.run("systemctl", "stop", "clip-shim.service", "docker.socket", "docker.service")
    machine.run("sh", "-c", "rm /run/clip-shim/daemon.lock; mkdir /run/clip-shim/daemon.lock")
    machine.run("systemctl", "start", "--no-block", "clip-shim.service", "docker.service")
    wait_for("docker runs", lambda: machine.unit("ActiveState", "docker.service") == "active")
    for _ in range(2):
        count = int(machine.unit("NRestarts"))
        wait_for("another attempt", lambda count=count: int(machine.unit("NRestarts")) > count)
        wait_for("it pauses", lambda: machine.unit("SubState") == "stop-post")
    machine.run("rmdir", "/run/clip-shim/daemon.lock")
    wait_for("it runs", lambda: machine.unit("ActiveState") == "active")


def test_containerd_of_debian_13(machine: DebianRoot, registry_address: str, pushed: Callable[[str], str]) -> None:
    assert re.search(r" 1\.7\.", machine.output("containerd", "--version"))
    pushed("blank")
    machine.run("ctr", "image", "pull", "--plain-http", f"{registry_address}/blank:latest")
    words = ["ctr", "run", "--rm", "--cpu-shares=0", "--runc-binary", RUNTIME, "--annotation", f"io.clip.index={INDEX}"]
    said = machine.output(*words, f"{registry_address}/blank:latest", "ctr1", "sha256sum", "/data/noise.bin")
    assert said.endswith("/data/noise.bin")
    assert "container started" in machine.journal("CLIP_CONTAINER=ctr1")


def test_docker_of_debian_13(machine: DebianRoot, registry_address: str, pushed: Callable[[str], str]) -> None:
    assert machine.output("docker", "version", "--format", "{{.Server.Version}}").startswith("26.")
    image = pushed("blank")
    words = ["docker", "run", "--network=none", "--runtime=clip", "--annotation", f"io.clip.index={INDEX}"]
    said = machine.output(*words, "--rm", image, "sha256sum", "/data/noise.bin")
    assert said.endswith("/data/noise.bin")
    machine.run(*words, "--name", "again", image, "sh", "-c", "touch /w; cat /w; echo one >>/w")
    assert machine.output("docker", "start", "-a", "again") == "one"
    machine.run("systemctl", "restart", "docker.service")
    assert machine.output("docker", "start", "-a", "again").split() == ["one", "one"]
    machine.run("docker", "rm", "again")
    wait_for(
        "no container is left", lambda: not json.loads(machine.output("clip-shim", "status", "--json"))["containers"]
    )


def test_doctor_finds_the_service(machine: DebianRoot) -> None:
    done = machine.run("clip-shim", "doctor", "--json", check=False)
    assert done.returncode in (0, 1, 2), done.stderr
    checks = json.loads(done.stdout)["checks"]
    assert [c for c in checks if "daemon" in c["check"] and c["status"] not in ("ok", "good", "fine")] == []


def test_upgrade_restarts_what_runs(machine: DebianRoot, packages: Path) -> None:
    before = pid(machine)
    (deb,) = packages.glob(f"clip-shim_{NEXT}-*.deb")
    machine.run("systemctl", "disable", "--now", "clip-shim-cache-clean.timer")
    machine.run("dpkg", "-i", machine.offer(deb))
    wait_for("the new one runs", lambda: pid(machine) not in (0, before))
    assert container(machine, "upgraded", "cat", "/data/one")
    assert machine.output("systemctl", "is-enabled", "clip-shim.service") == "enabled"
    timer = machine.run("systemctl", "is-enabled", "clip-shim-cache-clean.timer", check=False)
    assert timer.stdout == "disabled\n"  # somebody's choice
    assert machine.unit("ActiveState", "clip-shim-cache-clean.timer") == "inactive"


def test_upgrade_does_not_end_what_could_not_start_again(machine: DebianRoot, packages: Path) -> None:
    before = pid(machine)
    config = machine.path / "etc/clip-shim/config.yaml"
    right = config.read_text()
    config.write_text(f"{right}\nmount_dedline: 5\n")
    (deb,) = packages.glob(f"clip-shim_{NEXT}-*.deb")
    assert "mount_dedline" in machine.run("dpkg", "-i", machine.offer(deb)).stderr
    assert pid(machine) == before
    config.write_text(right)
    machine.run("clip-shim", "config", "compile")


def test_remove_stops_it(machine: DebianRoot, packages: Path) -> None:
    machine.run("dpkg", "--remove", "clip-shim")
    assert machine.output("systemctl", "list-units", "--no-legend", "clip-shim*") == ""
    assert machine.output("sh", "-c", "grep -c clip-shim /proc/self/mountinfo || true") == "0"
    (deb,) = packages.glob(f"clip-shim_{NEXT}-*.deb")
    machine.run("dpkg", "-i", machine.offer(deb))
    assert container(machine, "installed-again", "cat", "/data/one")
    assert machine.output("systemctl", "is-enabled", "clip-shim.service") == "enabled"


def test_removed_by_force_it_leaves_nobody_waiting(machine: DebianRoot) -> None:
    """systemd lets go of what it keeps for a successor: there will be none, and reads get an error instead."""
    running(machine, "left")
    machine.run(RUNTIME, "exec", "left", "cat", "/data/one")
    done = machine.run("dpkg", "--purge", "clip-shim", check=False)
    assert "1 running containers" in done.stderr
    assert machine.unit("ActiveState") == "active"
    assert machine.unit("NFileDescriptorStore") != "0"
    machine.run("/var/lib/dpkg/info/clip-shim.prerm", "remove", CLIP_SHIM_FORCE="1")
    assert machine.unit("NFileDescriptorStore") == "0"
    machine.run("dpkg", "--purge", "clip-shim", CLIP_SHIM_FORCE="1")
    drop()
    done = machine.run("runc", "exec", "left", "sha256sum", "/data/noise.bin", check=False, timeout=20)
    assert done.returncode != 0
    assert "error" in done.stderr.lower()
    machine.run("runc", "delete", "--force", "left")
    assert machine.output("systemctl", "list-units", "--all", "--no-legend", "clip-shim*") == ""
