"""A host for one test: clip-shim's own directories, a mount namespace, and everything started in it ended at the end.

Three kinds of mount namespace: `plain` (this one), `shared` (a new one with `/` rshared, as systemd makes it on most
hosts) and `legacy` (a new one without the cgroup2 mount of a hybrid host, which crun refuses to run beside).
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from tests.support import leaks

ROOT = Path(__file__).resolve().parents[2]
CLIP_SHIM = Path(sys.executable).parent / "clip-shim"
KINDS = ("plain", "shared", "legacy")
_PREPARE = {
    "shared": "mount --make-rshared /",
    "legacy": "mountpoint -q /sys/fs/cgroup/unified && umount /sys/fs/cgroup/unified; true",
}
WAIT = 30.0  # seconds any part is given to become ready or to end


def wait_for(what: str, done: Any, *, timeout: float = WAIT) -> None:
    """Return when `done()` is true. AssertionError that names `what` after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not done():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not so after {timeout:g} s")
        time.sleep(0.02)


def disk_directory() -> Path:
    """A new directory on a disk: EROFS images and overlay uppers cannot lie on every file system. Short: sockets
    live in it."""
    prefix = f"{leaks.PREFIX}{os.environ.get(leaks.MARK, 'x')}-"
    return Path(tempfile.mkdtemp(prefix=prefix, dir=os.environ.get("CLIP_SHIM_TEST_DIR", "/var/tmp")))


class Host:
    """See the module. Use as a context manager. `base` holds everything; `env` is what children get."""

    def __init__(self, kind: str = "plain", *, settings: Mapping[str, str] | None = None) -> None:
        self.kind = kind
        self.base = disk_directory()
        self.indexes = self.base / "indexes"
        self.run_dir = self.base / "run"
        self.state_dir = self.base / "state"
        for path in (self.indexes, self.run_dir, self.state_dir, self.base / "log"):
            path.mkdir(mode=0o700)
        (self.base / "config.yaml").write_text("{}\n")
        self.clip_env = {
            "CLIP_SHIM_RUN_DIR": str(self.run_dir),
            "CLIP_SHIM_STATE_DIR": str(self.state_dir),
            "CLIP_SHIM_CONFIG": str(self.base / "config.yaml"),
            "CLIP_SHIM_TRUST_PATHS": str(self.indexes),
            "CLIP_SHIM_BACKGROUND_ENABLED": "false",  # tests count what is fetched
            "CLIP_SHIM_CACHE_FREE_LOW": "0",  # however full this machine's disk is
            "CLIP_SHIM_TRUST_REGISTRIES": "*,127.0.0.1,localhost",
            "CLIP_SHIM_FALLBACK": "lazy",  # what fails is to fail at once
            leaks.MARK: os.environ.get(leaks.MARK, self.base.name),
            **(settings or {}),
        }
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("CLIP_SHIM_", "DOCKER_", "CONTAINER"))}
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed is compiled: a restart takes half the time
        self.env |= self.clip_env
        self._prefix: list[str] = []
        self._holder: subprocess.Popen[bytes] | None = None
        self._children: list[subprocess.Popen[bytes]] = []

    # Life

    def __enter__(self) -> Host:
        if self.kind != "plain":
            script = f"{_PREPARE[self.kind]} && echo ready && exec sleep infinity"
            self._holder = subprocess.Popen(
                ["unshare", "-m", "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=self.env
            )
            assert self._holder.stdout is not None
            assert self._holder.stdout.readline() == b"ready\n", "no new mount namespace"
            self._prefix = ["nsenter", "-m", "-t", str(self._holder.pid)]
        return self

    def __exit__(self, *_: object) -> None:
        """End what was started, undo the mounts, remove the directory. Fails if something survives."""
        for container in self.base.glob("oci/*"):  # what a test or an interruption left
            self.run(*self.oci, "delete", "--force", container.name, check=False)
        ended = [(child, stop(child)) for child in reversed(self._children)]
        problems = [f"had to kill {child.args!r}" for child, well in ended if not well]
        self._end_rest()
        problems += self._unmount()
        if self._holder is not None:
            self._holder.kill()
            self._holder.wait()
        if not problems:
            shutil.rmtree(self.base)
        assert not problems, "; ".join(problems)

    def trust_registry(self, address: str) -> None:
        """Let indexes lead to a registry on a loopback address."""
        both = f"{self.clip_env['CLIP_SHIM_TRUST_REGISTRIES']},{address}"
        self.clip_env["CLIP_SHIM_TRUST_REGISTRIES"] = self.env["CLIP_SHIM_TRUST_REGISTRIES"] = both

    # Running things

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        input: str | None = None,  # noqa: A002 - subprocess's own name
        timeout: float = 120,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end inside the namespace. With `check`, a failure shows the command and all it printed."""
        words = [*self._prefix, *map(str, command)]
        done = subprocess.run(
            words, input=input, stdin=None if input is not None else subprocess.DEVNULL, capture_output=True, text=True,
            errors="surrogateescape", timeout=timeout, env={**self.env, **(env or {})}, cwd=cwd,
        )  # fmt: skip
        assert not check or done.returncode == 0, (
            f"{shlex.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.logs()}"
        )
        return done

    def output(self, *command: str | Path, **more: Any) -> str:
        return self.run(*command, **more).stdout

    def start(self, *command: str | Path, log: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start in the background; stdout and stderr go to the file log/`log`. Ended with the host."""
        file: IO[bytes]
        with (self.base / "log" / log).open("ab") as file:
            child = subprocess.Popen(
                [*self._prefix, *map(str, command)], stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                env={**self.env, **(env or {})}, start_new_session=True,
            )  # fmt: skip
        self._children.append(child)
        return child

    def logs(self, lines: int = 10) -> str:
        """The ends of all logs, for a failure's message."""
        out = []
        for path in sorted(
            [*(self.base / "log").iterdir(), *self.run_dir.glob("*.log"), *self.state_dir.glob("*.log")]
        ):
            text = [line for line in path.read_text(errors="replace").splitlines() if "level=info" not in line]
            out.append("\n".join([f"--- {path.name}", *text[-lines:]]))
        return "\n".join(out)

    # clip-shim

    def clip(self, *arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        return self.run(CLIP_SHIM, *arguments, **more)

    def runtime_path(self) -> str:
        """The file that engines are given as the runtime, from the public face."""
        return str(json.loads(self.clip("config", "show", "--json").stdout)["runtime_path"])

    @property
    def runtime(self) -> Path:
        """A program that sets this host's environment and becomes the runtime: engines pass on only parts of theirs."""
        path = self.base / "clip-runtime"
        if not path.exists():
            exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in self.clip_env.items())
            path.write_text(f'#!/bin/sh\n{exports}exec {shlex.quote(self.runtime_path())} "$@"\n')
            path.chmod(0o755)
        return path

    @property
    def oci(self) -> list[str | Path]:
        """How bare containers of this host are run: the runtime, with a state directory of its own."""
        return [self.runtime, "--root", self.base / "oci"]

    def start_daemon(self) -> subprocess.Popen[bytes]:
        """The daemon, in this host's namespace (`self.daemon`); returns when it answers."""
        child = self.start(CLIP_SHIM, "daemon", "--supervise", log="daemon")
        wait_for(
            "the daemon answers", lambda: child.poll() is not None or self.clip("status", check=False).returncode == 0
        )
        assert child.poll() is None, f"the daemon ended\n{self.logs()}"
        self.daemon = child
        return child

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.clip("status", "--json").stdout)
        return answer

    def index(self, reference: str, name: str | None = None, *options: str) -> Path:
        """Index an image; the file lies where annotations may point to."""
        path = self.indexes / f"{name or reference.rsplit('/', 1)[-1].replace(':', '-')}.clip"
        self.clip("index", reference, "-o", path, *options, timeout=300)
        return path

    # What the kernel says

    def mounts(self) -> list[tuple[str, str, str]]:
        """(fstype, mount point, source) of the mounts in this host's namespace that lie below `base` or are clip
        overlays."""
        pid = self._holder.pid if self._holder is not None else os.getpid()
        found = []
        for line in Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape").splitlines():
            left, _, right = line.partition(" - ")
            point = left.split(" ")[4]
            fstype, source = right.split(" ")[:2]
            if point.startswith(f"{self.base}/"):
                found.append((fstype, point, source))
        return found

    def seen(self, path: Path) -> Path:
        """`path` as this host's namespace sees it, for programs outside."""
        return path if self._holder is None else Path(f"/proc/{self._holder.pid}/root{path}")

    def clip_overlays(self) -> list[str]:
        """Mount points of overlays that the runtime made."""
        return [point for fstype, point, source in self.mounts() if fstype == "overlay" and source.startswith("clip:")]

    def processes(self) -> Iterator[int]:
        """Living processes whose command line, environment or root file system names this host's directory."""
        needle = os.fsencode(self.base)
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                with open(entry / "mountinfo", "rb") as mounts:  # a container's environment says nothing of us
                    text += mounts.readline()
                if needle in text and (self._holder is None or int(entry.name) != self._holder.pid):
                    yield int(entry.name)

    def _end_rest(self) -> None:
        """The daemon that a wrapper started, shims whose engine is gone, containers."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in list(self.processes()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            with contextlib.suppress(AssertionError):
                wait_for("processes end", lambda: not list(self.processes()), timeout=5)

    def _unmount(self) -> list[str]:
        for _ in range(3):
            for _, point, _ in sorted(self.mounts(), key=lambda mount: -len(mount[1])):
                subprocess.run([*self._prefix, "umount", point], stderr=subprocess.DEVNULL)
        return [f"still mounted: {point}" for _, point, _ in self.mounts()]


def stop(child: subprocess.Popen[bytes], timeout: float = WAIT) -> bool:
    """SIGTERM, then SIGKILL to its session. Whether it ended by itself."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            return False
    return True
