"""A Debian 13 with the package, booted by systemd: one for each test file."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim import __version__
from tests.support.debianroot import BOOTED, NEXT, SYSTEMD, DebianRoot, builder
from tests.support.host import wait_for

RUNTIME = "/usr/lib/clip-shim/libexec/clip-shim/clip-shim-runtime"


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("packages")
    module = builder()
    module.build(directory, ["deb"])
    module.build(directory, ["deb"], NEXT)
    return directory


@pytest.fixture(scope="module")
def machine(packages: Path, registry_address: str) -> Iterator[DebianRoot]:
    machine = DebianRoot("trixie", f"{BOOTED},docker.io,docker-cli")
    try:
        (deb,) = packages.glob(f"clip-shim_{__version__}-*.deb")
        subprocess.run(
            ["chroot", machine.path, "dpkg", "-i", machine.offer(deb)], check=True, stdout=subprocess.DEVNULL
        )
        config = machine.path / "etc/clip-shim/config.yaml"
        edited = config.read_text().replace("\ntrust:\n", f'\ntrust:\n  registries: ["{registry_address}"]\n')
        edited = edited.replace("\nmetrics:\n", "\nmetrics:\n  listen: unix:/run/clip-shim-metrics.sock\n")
        config.write_text(edited)
        (machine.path / "etc/docker").mkdir(exist_ok=True)
        docker = {"bridge": "none", "iptables": False, "ip6tables": False, "insecure-registries": [registry_address]}
        docker["runtimes"] = {"clip": {"path": RUNTIME}}
        (machine.path / "etc/docker/daemon.json").write_text(json.dumps(docker))
        machine.start(SYSTEMD)
        states = ("running", "degraded")
        wait_for(
            "it is up", lambda: machine.run("systemctl", "is-system-running", check=False).stdout.strip() in states
        )
        yield machine
    finally:
        machine.close()


def pid(machine: DebianRoot) -> int:
    return int(machine.unit("MainPID"))
