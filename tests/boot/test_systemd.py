"""clip-shim under a real systemd, on Debian 13 with its newer engines: started, killed, restarted, hung, upgraded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.boot.conftest import RUNTIME, pid
from tests.support import bundle, expected, images
from tests.support.debianroot import NEXT, DebianRoot
from tests.support.host import wait_for

INDEX = "/var/lib/clip-shim/indexes/small.clip"


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
    place = make(machine, name, "sleep", "1000")
    machine.run("sh", "-c", f"{RUNTIME} run --detach --bundle {place} {name} </dev/null >/dev/null 2>&1")
    before = pid(machine)
    trees = machine.output("grep", "-c", "/run/clip-shim/trees/", "/proc/self/mountinfo")
    Path("/proc/sys/vm/drop_caches").write_text("1")
    if how == "SIGKILL":
        machine.run("kill", "-KILL", str(before))
    else:
        for verb in how.split(" and "):
            machine.run("systemctl", verb, "clip-shim.service")
    said = machine.output(RUNTIME, "exec", name, "sha256sum", "/data/noise.bin")
    assert said.split()[0] == images.file_digest(expected.tree(images.image("small")) / "data/noise.bin")
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
    machine.run("dpkg", "-i", machine.offer(deb))
    wait_for("the new one runs", lambda: pid(machine) not in (0, before))
    assert container(machine, "upgraded", "cat", "/data/one")
    assert machine.output("systemctl", "is-enabled", "clip-shim.service") == "enabled"


def test_remove_stops_it(machine: DebianRoot) -> None:
    machine.run("dpkg", "--purge", "clip-shim")
    assert machine.output("systemctl", "list-units", "--all", "--no-legend", "clip-shim*") == ""
    assert machine.output("sh", "-c", "grep -c clip-shim /proc/self/mountinfo || true") == "0"
