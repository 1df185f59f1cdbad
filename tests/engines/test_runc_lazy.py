"""Bare runc and crun on bundles whose annotation (or file) names an index: the whole path without an engine."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shim.index import container
from tests.support import bundle, expected, images
from tests.support.engines import find_runtime
from tests.support.host import Host, wait_for
from tests.support.proxy import Proxy

Indexed = Callable[[str], Path]
ONE = "changed in a higher layer"


@pytest.fixture
def clean(host: Host) -> Iterator[Host]:
    """The host; afterwards nothing of a container is mounted or kept."""
    yield host
    left = [mount for mount in host.mounts() if "/containers/" in mount[1] or mount[2].startswith("clip:")]
    assert left == []
    assert [path for path in (host.state_dir / "containers").glob("*/*") if path.is_dir()] == []


def run(host: Host, directory: Path, *options: str, **more: object) -> subprocess.CompletedProcess[str]:
    return host.run(*host.oci, *options, "run", "--bundle", directory, directory.name, **more)  # type: ignore[arg-type]


def test_runc_itself_works(clean: Host, tmp_path: Path) -> None:
    """The same bundle on plain runc: if this fails, the cause is not clip-shim."""
    made = bundle.make(tmp_path / "plain1", ["/busybox", "echo", "ok"])
    (made / "rootfs/busybox").write_bytes((expected.tree(images.image("small")) / "usr/bin/busybox").read_bytes())
    (made / "rootfs/busybox").chmod(0o755)
    before = (made / "config.json").read_bytes()
    assert clean.run(find_runtime("runc"), "run", "--bundle", made, "plain1").stdout == "ok\n"
    assert run(clean, made).stdout == "ok\n", "without a reference the wrapper is runc"
    assert (made / "config.json").read_bytes() == before


def test_annotation(clean: Host, indexed: Indexed, tmp_path: Path) -> None:
    made = bundle.make(
        tmp_path / "a1", ["sh", "-c", "cat /data/one; sha256sum </data/noise.bin"], index=indexed("small")
    )
    digest = images.file_digest(expected.tree(images.image("small")) / "data/noise.bin")
    assert run(clean, made).stdout == f"{ONE}{digest}  -\n"


def test_image_by_its_name(clean: Host, pushed: Callable[[str], str], tmp_path: Path) -> None:
    """The index is made by the first create, and kept."""
    for name in ("i1", "i2"):
        made = bundle.make(tmp_path / name, ["cat", "/data/one"], index=f"image://{pushed('small')}")
        assert run(clean, made).stdout == ONE


def test_name_in_the_environment(clean: Host, indexed: Indexed, tmp_path: Path) -> None:
    """Only when that is switched on: else it is a plain, and here empty, container."""
    clean.clip("push", indexed("small"), f"{clean.state_dir}/indexes/team/small.clip")
    made = bundle.make(tmp_path / "n1", ["cat", "/data/one"])
    spec = json.loads((made / "config.json").read_text())
    spec["process"]["env"].append("CLIP_INDEX=team/small")
    (made / "config.json").write_text(json.dumps(spec))
    assert run(clean, made, check=False).returncode != 0
    assert run(clean, made, env={"CLIP_SHIM_REFERENCE_ENV": "true"}).stdout == ONE


def test_index_in_the_bundle(clean: Host, indexed: Indexed, tmp_path: Path) -> None:
    made = bundle.make(tmp_path / "b1", ["cat", "/data/one"])
    (made / "index.clip").write_bytes(indexed("small").read_bytes())
    assert run(clean, made).stdout == ONE


def test_archive(clean: Host, pushed: Callable[[str], str], tmp_path: Path) -> None:
    """A v1 archive in the place of an index; its data are in the file itself."""
    file = clean.indexes / "archive.clip"
    clean.clip("archive", pushed("small"), "-o", file)
    made = bundle.make(tmp_path / "v1", ["cat", "/data/one"], index=file)
    assert run(clean, made).stdout == ONE


def test_go_clips_index(clean: Host, pushed: Callable[[str], str], tmp_path: Path) -> None:
    """A v2 file without our part: the image is indexed afresh, so that what v2 lost is there, a setuid bit say."""
    data = clean.index(pushed("small"), "both", "--format", "clip").read_bytes()
    file = clean.indexes / "go.clip"
    file.write_bytes(data[: container.start_of_part(lambda at, length: data[at : at + length], len(data))])
    made = bundle.make(tmp_path / "v2", ["sh", "-c", "cat /data/one; find / -xdev -perm -4000"], index=file)
    setuid = [path for path in expected.tree(images.image("small")).rglob("*") if path.lstat().st_mode & 0o4000]
    out = run(clean, made).stdout
    assert out.startswith(ONE)
    assert len(out.removeprefix(ONE).splitlines()) == len(setuid) > 0


def test_read_only_root(clean: Host, indexed: Indexed, tmp_path: Path) -> None:
    made = bundle.make(
        tmp_path / "r1", ["sh", "-c", "touch /x || cat /data/one"], index=indexed("small"), readonly=True
    )
    assert run(clean, made).stdout == ONE


def test_exit_code(clean: Host, indexed: Indexed, tmp_path: Path) -> None:
    made = bundle.make(tmp_path / "e1", ["sh", "-c", "exit 7"], index=indexed("small"))
    assert run(clean, made, check=False).returncode == 7


def test_separate_verbs(clean: Host, indexed: Indexed, tmp_path: Path) -> None:
    made = bundle.make(
        tmp_path / "v1", ["sh", "-c", "echo written >/data/new; exec sleep 1000"], index=indexed("small")
    )
    log = tmp_path / "log.json"
    runtime = [*clean.oci, "--log", log, "--log-format", "json"]
    pid_file = tmp_path / "pid"
    clean.start(*runtime, "create", "--bundle", made, "--pid-file", pid_file, "v1", log="create-v1").wait(60)
    assert json.loads(clean.output(*runtime, "state", "v1"))["status"] == "created", clean.logs()
    clean.run(*runtime, "start", "v1")
    wait_for(
        "the container writes",
        lambda: clean.run(*runtime, "exec", "v1", "cat", "/data/new", check=False).stdout == "written\n",
    )
    assert clean.output(*runtime, "exec", "v1", "cat", "/data/one") == ONE
    assert int(pid_file.read_text()) == json.loads(clean.output(*runtime, "state", "v1"))["pid"]
    clean.run(*runtime, "kill", "v1", "KILL")
    wait_for("the container ends", lambda: json.loads(clean.output(*runtime, "state", "v1"))["status"] == "stopped")
    clean.run(*runtime, "delete", "v1")
    assert clean.run(*runtime, "state", "v1", check=False).returncode == 1


def test_runc_fails_after_the_mount(clean: Host, indexed: Indexed, tmp_path: Path) -> None:
    made = bundle.make(tmp_path / "f1", ["/no/such/program"], index=indexed("small"))
    failed = run(clean, made, check=False)
    assert failed.returncode == 1
    assert "/no/such/program" in failed.stderr


@pytest.mark.parametrize("case", ["outside trust", "absent", "damaged", "truncated", "fifo", "directory", "symlink"])
def test_bad_reference_changes_nothing(clean: Host, indexed: Indexed, tmp_path: Path, case: str) -> None:
    """One error line on stderr and one in runc's log; config.json as it was."""
    good = indexed("small").read_bytes()
    bad = clean.indexes / f"bad-{case.split()[0]}.clip"
    match case:
        case "outside trust":
            bad = tmp_path / "outside.clip"
            bad.write_bytes(good)
        case "damaged":
            bad.write_bytes(good[: len(good) // 2] + b"\xff\x00\xff" + good[len(good) // 2 + 3 :])
        case "truncated":
            bad.write_bytes(good[:-1000])
        case "fifo":
            os.mkfifo(bad)
        case "directory":
            bad.mkdir()
        case "symlink":
            bad.symlink_to(indexed("small"))
    made = bundle.make(tmp_path / f"bad-{case.split()[0]}", ["echo", "ran"], index=bad)
    before = (made / "config.json").read_bytes()
    log = tmp_path / "log.json"
    failed = run(clean, made, "--log", str(log), "--log-format", "json", check=False)
    if bad.is_dir() and not bad.is_symlink():
        bad.rmdir()
    else:
        bad.unlink(missing_ok=True)
    assert failed.returncode == 1
    assert "ran" not in failed.stdout.split()
    assert "Traceback" not in failed.stderr
    entry = json.loads(log.read_text().splitlines()[-1])
    assert entry["level"] == "error"
    assert str(bad) in entry["msg"]
    assert entry["msg"] in failed.stderr
    assert (made / "config.json").read_bytes() == before


def test_twenty_at_once(clean: Host, indexed: Indexed, tmp_path: Path) -> None:
    tree = expected.tree(images.image("small"))

    def one(n: int) -> str:
        made = bundle.make(tmp_path / f"t{n}", ["sha256sum", f"/data/many/{n:03}"], index=indexed("small"))
        return run(clean, made, timeout=240).stdout.split()[0]

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(one, range(20))) == [images.file_digest(tree / f"data/many/{n:03}") for n in range(20)]


def test_first_container_starts_the_daemon(registry_address: str, pushed: Callable[[str], str], tmp_path: Path) -> None:
    """No set-up: the wrapper starts a daemon, outside its own session; the second container finds it."""
    with Host() as host:
        host.trust_registry(registry_address)
        index = host.index(pushed("small"), "small")
        assert list(host.processes()) == []
        for name in ("d1", "d2"):
            assert run(host, bundle.make(tmp_path / name, ["cat", "/data/one"], index=index)).stdout == ONE
        pid = host.status()["daemon"]["pid"]
        assert os.getsid(pid) != os.getsid(0)


def test_crun(registry_address: str, pushed: Callable[[str], str], tmp_path: Path) -> None:
    """crun refuses a hybrid cgroup hierarchy, so the host is one whose namespace does not show the cgroup2 half."""
    with Host("legacy", settings={"CLIP_SHIM_RUNTIMES": find_runtime("crun")}) as host:
        host.trust_registry(registry_address)
        host.start_daemon()
        plain = bundle.make(tmp_path / "crun0", ["/busybox", "echo", "ok"])
        (plain / "rootfs/busybox").write_bytes((expected.tree(images.image("small")) / "usr/bin/busybox").read_bytes())
        (plain / "rootfs/busybox").chmod(0o755)
        assert host.run(find_runtime("crun"), "run", "--bundle", plain, "crun0").stdout == "ok\n"
        index = host.index(pushed("small"), "small")
        made = bundle.make(tmp_path / "crun1", ["cat", "/data/one"], index=index)
        assert run(host, made).stdout == ONE
        assert host.clip_overlays() == []


def test_shared_layers_are_fetched_once(registry_address: str, pushed: Callable[[str], str], tmp_path: Path) -> None:
    """Reading all of a second image over the same base fetches little more than its own layer."""
    with Host() as host, Proxy(registry_address) as proxy:
        host.trust_registry(proxy.address)
        host.start_daemon()
        fetched = []
        for name in ("shared-a", "shared-b"):
            reference = pushed(name).replace(registry_address, proxy.address)
            index = host.index(reference, name)
            proxy.reset()
            made = bundle.make(tmp_path / name, ["sh", "-c", "cat /common/* /only-* | sha256sum"], index=index)
            tree = expected.tree(images.image(name))
            files = [*sorted((tree / "common").iterdir()), *tree.glob("only-*")]
            assert run(host, made).stdout.split()[0] == images.joined_digest(files)
            fetched.append(proxy.answered)
        own = images.image("shared-b").layers[-1].size
        assert fetched[0] > images.image("shared-a").layers[1].size
        assert fetched[1] < own + 200_000, f"{fetched} bytes fetched, the second image's own layer is {own}"


@contextlib.contextmanager
def stalled(
    registry_address: str, reference: str, tmp_path: Path, name: str, args: list[str]
) -> Iterator[tuple[Host, Proxy, subprocess.Popen[bytes]]]:
    """A running container `name` whose image's data waits for a registry that answers no more."""
    with Host() as host, Proxy(registry_address) as proxy:
        host.trust_registry(proxy.address)
        host.start_daemon()
        index = host.index(reference.replace(registry_address, proxy.address), "small")
        made = bundle.make(tmp_path / name, args, index=index)
        child = host.start(*host.oci, "run", "--bundle", made, name, log="container")
        output = host.base / "log/container"
        try:
            wait_for("the container is ready", lambda: b"ready" in output.read_bytes() or child.poll() is not None)
            assert child.poll() is None, host.logs()
            proxy.stall()
            host.run(*host.oci, "kill", name, "USR1")
            yield host, proxy, child
        finally:
            proxy.resume()
            host.run(*host.oci, "delete", "--force", name, check=False)
            child.wait(30)


WAITER = "trap 'go=1' USR1; echo ready; while [ -z \"$go\" ]; do sleep 0.05; done; "


def test_stalled_reader_dies_at_once(registry_address: str, pushed: Callable[[str], str], tmp_path: Path) -> None:
    script = WAITER + "exec cat /data/noise.bin >/dev/null"
    with stalled(registry_address, pushed("small"), tmp_path, "s1", ["sh", "-c", script]) as (host, _, child):
        wait_for("the read is waiting", lambda: host.status()["waiting"])
        begin = time.monotonic()
        host.run(*host.oci, "kill", "s1", "KILL")
        assert child.wait(20) == 128 + 9  # runc run ends with its container
        assert time.monotonic() - begin < 5


def test_signals_while_reading_are_no_errors(
    registry_address: str, pushed: Callable[[str], str], tmp_path: Path
) -> None:
    """A program gets signals that it handles while its read waits; the read goes on and gives the right bytes."""
    script = "trap : USR2; " + WAITER + 'read -r line </data/text.txt; echo "code $? line $line"; sleep 1000'
    line = (expected.tree(images.image("small")) / "data/text.txt").read_bytes().split(b"\n")[0]
    with stalled(registry_address, pushed("small"), tmp_path, "s2", ["sh", "-c", script]) as (host, proxy, _):
        output = host.base / "log/container"
        wait_for("the read is waiting", lambda: host.status()["waiting"])
        for _ in range(5):
            host.run(*host.oci, "kill", "s2", "USR2")
        assert host.status()["waiting"], "the read was given up"
        proxy.resume()
        wait_for("the read ends", lambda: b"code " in output.read_bytes())
        assert b"code 0 line " + line + b"\n" in output.read_bytes()
