"""`doctor` on this installation and its daemon: each thing is broken, and named; `--fix` and `--support`."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.doctor import daemon, installation, network
from shim.doctor import node as nodes
from shim.doctor.checks import CHECKS
from shim.doctor.node import Node
from shim.fuse import connection
from shim.runtime.launcher import SETTINGS_NAME
from shim.settings import load
from tests.support.doctor import doctor, one, run
from tests.support.host import CLIP_SHIM, Host, wait_for


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as made:
        made.clip("config", "compile")  # the launcher that is shared by all tests has this host's settings now
        yield made


def test_list_names_every_check(host: Host) -> None:
    lines = run(host, "--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [check.name for check in CHECKS]


def test_check_that_is_none(host: Host) -> None:
    done = run(host, "--check", "eorfs")
    assert (done.returncode, done.stderr) == (2, "error: there is no check 'eorfs'\nhint: did you mean erofs?\n")


def test_text_has_a_line_for_each_result_and_no_colour_in_a_pipe(host: Host) -> None:
    done = run(host, "--check", "state-dir", "--check", "daemon")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("✓ state-dir: ")
    assert lines[1].startswith("- daemon: no daemon runs")
    assert lines[-1] == "1 ok, 1 skipped, 0 warnings, 0 failed"
    assert "\x1b" not in done.stdout


def test_colour_on_a_terminal(host: Host) -> None:
    done = host.run("script", "-qec", f"{CLIP_SHIM} doctor --check root", "/dev/null")
    assert "\x1b[32m✓\x1b[0m root: running as root" in done.stdout


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("tree: erofz\n", "it must be one of auto"),
        ("regestries: {}\n", "unknown key `regestries`"),
        ("registries: {example.com: {mirors: []}}\n", "unknown key `mirors`"),
        ("trust: {sources: {anotation: {}}}\n", "is no source of references"),
        ("stores: {lookup: ['ftp://x']}\n", "is no URL of a store"),
    ],
)
def test_wrong_configuration(host: Host, text: str, found: str) -> None:
    (host.base / "config.yaml").write_text(text)
    status, said = one(doctor(host, "configuration"), "configuration")
    assert status == "failed"
    assert found in said


def test_configuration_that_others_can_write(host: Host) -> None:
    (host.base / "config.yaml").chmod(0o666)
    status, said = one(doctor(host, "configuration"), "configuration")
    assert status == "failed"
    assert "others can decide what root reads" in said


def test_kill_switch(host: Host) -> None:
    (host.base / "disabled").touch()
    found = doctor(host, "configuration")["configuration"]
    assert [item["status"] for item in found] == ["ok", "warning"]
    assert "switches lazy loading off" in found[1]["found"]


def test_damaged_launcher_is_mended(host: Host) -> None:
    """One whose settings are only older mends itself."""
    (host.base / "config.yaml").write_text("log: {level: debug}\n")
    assert one(doctor(host, "launcher"), "launcher")[0] == "ok"
    settings = Path(host.runtime_path()).with_name(SETTINGS_NAME)
    settings.write_text("{")
    assert one(doctor(host, "launcher"), "launcher")[0] == "failed"
    mended = run(host, "--check", "launcher", "--fix")
    assert mended.returncode == 0
    assert "mended: " in mended.stderr
    assert one(doctor(host, "launcher"), "launcher")[0] == "ok"


def test_missing_launcher_is_mended(disk_path: Path) -> None:
    made: list[bool] = []
    node = Node(load(env={}), disk_path / "launcher", lambda: made.append(True))
    [result] = installation.launcher(node)
    assert result.found == f"{disk_path}/launcher is not there"
    assert result.mend is not None
    result.mend()
    assert made == [True]


def test_no_runtime(host: Host) -> None:
    status, said = one(doctor(host, "runtimes", env={"CLIP_SHIM_RUNTIMES": "/no/runc"}), "runtimes")
    assert (status, said) == ("failed", "none of them is there")


def test_runtime_that_does_not_run(host: Host) -> None:
    broken = host.base / "runc"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    found = doctor(host, "runtimes", "launcher", env={"CLIP_SHIM_RUNTIMES": f"{broken},/usr/sbin/runc"})
    assert found["runtimes"][0]["status"] == "failed"
    assert found["runtimes"][0]["found"].endswith("--version ends with 3")


def test_daemon(host: Host) -> None:
    daemon = host.start_daemon()
    found = doctor(host, "daemon", "supervisor", "stale-mounts", "mount-namespace")
    assert [one(found, name)[0] for name in found] == ["ok"] * 4
    assert f"pid {daemon.pid} looks after" in one(found, "supervisor")[1]


def test_daemon_that_nobody_looks_after(host: Host) -> None:
    child = host.start(CLIP_SHIM, "daemon", log="daemon")
    wait_for("the daemon answers", lambda: host.clip("status", check=False).returncode == 0)
    status, said = one(doctor(host, "supervisor"), "supervisor")
    assert status == "warning"
    assert said.startswith(f"nobody looks after the daemon (pid {child.pid}): nobody keeps its descriptor")


def test_daemon_that_does_not_answer(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "_ANSWER_SECONDS", 0.3)
    host.start_daemon()
    pid = host.status()["daemon"]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        [result] = daemon.answering(Node(load(env=host.clip_env), Path("/x"), lambda: None))
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (result.status, result.found) == ("failed", "the daemon did not answer in time")


def test_stale_mounts_are_mended(host: Host) -> None:
    """What a daemon leaves that was killed, with all that would start it again."""
    blobs = host.run_dir / "blobs"
    blobs.mkdir()
    os.close(connection.mount(blobs))
    status, said = one(doctor(host, "stale-mounts"), "stale-mounts")
    assert (status, said) == ("warning", f"left by a daemon that is gone: {blobs}")
    assert run(host, "--check", "stale-mounts", "--fix").returncode == 0
    assert host.mounts() == []


def test_mounts_that_a_successor_can_take_over_are_left_alone(host: Host) -> None:
    """Somebody keeps the descriptor of a daemon that does not answer."""
    blobs = host.run_dir / "blobs"
    blobs.mkdir()
    kept = connection.mount(blobs)
    try:
        done = run(host, "--check", "stale-mounts", "--fix")
        assert "somebody keeps its descriptor" in done.stdout
        assert len(host.mounts()) == 1
    finally:
        os.close(kept)


def test_containers_without_a_daemon(host: Host) -> None:
    """Nothing is unmounted below them."""
    tree = host.run_dir / "trees" / ("0" * 64)
    for path in (tree, host.base / "u", host.base / "w", host.base / "merged"):
        path.mkdir(parents=True)
    options = f"lowerdir={tree},upperdir={host.base}/u,workdir={host.base}/w"
    host.run("mount", "-t", "overlay", "clip:sha256:0", "-o", options, host.base / "merged")
    done = run(host, "--check", "stale-mounts", "--fix")
    assert done.returncode == 2
    assert "1 containers run on lazily loaded trees, and no daemon serves them" in done.stdout
    assert len(host.mounts()) == 1


def test_upper_on_memory(host: Host) -> None:
    (host.base / "merged").mkdir()
    before = (
        "mkdir -p $BASE/m && mount -t tmpfs t $BASE/m && mkdir $BASE/m/u $BASE/m/w $BASE/l && "
        "mount -t overlay clip:x -o lowerdir=$BASE/l,upperdir=$BASE/m/u,workdir=$BASE/m/w $BASE/merged"
    )
    found = doctor(host, "uppers", before=before)["uppers"]
    assert found[0]["found"] == f"1 containers write to memory: {host.base}/merged"


def test_engines_data_on_memory(host: Host) -> None:
    before = "mkdir -p /var/lib/containers/storage && mount -t tmpfs t /var/lib/containers/storage"
    found = doctor(host, "uppers", before=before)["uppers"]
    assert "/var/lib/containers/storage is on tmpfs" in found[0]["found"]


def test_names(host: Host) -> None:
    (host.base / "config.yaml").write_text("registries: {no-such-name.invalid: {}, localhost: {}}\n")
    found = doctor(host, "dns")["dns"]
    assert [(item["status"], item["found"].split(":")[0]) for item in found] == [
        ("failed", "no-such-name.invalid"),
        ("ok", found[1]["found"]),
    ]
    assert found[1]["found"].startswith("localhost is ")


def test_names_behind_a_proxy(host: Host) -> None:
    """The proxy looks the registry's name up."""
    (host.base / "config.yaml").write_text("registries: {no-such-name.invalid: {}}\n")
    status, said = one(doctor(host, "dns", env={"HTTPS_PROXY": "http://localhost:1"}), "dns")
    assert status == "ok"
    assert said.startswith("localhost is ")


def test_a_name_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is injected: resolv.conf belongs to this whole machine."""
    monkeypatch.setattr(network, "_SECONDS", 0.05)
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_, **__: time.sleep(0.3) or [[0, 0, 0, 0, ["x"]]])
    node = Node(load(env={}, flags={"registries": {"example.com": {}}}), Path("/x"), lambda: None)
    assert [(item.status, item.found) for item in network.names(node)] == [
        ("failed", "example.com: no answer in 0.05 s")
    ]


@pytest.mark.parametrize("kind", [".tar.gz", ".zip"])
def test_support_bundle_has_no_secrets(host: Host, kind: str) -> None:
    host.start_daemon()
    secrets = ("hunter2", "QUJDREVGRw==", "sig-0123456789", "topsecret", "MHcCAQEEIB0")
    (host.base / "config.yaml").write_text(
        "registries:\n"
        "  example.com: {headers: {X-Anything: hunter2, Authorization: Basic QUJDREVGRw==}}\n"
        "  other.com: {mirrors: [{host: 'https://mirror.example.com', headers: {Who: topsecret}}]}\n"
    )
    log = host.run_dir / "daemon.log"
    log.write_text(
        '{"event": "read failed", "url": "https://x.example/blob?X-Amz-Signature=sig-0123456789"}\n'
        "Authorization: Bearer topsecret-token-123\nhttp://alice:hunter2@proxy:3128\n"
        "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIB0\nMHcCAQEEIB0=\n-----END EC PRIVATE KEY-----\n"
    )
    place = host.base / f"help{kind}"
    done = run(host, "--check", "root", "--support", place)
    assert done.returncode == 0
    assert place.stat().st_mode & 0o777 == 0o600
    files = contents(place)
    assert set(files) >= {"doctor.json", "settings.json", "status.json", "mountinfo", "versions.txt", "logs/daemon.log"}
    everything = "".join(files.values())
    assert [secret for secret in secrets if secret in everything] == []
    assert "x.example/blob?***" in files["logs/daemon.log"]
    assert json.loads(files["settings.json"])["settings"]["registries"]["example.com"]["headers"]["X-Anything"] == "***"
    assert json.loads(files["status.json"])["daemon"]["pid"] == host.status()["daemon"]["pid"]
    assert json.loads(files["doctor.json"])["checks"][0]["check"] == "root"


def contents(place: Path) -> dict[str, str]:
    """Name without the bundle's own directory → text."""
    data = place.read_bytes()
    if place.suffix == ".zip":
        with zipfile.ZipFile(io.BytesIO(data)) as box:
            found = {name: box.read(name) for name in box.namelist()}
    else:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            found = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    assert all(name.startswith("help/") for name in found)
    return {name.removeprefix("help/"): text.decode() for name, text in found.items()}


def test_support_bundle_with_another_name(host: Host) -> None:
    for name, message in {
        "help.rar": "must end in .tar.gz, .tgz or .zip",
        "no/help.zip": "there is no directory",
    }.items():
        done = run(host, "--check", "root", "--support", host.base / name)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stdout == ""  # it is said at once


def test_support_bundle_in_the_place_of_somebodys_file(host: Host) -> None:
    """In /tmp anybody can have put one there, to read what will be written to it; or a pipe, to hold us."""
    place, pipe = host.base / "help.zip", host.base / "help.tgz"
    place.write_text("theirs")
    os.chown(place, 65534, 65534)
    os.mkfifo(pipe)
    with open(place) as theirs:
        for path in (place, pipe):
            assert run(host, "--check", "root", "--support", path).returncode == 0
            assert path.is_file()
            assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (0, 0o600)
        assert theirs.read() == "theirs"
    assert not list(host.base.glob(".clip-support-*"))


def test_what_cannot_be_mended_hides_no_other(host: Host) -> None:
    before = "chmod 755 $BASE/state && mount --bind $BASE/state $BASE/state && mount -o remount,bind,ro $BASE/state"
    found = doctor(host, "state-dir", "root", more=("--fix",), before=before)
    assert one(found, "state-dir")[0] == "failed"
    assert one(found, "root")[0] == "ok"


HANGING = """
import sys
from pathlib import Path
from shim.doctor import checks, storage
from shim.doctor.node import Node
from shim.doctor.result import Check
from shim.settings import load
node = Node(load(env={"CLIP_SHIM_CONFIG": "/dev/null", "CLIP_SHIM_STATE_DIR": sys.argv[1]}), Path("/x"), lambda: None)
for result in checks.run(Check("space", storage.space, "room", 0.5), node):
    print(result.status, result.found)
"""


def test_a_file_system_that_nobody_serves_holds_nobody(tmp_path: Path) -> None:
    fd = connection.mount(tmp_path)
    try:
        done = subprocess.run(
            [sys.executable, "-c", HANGING, tmp_path / "state"], capture_output=True, text=True, timeout=30, check=True
        )
    finally:
        os.close(fd)
        subprocess.run(["umount", "-l", tmp_path], check=True)
    assert done.stdout == "failed no answer in 0.5 s\n"


def test_a_check_that_fails_itself_hides_no_other(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    from shim.doctor import checks
    from shim.doctor.result import Check

    def broken(_: Node) -> Iterator[object]:
        raise RuntimeError("oops")
        yield

    node = Node(load(env={}), Path("/x"), lambda: None)
    [result] = checks.run(Check("broken", broken, "nothing"), node)  # type: ignore[arg-type]
    assert (result.status, result.found) == ("failed", "the check itself failed: RuntimeError: oops")


def test_unit_without_a_descriptor_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is injected: no systemd runs here."""

    def shown(text: str) -> None:
        def answer(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            return subprocess.CompletedProcess(command, 0, text, "")

        monkeypatch.setattr(daemon.subprocess, "run", answer)

    for text, status in (
        ("Restart=always\nFileDescriptorStoreMax=8\nNFileDescriptorStore=2\n", "ok"),
        ("Restart=always\nFileDescriptorStoreMax=0\nNFileDescriptorStore=0\n", "failed"),
        ("Restart=no\nFileDescriptorStoreMax=8\nNFileDescriptorStore=2\n", "warning"),
    ):
        shown(text)
        assert [item.status for item in daemon._systemd("clip-shim.service", "x")] == [status]
