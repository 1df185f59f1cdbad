"""`install` and `uninstall` with real engines: what they wrote is what the engine runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.doctor import doctor
from tests.support.engines import Containerd, Docker, Podman, find_runtime
from tests.support.host import Host, wait_for


@pytest.fixture(scope="module")
def host(registry_address: str) -> Iterator[Host]:
    """One with mounts of its own: podman's drop-in lies where podman looks for it."""
    with Host("shared") as made:
        made.trust_registry(registry_address)
        made.start_daemon()
        yield made


def launcher(host: Host) -> Path:
    """A program that sets the host's environment and becomes the launcher; its name makes it count as ours."""
    path = launcher_path(host)
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        shutil.copy(host.runtime, path)
    return path


def launcher_path(host: Host) -> Path:
    return host.base / "libexec/clip-shim-runtime"


def said(host: Host, engine: str) -> list[tuple[str, str]]:
    """(status, found) of `doctor --check ENGINE`, of this host's engines."""
    found = doctor(host, engine)[engine]
    return [(item["status"], item["found"]) for item in found if str(host.base) in item["found"] + item["expected"]]


def install(host: Host, verb: str, engine: str, config: Path, *more: str, check: bool = True) -> str:
    words = [verb, engine, "--config", config, "--runtime-path", str(launcher(host)), *more]
    done = host.clip(*words, check=check)
    return done.stdout + done.stderr


def test_docker(host: Host, thin: Callable[[str], str]) -> None:
    config = host.base / "daemon.json"
    config.write_text(json.dumps({"labels": ["site=a"], "runtimes": {"plain": {"path": find_runtime("runc")}}}))
    with Docker(host, config=config) as docker:
        assert docker.process is not None
        assert said(host, "docker")[0][0] == "skipped"
        assert "now:  systemctl reload docker" in install(host, "install", "docker", config)
        assert said(host, "docker")[0][0] == "failed"
        assert said(host, "docker")[0][1].endswith("it was not reloaded")
        os.kill(docker.process.pid, signal.SIGHUP)
        wait_for("dockerd has read it", lambda: '"clip"' in docker.output("info", "-f", "{{json .Runtimes}}"))
        assert "runtime clip of Docker leads to another installation" in said(host, "docker")[0][1]
        launcher(host).rename(host.base / "gone")
        assert said(host, "docker") == [
            ("failed", f"Docker has the runtime clip, but {launcher_path(host)} is not there")
        ]
        (host.base / "gone").rename(launcher_path(host))
        image = docker.pull(thin("small"))
        assert docker.run("--rm", image, "cat", "/data/one").stdout == "changed in a higher layer"
        docker.run("-d", "--name=needs-it", image, "sleep", "1000")
        docker.call("create", "--runtime=plain", "--name=needs-it-not", image)
        refused = install(host, "uninstall", "docker", config, check=False)
        assert "1 containers of Docker need the runtime clip: needs-it\n" in refused
        docker.call("rm", "-f", "needs-it")
        install(host, "uninstall", "docker", config)
        assert "still has the runtime clip" in said(host, "docker")[0][1]
        os.kill(docker.process.pid, signal.SIGHUP)
        wait_for("dockerd has read it", lambda: '"clip"' not in docker.output("info", "-f", "{{json .Runtimes}}"))
        assert list(json.loads(docker.output("info", "-f", "{{json .Runtimes}}"))).count("plain") == 1


def test_docker_with_runtimes_on_its_command_line(host: Host) -> None:
    """dockerd refuses to start with both; so does install."""
    with Docker(host):
        refused = host.clip("install", "docker", "--dry-run", check=False)
        assert refused.returncode == 1
        assert "dockerd was started with --add-runtime clip=" in refused.stderr


def test_containerd(host: Host, thin: Callable[[str], str]) -> None:
    """containerd takes what was written, and keeps its own runc; what uses the runtime is seen."""
    with Containerd(host) as containerd:
        config = host.base / "cri.toml"
        config.write_text(containerd.config.read_text().replace("disabled_plugins", "# disabled_plugins"))
        assert "now:  systemctl restart containerd" in install(host, "install", "containerd", config)
        dumped = host.output("containerd", "--config", config, "config", "dump")
        assert f'BinaryName = "{launcher(host)}"' in dumped
        assert ".containerd.runtimes.runc]" in dumped
        image = containerd.pull(thin("small"))
        containerd.run("-d", image, "box", "sleep", "1000", runtime=str(launcher(host)))
        refused = install(host, "uninstall", "containerd", config, check=False)
        assert "containers of containerd need the runtime clip: default/box" in refused
    with Containerd(host) as containerd:
        install(host, "uninstall", "containerd", config)
        assert "runtimes" not in config.read_text()


def test_containerd_starts_with_it(host: Host) -> None:
    """Its CRI plugin comes up with the handler."""
    with Containerd(host) as containerd:
        text = containerd.config.read_text().replace("disabled_plugins", "# disabled_plugins")
        text = text.replace(str(containerd.base), str(containerd.base / "cri"))
        (containerd.base / "cri").mkdir()
        config = containerd.base / "cri" / "config.toml"
        config.write_text(text)
        install(host, "install", "containerd", config)
        socket = containerd.base / "cri" / "c.sock"
        child = host.start("containerd", "--config", config, log="containerd-cri")
        ctr = ["ctr", "-a", str(socket)]
        wait_for("containerd answers", lambda: host.run(*ctr, "version", check=False).returncode == 0)
        rows = [line.split() for line in host.output(*ctr, "plugins", "ls").splitlines()]
        assert [row[-1] for row in rows if row[:2] == ["io.containerd.grpc.v1", "cri"]] == ["ok"]
        assert said(host, "containerd")[-1][1].startswith(
            "the runtime clip of containerd leads to another installation"
        )
        config.write_text(config.read_text() + "\n")
        assert [status for status, text in said(host, "containerd") if "was changed after" in text] == ["failed"]
        child.terminate()


def test_podman(host: Host, thin: Callable[[str], str]) -> None:
    """Its usual drop-in directory, in a mount namespace of the host's own."""
    etc = host.base / "etc-containers"
    host.run("cp", "-a", "/etc/containers", etc)
    host.run("mount", "--bind", etc, "/etc/containers")
    with Podman(host) as podman:
        settings = (podman.base / "containers.conf").read_text().partition("[engine.runtimes]")[0]
        settings = settings.replace('runtime = "plain"', "").replace('runtime_supports_json = ["clip", "plain"]', "")
        (etc / "containers.conf").write_text(settings)
        plain = {"CONTAINERS_STORAGE_CONF": str(podman.base / "storage.conf")}

        def call(*words: str) -> str:
            return host.run("podman", *words, env=plain).stdout.rstrip("\n")

        written = host.clip("install", "podman", "--runtime-path", launcher(host)).stdout
        assert "written /etc/containers/containers.conf.d/50-clip-shim.conf" in written
        assert call("--runtime", "clip", "info", "-f", "{{.Host.OCIRuntime.Path}}") == str(launcher(host))
        assert said(host, "podman")[0][1].startswith("the runtime clip of podman leads to another installation")
        assert call("--runtime", "runc", "info", "-f", "{{.Host.OCIRuntime.Name}}") == "runc"
        image = podman.pull(thin("small"))
        assert call("--runtime", "clip", "run", "--rm", image, "cat", "/data/one") == "changed in a higher layer"
        call("--runtime", "clip", "run", "-d", "--name=box", image, "sleep", "1000")
        refused = host.clip("uninstall", "podman", "--runtime-path", launcher(host), env=plain, check=False)
        assert "1 containers of podman need the runtime clip: box" in refused.stderr
        call("rm", "-f", "-t", "0", "box")
        host.clip("uninstall", "podman", "--runtime-path", launcher(host))
        assert list((etc / "containers.conf.d").iterdir()) == []
