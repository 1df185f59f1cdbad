"""`install` and `uninstall` with real engines: what they wrote is what the engine runs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.engines import Containerd, Docker, Podman, find_runtime
from tests.support.host import Host, wait_for


@pytest.fixture(scope="module")
def host(registry_address: str) -> Iterator[Host]:
    """One with mounts of its own: podman's drop-in lies where podman looks for it."""
    with Host("shared") as made:
        made.trust_registry(registry_address)
        made.start_daemon()
        yield made


def install(host: Host, verb: str, engine: str, config: Path, *more: str, check: bool = True) -> str:
    """The engine runs a program that sets the host's environment, and becomes the launcher."""
    words = [verb, engine, "--config", config, "--runtime-path", str(host.runtime), *more]
    done = host.clip(*words, check=check)
    return done.stdout + done.stderr


def test_docker(host: Host, thin: Callable[[str], str]) -> None:
    config = host.base / "daemon.json"
    config.write_text(json.dumps({"labels": ["site=a"], "runtimes": {"plain": {"path": find_runtime("runc")}}}))
    with Docker(host, config=config) as docker:
        assert docker.process is not None
        said = install(host, "install", "docker", config)
        assert "now:  systemctl reload docker" in said
        os.kill(docker.process.pid, signal.SIGHUP)
        wait_for("dockerd has read it", lambda: '"clip"' in docker.output("info", "-f", "{{json .Runtimes}}"))
        image = docker.pull(thin("small"))
        assert docker.run("--rm", image, "cat", "/data/one").stdout == "changed in a higher layer"
        docker.run("-d", "--name=needs-it", image, "sleep", "1000")
        docker.call("create", "--runtime=plain", "--name=needs-it-not", image)
        refused = install(host, "uninstall", "docker", config, check=False)
        assert "1 containers of Docker need the runtime clip: needs-it\n" in refused
        docker.call("rm", "-f", "needs-it")
        install(host, "uninstall", "docker", config)
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
        assert f'BinaryName = "{host.runtime}"' in dumped
        assert ".containerd.runtimes.runc]" in dumped
        image = containerd.pull(thin("small"))
        containerd.run("-d", image, "box", "sleep", "1000")
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

        said = host.clip("install", "podman", "--runtime-path", str(host.runtime)).stdout
        assert "written /etc/containers/containers.conf.d/50-clip-shim.conf" in said
        assert call("--runtime", "clip", "info", "-f", "{{.Host.OCIRuntime.Path}}") == str(host.runtime)
        assert call("--runtime", "runc", "info", "-f", "{{.Host.OCIRuntime.Name}}") == "runc"
        image = podman.pull(thin("small"))
        assert call("--runtime", "clip", "run", "--rm", image, "cat", "/data/one") == "changed in a higher layer"
        call("--runtime", "clip", "run", "-d", "--name=box", image, "sleep", "1000")
        refused = host.run(
            "sh", "-c", f"clip-shim uninstall podman --runtime-path {host.runtime}", env=plain | path(host), check=False
        )
        assert "1 containers of podman need the runtime clip: box" in refused.stderr
        call("rm", "-f", "-t", "0", "box")
        host.clip("uninstall", "podman", "--runtime-path", str(host.runtime))
        assert list((etc / "containers.conf.d").iterdir()) == []


def path(host: Host) -> dict[str, str]:
    from tests.support.host import CLIP_SHIM

    return {"PATH": f"{CLIP_SHIM.parent}:{host.env['PATH']}"}
