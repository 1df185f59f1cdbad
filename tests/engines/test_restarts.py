"""What runs beneath and around a container is killed or restarted: engines, runc, the whole machine's memory of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shim.daemon import mounter
from tests.support import bundle, expected, images
from tests.support.engines import Containerd, Docker
from tests.support.host import Host, stop, wait_for

Reference = Callable[[str], str]


@pytest.fixture(scope="module")
def host(registry_address: str) -> Iterator[Host]:
    with Host() as made:
        made.trust_registry(registry_address)
        made.start_daemon()
        yield made


@pytest.fixture(scope="module")
def index(host: Host, pushed: Reference) -> Path:
    return host.index(pushed("small"), "small")


@pytest.fixture(scope="module")
def small(host: Host, pushed: Reference, registry_address: str) -> str:
    reference = f"{registry_address}/restarts/small-thin:latest"
    host.clip("convert", pushed("small"), reference, timeout=300)
    return reference


@pytest.fixture(autouse=True)
def nothing_is_left(host: Host) -> Iterator[None]:
    yield
    mounter.sweep_containers(str(host.run_dir), str(host.state_dir))
    assert host.clip_overlays() == []
    assert [mount for mount in host.mounts() if "/containers/" in mount[1]] == []
    for top in (host.run_dir / "containers", host.state_dir / "containers"):
        assert [path for path in top.glob("*/*") if path.is_dir()] == []


def digest(name: str = "data/noise.bin") -> str:
    return images.file_digest(expected.tree(images.image("small")) / name)


def kill(process: subprocess.Popen[bytes] | None) -> None:
    assert process is not None
    process.kill()
    process.wait()


# each time it starts it writes, and reads when it is told to
BOX = "echo kept >> /kept; until [ -e /go ]; do sleep 0.1; done; sha256sum /data/noise.bin > /sum; sleep 1000"


@pytest.mark.parametrize("how", ["stopped", "stopped, live-restore", "killed", "killed, live-restore"])
def test_dockerd(host: Host, small: str, how: str) -> None:
    """With live-restore a container runs on without dockerd, and fetches what it reads."""
    live = how.endswith("live-restore")
    with Docker(host, options=["--live-restore"] if live else []) as docker:
        docker.pull(small)
        docker.run("-d", "--name", "box", "--stop-signal=KILL", small, "sh", "-c", BOX)
        wait_for("it has written", lambda: docker.call("exec", "box", "cat", "/kept", check=False).returncode == 0)
        pid = docker.inspect("box")["State"]["Pid"]
        if how.startswith("stopped"):
            assert docker.process is not None
            assert stop(docker.process)
        else:
            kill(docker.process)
        if live:
            reads_on(host, Path(f"/proc/{pid}/root"))
        docker.start()
        if live:
            assert docker.inspect("box")["State"]["Running"]
            assert docker.output("exec", "box", "sha256sum", "/data/noise.bin").split()[0] == digest()
            docker.call("stop", "-t", "0", "box")
        else:
            wait_for("dockerd has ended it", lambda: not docker.inspect("box")["State"]["Running"])
        docker.call("start", "box")
        assert docker.output("exec", "box", "sha256sum", "/data/noise.bin").split()[0] == digest()
        wait_for("it has written again", lambda: docker.output("exec", "box", "cat", "/kept") == "kept\nkept")
        assert len(host.clip_overlays()) == 1
        docker.call("rm", "-f", "box")
        assert not docker.output("ps", "-aq")


def test_a_container_ends_without_dockerd(host: Host, small: str) -> None:
    with Docker(host, options=["--live-restore"]) as docker:
        docker.pull(small)
        for name in ("removed", "started"):
            docker.run("-d", "--name", name, small, "sh", "-c", "echo kept >> /kept; sleep 1000")
        pids = [docker.inspect(name)["State"]["Pid"] for name in ("removed", "started")]
        roots = [Path(f"/proc/{pid}/root") for pid in pids]
        wait_for("both have written", lambda: all((root / "kept").exists() for root in roots))
        assert docker.process is not None
        assert stop(docker.process)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        docker.start()
        wait_for("dockerd knows it", lambda: not docker.output("ps", "-q"))
        docker.call("rm", "removed")
        docker.call("start", "started")
        wait_for("it has written again", lambda: docker.output("exec", "started", "cat", "/kept") == "kept\nkept")
        docker.call("rm", "-f", "started")


def reads_on(host: Host, root: Path) -> None:
    """`BOX` reads what neither the cache nor the kernel has."""
    host.clip("cache", "clean", "--max-bytes", "0")
    Path("/proc/sys/vm/drop_caches").write_text("1")
    before = fetched(host)
    (root / "go").touch()
    wait_for("it has read", lambda: (root / "sum").exists() and (root / "sum").read_text())
    assert (root / "sum").read_text().split()[0] == digest()
    assert fetched(host) - before > 3_000_000


def fetched(host: Host) -> int:
    return sum(layer["fetched_bytes"] for layer in host.status()["layers"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_containerd(host: Host, pushed: Reference, index: Path, number: int) -> None:
    """The container's shim lives on, and its tree."""
    with Containerd(host) as containerd:
        reference = containerd.pull(pushed("blank"))
        containerd.run("-d", "--annotation", f"io.clip.index={index}", reference, "box", "sleep", "1000")
        assert containerd.process is not None
        containerd.process.send_signal(number)
        containerd.process.wait(30)
        containerd.__enter__()
        said = containerd.output("tasks", "exec", "--exec-id", "e1", "box", "sha256sum", "/data/noise.bin")
        assert said.split()[0] == digest()
        containerd.call("tasks", "kill", "-s", "KILL", "box")
        wait_for("it has ended", lambda: containerd.state("box") == "STOPPED")
        containerd.call("tasks", "delete", "box")
        containerd.call("containers", "delete", "box")


def test_runc_is_killed(host: Host, index: Path) -> None:
    """In the foreground, after the wrapper has become it: the container lives on until it is deleted."""
    made = bundle.make(host.base / "killed", ["sh", "-c", "echo up; while :; do sleep 1; done"], index=index)
    runc = host.start(*host.oci, "run", "--bundle", made, "killed", log="killed")
    wait_for("it runs", lambda: b"up" in (host.base / "log/killed").read_bytes())
    kill(runc)
    assert mounter.sweep_containers(str(host.run_dir), str(host.state_dir)) == []
    assert len(host.clip_overlays()) == 1
    host.run(*host.oci, "delete", "--force", "killed")
    assert host.clip_overlays() == []


def test_reboot(host: Host, small: str, index: Path) -> None:
    """All processes and mounts are gone, and /run; /var is kept. An engine's container starts again with what it wrote;
    of a bare one nothing is left."""
    with Docker(host) as docker:
        docker.pull(small)
        docker.run("-d", "--name", "box", "--stop-signal=KILL", small, "sh", "-c", "echo kept >> /kept; sleep 1000")
        wait_for("it has written", lambda: docker.call("exec", "box", "cat", "/kept", check=False).returncode == 0)
        made = bundle.make(host.base / "bare", ["sh", "-c", "echo up > /up; sleep 1000"], index=index)
        detached(host, made)
        reboot(host)
        assert len(list((host.state_dir / "containers").glob("*/*"))) == 1  # the bare one's upper
        host.start_daemon()
        wait_for("it is swept", lambda: not list((host.state_dir / "containers").glob("*/*")))
        docker.containerd.__enter__()
        docker.start()
        docker.call("start", "box")
        assert docker.output("exec", "box", "sha256sum", "/data/noise.bin").split()[0] == digest()
        wait_for("it has written again", lambda: docker.output("exec", "box", "cat", "/kept") == "kept\nkept")
        detached(host, made)
        assert host.output(*host.oci, "exec", "bare", "sha256sum", "/data/noise.bin").split()[0] == digest()
        host.run(*host.oci, "delete", "--force", "bare")


def detached(host: Host, made: Path) -> None:
    """Its output goes to a file: a pipe would be kept open by the container."""
    runc = host.start(*host.oci, "run", "--detach", "--bundle", made, made.name, log=made.name)
    assert runc.wait(30) == 0, host.logs()


def reboot(host: Host) -> None:
    """As far as one can without one."""
    for pid in list(host.processes()):
        os.kill(pid, signal.SIGKILL)
    wait_for("all is dead", lambda: not list(host.processes()))
    for child in host._children:
        child.wait()
    for _, point, _ in reversed(host.mounts()):
        subprocess.run(["umount", "-l", point], stderr=subprocess.DEVNULL)
    assert host.mounts() == []
    for path in (host.run_dir, host.base / "oci", *host.base.glob("*/exec"), *host.base.glob("containerd/state")):
        shutil.rmtree(path, ignore_errors=True)
    host.run_dir.mkdir()
