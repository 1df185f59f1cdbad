"""Packages built once, and clean Debian roots to install them in."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.host import disk_directory

ROOT = Path(__file__).resolve().parents[2]
NEXT = "0.1.1"  # what is upgraded to
_BINDS = "for d in proc sys dev; do mount --rbind /$d $0/$d; done; mount -t tmpfs tmpfs $0/run; "


def builder() -> ModuleType:
    """packaging/build.py as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "packaging/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build"] = module
    spec.loader.exec_module(module)
    return module


class Root:
    """A Debian root with a mount namespace of its own, in which programs are run as in a chroot."""

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self.base = disk_directory()
        self.path = self.base / "root"
        command = ["mmdebstrap", "--quiet", "--variant=minbase", "--include=ca-certificates,busybox-static", suite]
        subprocess.run([*command, str(self.path)], check=True, timeout=600)
        (self.path / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")
        (self.path / "usr/sbin/policy-rc.d").chmod(0o755)
        script = f"{_BINDS}echo ready && exec sleep infinity"
        words = ["unshare", "-m", "--propagation", "private", "sh", "-ec", script, str(self.path)]
        self._holder = subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n"

    def run(self, *command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        words = ["nsenter", "-m", "-t", str(self._holder.pid), "chroot", str(self.path), *command]
        clean = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "HOME": "/root", **env}
        done = subprocess.run(words, env=clean, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600)
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def output(self, *command: str, **env: str) -> str:
        return self.run(*command, **env).stdout

    def apt(self, *words: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        options = ["-y", "-q", "-o", "Dpkg::Use-Pty=0", "-o", "Dpkg::Options::=--force-confold"]
        return self.run("apt-get", *options, *words, check=check, **env)

    def close(self) -> None:
        """End what runs in it, and remove it."""
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                if os.readlink(entry / "root") == str(self.path):
                    os.kill(int(entry.name), 9)
        self._holder.kill()
        self._holder.wait()
        shutil.rmtree(self.base)


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the deb and the rpm of this version, and the deb of a next one."""
    directory = tmp_path_factory.mktemp("packages")
    module = builder()
    module.build(directory, ["deb", "rpm"])
    module.build(directory, ["deb"], NEXT)
    return directory


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def root(request: pytest.FixtureRequest) -> Iterator[Root]:
    root = Root(request.param)
    yield root
    root.close()
