"""A daemon's life: it starts once, says when, ends in order, and cleans up after one that was killed."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shim.mount import syscalls
from tests.support import images, smallimage
from tests.support.daemonclient import (
    Client,
    acquire,
    descendants,
    is_running,
    log_lines,
    server_pid,
    trees,
)
from tests.support.host import CLIP_SHIM, Host, wait_for
from tests.support.proxy import Proxy
from tests.support.registry import Registry


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as registry:
        for name in ("shared-a", "small"):
            images.push(images.image(name), registry.host)
        yield registry


UNASKED = {"CLIP_SHIM_TRUST_CACHED": "if-cached"}  # so that it is the mount that waits for a stalled registry


@contextmanager
def served(
    address: str, image: str = "shared-a", **settings: str
) -> Iterator[tuple[Host, subprocess.Popen[bytes], Path]]:
    """A host, its supervised daemon, and an index."""
    with Host(settings=settings) as host:
        host.trust_registry(address)
        index = host.index(f"{address}/{image}:latest", "a")
        yield host, host.start_daemon(), index


def overlay(host: Host, index: Path) -> Path:
    """What a container has of a tree: an overlay with the source that the wrapper gives it."""
    target = host.base / "merged"
    target.mkdir()
    with Client(host) as client:
        answer = client.acquire(index)
        fd = syscalls.new_mount(
            "overlay", f"clip:{answer['index']}", [("lowerdir", f"{answer['tree']}:{host.base / 'log'}")]
        )
        syscalls.attach(fd, str(target))
        os.close(fd)
    return target


def right(number: int) -> str:
    return hashlib.sha256(smallimage.noise(100 + number, 400_000)).hexdigest()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def end(host: Host, child: subprocess.Popen[bytes]) -> int:
    child.terminate()
    return child.wait(30)


def below_run(host: Host) -> list[str]:
    return [point for _, point, _ in host.mounts() if point.startswith(f"{host.run_dir}/")]


def test_a_second_daemon_is_refused(registry: Registry) -> None:
    with served(registry.host) as (host, child, index):
        for words in (["daemon"], ["daemon", "--supervise"]):
            done = host.clip(*words, check=False, timeout=30)
            assert done.returncode == 1
            assert f"another daemon serves {host.run_dir}" in done.stderr
            assert "hint: " in done.stderr
            assert "Traceback" not in done.stderr
        other = host.base / "run2"
        done = host.clip("daemon", check=False, timeout=30, env={"CLIP_SHIM_RUN_DIR": str(other)})
        assert done.returncode == 1
        assert "another daemon uses the cache" in done.stderr
        assert not [mount for mount in host.mounts() if mount[1].startswith(str(other))]
        assert acquire(host, index)["ok"], "the first is not disturbed"
        assert child.poll() is None


@pytest.mark.parametrize("words", [["daemon"], ["daemon", "--supervise"]])
def test_a_wrong_configuration_ends_it_at_once(words: list[str]) -> None:
    with Host() as host:
        (host.base / "config.yaml").write_text("tre: auto\n")
        done = host.clip(*words, check=False, timeout=30)
        assert done.returncode == 2
        assert "unknown key `tre`" in done.stderr
        (host.base / "config.yaml").write_text("registries: {'a/b': {}}\n")
        done = host.clip(*words, check=False, timeout=30)
        assert done.returncode == 2
        assert "registries.a/b" in done.stderr
        assert below_run(host) == []


def test_directories_are_private_and_an_old_socket_is_no_obstacle() -> None:
    with Host() as host:
        for path in (host.run_dir, host.state_dir):
            path.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as old:
            old.bind(str(host.run_dir / "control.sock"))
        host.start_daemon()
        for path in (host.run_dir, host.state_dir, host.run_dir / "trees", host.state_dir / "trees"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert stat.S_IMODE((host.run_dir / "control.sock").stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["run", "state"])
def test_a_directory_of_somebody_elses_is_not_taken(name: str) -> None:
    """Made before us where anybody may: its owner could put another socket, or another image, in the place of ours."""
    with Host() as host:
        directory = host.run_dir if name == "run" else host.state_dir
        directory.mkdir(exist_ok=True)
        os.chown(directory, 65534, 65534)
        done = host.clip("daemon", check=False)
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {directory} belongs to uid 65534, not to root\nhint: chown root:root")
        if name == "run":
            with socket.socket(socket.AF_UNIX) as theirs:
                theirs.bind(str(directory / "control.sock"))
                theirs.listen()
                theirs.settimeout(0)
                for verb in ("status", "drain"):
                    done = host.clip(verb, check=False)
                    assert "belongs to uid 65534" in done.stderr
                with pytest.raises(BlockingIOError):
                    theirs.accept()
        os.chown(directory, 0, 0)


def test_ready_is_said_on_the_pipe() -> None:
    with Host() as host:
        assert _first_line(host, "daemon", "--supervise") == b"READY\n"
        wait_for("it answers", lambda: host.clip("status", check=False).returncode == 0)
        assert _first_line(host, "daemon").startswith(b"ERROR another daemon serves")
        assert _first_line(host, "daemon", "--supervise").startswith(b"ERROR another daemon serves")


def _first_line(host: Host, *words: str) -> bytes:
    """What a daemon writes to its ready pipe until it closes it: both supervisor and server must."""
    reader, writer = os.pipe()
    with open(host.base / "log/daemon", "ab") as log:
        subprocess.Popen(
            [CLIP_SHIM, *words],
            pass_fds=[writer],
            env={**host.env, "CLIP_SHIM_READY_FD": str(writer)},
            stderr=log,
            start_new_session=True,
        )
    os.close(writer)
    with open(reader, "rb") as pipe:
        return pipe.read()


def test_it_imports_nothing_from_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "shim").mkdir()
    for name in ("__init__", "__main__"):
        (tmp_path / "shim" / f"{name}.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    with Host() as host, open(host.base / "log/daemon", "ab") as log:
        subprocess.Popen([CLIP_SHIM, "daemon", "--supervise"], cwd=tmp_path, env=host.env, stderr=log)
        wait_for("it answers", lambda: host.clip("status", check=False).returncode == 0)
        assert host.status()["daemon"]["tier"] != "none"  # a job has run
    assert not (tmp_path / "was-run").exists()


def test_sigterm_without_users_leaves_nothing(registry: Registry) -> None:
    with served(registry.host) as (host, child, index):
        assert acquire(host, index)["ok"]
        assert trees(host)
        family = descendants(child.pid)
        assert len(family) >= 3  # server, fork server, resource tracker
        assert end(host, child) == 0
        assert below_run(host) == []
        assert not (host.run_dir / "control.sock").exists()
        wait_for("its helpers end", lambda: not any(map(is_running, family)))
        assert "containers still use layers" not in (host.base / "log/daemon").read_text()


def test_sigterm_with_users(registry: Registry) -> None:
    """The container keeps what the page cache has; the rest is an error, never a hang; the next daemon cleans up."""
    with served(registry.host) as (host, child, index):
        merged = overlay(host, index)
        with in_memory(merged / "common/03"):
            assert sha256(merged / "common/03") == right(3)
            assert end(host, child) == 0
            assert "containers still use layers: their uncached reads fail" in (host.base / "log/daemon").read_text()
            assert f"{host.run_dir}/blobs" in below_run(host)
            check_orphan(host, merged)
            host.start_daemon()
            assert acquire(host, index)["ok"]
            check_next(host, merged)
        syscalls.umount2(str(merged))


@contextmanager
def in_memory(path: Path) -> Iterator[None]:
    """Pages that are mapped stay when another test empties this machine's page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        hashlib.sha256(mapped).digest()
        yield


def check_orphan(host: Host, merged: Path) -> None:
    """A tree whose server is gone: cached data stays, anything else ends with an error at once."""
    assert sha256(merged / "common/03") == right(3)
    done = host.run("cat", merged / "common/17", check=False, timeout=10)
    assert done.returncode == 1
    assert "error" in done.stderr.lower() or "not connected" in done.stderr.lower()


def check_next(host: Host, merged: Path) -> None:
    """Stale mounts are gone, a new container reads the right bytes, and the old one goes on."""
    assert log_lines(host, "left by a daemon that died, detached")
    assert below_run(host).count(f"{host.run_dir}/blobs") == 1
    assert len(trees(host)) == 1
    assert sha256(Path(trees(host)[0]) / "common/17") == right(17)
    assert sha256(merged / "common/03") == right(3)


def test_a_killed_server_is_started_again(registry: Registry) -> None:
    """Its tree goes on: what is mounted, and what its containers read."""
    with served(registry.host) as (host, child, index):
        merged = overlay(host, index)
        assert sha256(merged / "common/03") == right(3)
        old = server_pid(host)
        family = descendants(old)
        mounted = below_run(host)
        os.kill(old, signal.SIGKILL)
        assert sha256(merged / "common/17") == right(17)
        assert server_pid(host) != old
        assert child.poll() is None
        wait_for("the old one's helpers end", lambda: not any(map(is_running, family)))
        assert old not in descendants(child.pid), "no zombie"
        assert acquire(host, index)["ok"]
        assert below_run(host) == mounted
        assert host.status()["images"][0]["overlays"] == 1
        syscalls.umount2(str(merged))
        assert end(host, child) == 0
        assert below_run(host) == []


@pytest.mark.parametrize("renew", [False, True], ids=["server", "supervisor"])
def test_an_upgrade_is_not_noticed(registry: Registry, renew: bool) -> None:
    """SIGTERM to the server, or SIGUSR2 to its supervisor, which then becomes the installed program as well."""
    with served(registry.host) as (host, child, index):
        merged = overlay(host, index)
        assert sha256(merged / "common/03") == right(3)
        old = server_pid(host)
        os.kill(child.pid if renew else old, signal.SIGUSR2 if renew else signal.SIGTERM)
        assert sha256(merged / "common/17") == right(17)
        wait_for("another server answers", lambda: server_pid(host) != old)
        assert log_lines(host, "containers still use layers: their uncached reads wait")
        assert acquire(host, index)["ok"]
        syscalls.umount2(str(merged))
        assert end(host, child) == 0
        assert below_run(host) == []
        assert sorted(path.name for path in host.run_dir.glob("*.sock")) == []


def test_half_an_upgrade_is_not_begun(tmp_path: Path) -> None:
    """What is installed cannot be loaded: the server goes on, and the descriptors stay, until it can."""
    with Host() as host:
        child = host.start(CLIP_SHIM, "daemon", "--supervise", log="daemon", env={"PYTHONPATH": str(tmp_path)})
        wait_for("the daemon answers", lambda: host.clip("status", check=False).returncode == 0)
        old = server_pid(host)
        (tmp_path / "shim").mkdir()
        (tmp_path / "shim/__init__.py").write_text("raise ImportError('half of it')\n")
        os.kill(child.pid, signal.SIGUSR2)
        wait_for("it is refused", lambda: "does not start, so this goes on: ImportError: half of it" in host.logs())
        assert server_pid(host) == old
        shutil.rmtree(tmp_path / "shim")
        os.kill(child.pid, signal.SIGUSR2)
        wait_for("another server answers", lambda: server_pid(host) not in (0, old))
        assert end(host, child) == 0


def test_a_wrong_configuration_is_no_end_of_reads(registry: Registry) -> None:
    """Neither an upgrade nor a crash makes them fail meanwhile: they go on when it is mended."""
    with served(registry.host) as (host, child, index):
        merged = overlay(host, index)
        assert sha256(merged / "common/03") == right(3)
        config = host.base / "config.yaml"
        mended, old = config.read_text(), server_pid(host)
        config.write_text("tre: auto\n")
        os.kill(child.pid, signal.SIGUSR2)
        wait_for("it is refused", lambda: "this goes on: shim.errors.ConfigError" in host.logs())
        assert server_pid(host) == old
        os.kill(old, signal.SIGKILL)
        wait_for("its successor says why", lambda: "error: " in host.logs() and "unknown key `tre`" in host.logs())
        assert child.poll() is None
        config.write_text(mended)
        assert sha256(merged / "common/17") == right(17)
        syscalls.umount2(str(merged))
        assert end(host, child) == 0


def test_a_job_ends_with_its_server(registry: Registry) -> None:
    """Killed in the middle of a mount that waits for the registry: neither a process nor a mount stays."""
    with Proxy(registry.host) as proxy, served(proxy.address, "small", **UNASKED) as (host, child, index):
        wait_for("the tier is known", lambda: log_lines(host, "tree tier chosen"))
        old = server_pid(host)
        idle = len(descendants(old))
        proxy.stall()
        with Client(host) as client:
            client.start_acquire(index)
            wait_for("the mount waits for the registry", lambda: host.status()["waiting"])
            family = descendants(old)
            assert len(family) > idle, "a job runs"
            os.kill(old, signal.SIGKILL)
            wait_for("the old one's helpers end", lambda: not any(map(is_running, family)), timeout=10)
            wait_for("they are reaped", lambda: not set(family) & set(descendants(child.pid)))
        proxy.resume()
        wait_for("another server answers", lambda: host.clip("status", check=False).returncode == 0)
        assert trees(host) == []
        answer = acquire(host, index)
        assert answer["ok"], answer
        assert end(host, child) == 0


def test_sigterm_while_a_mount_is_stuck(registry: Registry) -> None:
    with Proxy(registry.host) as proxy, served(proxy.address, "small", **UNASKED) as (host, child, index):
        proxy.stall()
        with Client(host) as client:
            client.start_acquire(index)
            wait_for("the mount waits for the registry", lambda: host.status()["waiting"])
            family = descendants(child.pid)
            begin = time.monotonic()
            assert end(host, child) == 0
            assert time.monotonic() - begin < 15
        proxy.resume()
        wait_for("all processes end", lambda: not any(map(is_running, family)))
        assert trees(host) == []


def test_the_log_does_not_fill_the_memory(tmp_path: Path) -> None:
    """RUN is a tmpfs: a log that has become long is cut, at the latest by the next start."""
    with Host() as host:
        (host.run_dir / "daemon.log").write_bytes(b"x" * (9 << 20))
        with contextlib.ExitStack() as stack:
            null = stack.enter_context(open(os.devnull, "wb"))
            child = subprocess.Popen([CLIP_SHIM, "daemon", "--supervise"], stderr=null, env=host.env)
        wait_for("it answers", lambda: host.clip("status", check=False).returncode == 0)
        assert (host.run_dir / "daemon.log").stat().st_size < 1 << 20
        assert (host.run_dir / "daemon.log.1").stat().st_size == 9 << 20
        assert b"daemon serves" in (host.run_dir / "daemon.log").read_bytes()
        assert end(host, child) == 0


def test_blobs_that_somebody_unmounts(registry: Registry) -> None:
    """`umount -a` by an administrator: a new server mounts them again. While they are in use, a clear error."""
    with served(registry.host) as (host, child, index):
        old = server_pid(host)
        syscalls.umount2(str(host.run_dir / "blobs"))
        wait_for("another server", lambda: _other_server(host, old))
        assert log_lines(
            host, "somebody has unmounted the blob files: ending, so that another server mounts them again"
        )
        with Client(host) as client:
            assert client.acquire(index)["ok"]
            syscalls.umount2(str(host.run_dir / "blobs"), syscalls.MNT_DETACH)
            other = host.index(f"{registry.host}/small:latest", "s")
            answer = acquire(host, other)
            assert "no longer mounted" in answer["error"]
            assert "by itself" in answer["hint"]
        assert child.poll() is None


def _other_server(host: Host, old: int) -> bool:
    try:
        return server_pid(host) != old
    except OSError:
        return False
