"""Private engines: Docker, containerd and podman, each in directories, namespaces and sockets of its own.

Nothing of the machine's own engines is used or touched: own roots, own sockets, no bridge, no iptables rule, cgroups
through cgroupfs. The runtime `clip` is the host's (see host.py), `plain` is runc itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.host import Host, stop, wait_for


def find_runtime(name: str) -> str:
    """Absolute path of runc or crun: podman and containerd call runtimes with an empty PATH."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    assert found, f"no {name} here: packaging/install-deps.sh installs it"
    return found


class Engine:
    """What the three have in common. `command` starts every call of its client."""

    name: str

    def __init__(self, host: Host, *, clip: bool = True) -> None:
        """clip=False: `clip` is runc itself, to prove that a test and the engine work without clip-shim."""
        self.host = host
        self.plain = find_runtime("runc")
        self.clip = str(host.runtime) if clip else self.plain
        self.base = host.base / self.name
        self.base.mkdir(exist_ok=True)
        self._pulled: set[str] = set()
        self._pulling = threading.Lock()

    def call(self, *arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        raise NotImplementedError

    def _pull(self, reference: str) -> None:
        raise NotImplementedError

    def pull(self, reference: str) -> str:
        """Pull from the local registry, once. Returns `reference`."""
        with self._pulling:
            if reference not in self._pulled:
                self._pull(reference)
                self._pulled.add(reference)
        return reference

    def output(self, *arguments: str | Path, **more: Any) -> str:
        """stdout of the client, without the last newline."""
        return self.call(*arguments, **more).stdout.rstrip("\n")


class Containerd(Engine):
    """containerd with `ctr`. Also what dockerd is put on."""

    name = "containerd"

    def __init__(self, host: Host, *, clip: bool = True) -> None:
        super().__init__(host, clip=clip)
        self.socket = self.base / "c.sock"
        self.config = self.base / "config.toml"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Containerd:
        self.config.write_text(
            f'version = 2\nroot = "{self.base}/root"\nstate = "{self.base}/state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\n  address = "{self.socket}"\n[debug]\n  level = "warn"\n'
        )
        self.process = self.host.start("containerd", "--config", self.config, log="containerd")
        wait_for("containerd answers", lambda: self.call("version", check=False).returncode == 0)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            for task in self.output("tasks", "ls", "-q").split():
                self.call("tasks", "kill", "-s", "KILL", task, check=False)
                wait_for("the task ends", lambda task=task: self.state(task) != "RUNNING", timeout=10)  # type: ignore[misc]
                self.call("tasks", "delete", task, check=False)
            for container in self.output("containers", "ls", "-q").split():
                self.call("containers", "delete", container, check=False)
        if self.process is not None:
            stop(self.process)

    def call(self, *arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        return self.host.run("ctr", "-a", self.socket, *arguments, **more)

    def _pull(self, reference: str) -> None:
        self.call("images", "pull", "--plain-http", reference)

    def run(self, *arguments: str | Path, runtime: str | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
        return self.call("run", "--runc-binary", runtime or self.clip, *arguments, **more)

    def state(self, task: str) -> str:
        lines = [line.split() for line in self.output("tasks", "ls").splitlines()]
        return next((words[2] for words in lines if words[0] == task), "")


class Docker(Engine):
    """dockerd on a containerd of its own; runtime names `clip` and `plain`."""

    name = "docker"

    def __init__(
        self, host: Host, *, clip: bool = True, config: Path | None = None, options: Sequence[str] = ()
    ) -> None:
        """config: a daemon.json, which then says what runtimes there are; options: more of dockerd's."""
        super().__init__(host, clip=clip)
        self.options = options
        self.containerd = Containerd(host, clip=clip)
        self.socket = self.base / "d.sock"
        self.config = config
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Docker:
        self.containerd.__enter__()
        self.start()
        return self

    def start(self) -> None:
        """Start dockerd (again). Returns when it answers."""
        runtimes = ["--add-runtime", f"clip={self.clip}", "--add-runtime", f"plain={self.plain}"]
        self.process = self.host.start(
            "dockerd",
            *("--data-root", self.base / "root", "--exec-root", self.base / "exec", "--pidfile", self.base / "pid"),
            *("--host", f"unix://{self.socket}", "--containerd", self.containerd.socket),
            *("--iptables=false", "--ip6tables=false", "--bridge=none", "--log-level=warn"),
            *("--exec-opt", "native.cgroupdriver=cgroupfs", "--storage-driver=overlay2"),
            *(runtimes if self.config is None else ("--config-file", self.config)),
            *self.options,
            log="dockerd",
        )
        wait_for("dockerd answers", lambda: self.call("version", check=False).returncode == 0)

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            if containers := self.output("ps", "-aq").split():
                self.call("rm", "-f", *containers, check=False)
        if self.process is not None:
            stop(self.process)
        self.containerd.__exit__()

    def call(self, *arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        return self.host.run("docker", "--config", self.base, "-H", f"unix://{self.socket}", *arguments, **more)

    def _pull(self, reference: str) -> None:
        self.call("pull", "-q", reference)

    def run(self, *arguments: str | Path, runtime: str = "clip", **more: Any) -> subprocess.CompletedProcess[str]:
        return self.call("run", "--network=none", f"--runtime={runtime}", *arguments, **more)

    def inspect(self, container: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.output("inspect", container))[0]
        return found

    def merged(self, container: str) -> Path:
        return Path(self.inspect(container)["GraphDriver"]["Data"]["MergedDir"])

    def extracted(self, reference: str, target: Path) -> None:
        """The image as Docker unpacked it: its own overlay, read-only, mounted at `target`."""
        data = json.loads(self.output("image", "inspect", reference))[0]["GraphDriver"]["Data"]
        lowers = ":".join(filter(None, [data["UpperDir"], data.get("LowerDir", "")]))
        target.mkdir()
        if ":" in lowers:
            self.host.run("mount", "-t", "overlay", "-o", f"ro,lowerdir={lowers}", "overlay", target)
        else:
            self.host.run("mount", "--bind", lowers, target)


class Podman(Engine):
    """podman: no daemon, so only directories. Its runtime `clip` is chosen by configuration or `--runtime`."""

    name = "podman"

    def __enter__(self) -> Podman:
        (self.base / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{self.base}/root"\nrunroot = "{self.base}/run"\n'
            '[storage.options.overlay]\nmountopt = ""\n'  # the kernel's overlay, never fuse-overlayfs
        )
        # ulimits: the default ones may be above what this machine's root may set (no CAP_SYS_RESOURCE)
        (self.base / "containers.conf").write_text(
            '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]\nnetns = "none"\n'
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "plain"\n'
            f'runtime_supports_json = ["clip", "plain"]\ntmp_dir = "{self.base}/tmp"\n'
            f'[engine.runtimes]\nplain = ["{self.plain}"]\nclip = ["{self.clip}"]\n'
        )
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.call("rm", "-f", "-t", "0", "--all", check=False)

    def call(self, *arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        env = {
            "CONTAINERS_STORAGE_CONF": str(self.base / "storage.conf"),
            "CONTAINERS_CONF": str(self.base / "containers.conf"),
        }
        return self.host.run("podman", *arguments, env=env, **more)

    def _pull(self, reference: str) -> None:
        self.call("pull", "-q", "--tls-verify=false", reference)

    def run(self, *arguments: str | Path, runtime: str = "clip", **more: Any) -> subprocess.CompletedProcess[str]:
        return self.call("--runtime", runtime, "run", *arguments, **more)
