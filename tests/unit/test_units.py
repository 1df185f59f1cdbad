"""The systemd units: valid, and with nothing in them that would hide the daemon's mounts from the engines."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UNITS = sorted(path for path in (ROOT / "systemd").iterdir() if path.suffix in (".service", ".socket", ".timer"))
# systemd.exec(5): each of these gives the service a mount namespace of its own
PRIVATE_NAMESPACE = re.compile(
    r"^(PrivateTmp|PrivateDevices|PrivateMounts|PrivateIPC|PrivatePIDs|PrivateUsers|Protect(System|Home|Proc|ControlGroups"
    r"|KernelModules|KernelTunables|KernelLogs|Hostname)|ProcSubset|ReadWritePaths|ReadOnlyPaths|InaccessiblePaths|ExecPaths"
    r"|NoExecPaths|BindPaths|BindReadOnlyPaths|TemporaryFileSystem|Root[A-Z]\w*|MountFlags|MountImages|ExtensionImages"
    r"|DynamicUser|RuntimeDirectory|StateDirectory|CacheDirectory|LogsDirectory|MountAPIVFS|LogNamespace)=(?!no$)"
)


def text(name: str) -> str:
    return (ROOT / "systemd" / name).read_text()


def setting(name: str, key: str) -> str:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text(name))
    return next(parser[section][key] for section in parser.sections() if key in parser[section])


def test_the_units_are_there() -> None:
    assert {"clip-shim.service", "clip-shim.socket"} <= {path.name for path in UNITS}


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_systemd_finds_nothing_wrong(path: Path, tmp_path: Path) -> None:
    """Every unit, with the program's path replaced by one that exists here."""
    program = Path(sys.executable).parent / "clip-shim"
    for unit in UNITS:
        (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/bin/clip-shim", str(program)))
    analyze = shutil.which("systemd-analyze")
    assert analyze, "systemd-analyze is not installed: see packaging/install-deps.sh"
    done = subprocess.run(
        [analyze, "verify", "--man=no", str(tmp_path / path.name)],
        capture_output=True,
        text=True,
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning", "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )
    said = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "clip-shim" in line]
    version = int(subprocess.run([analyze, "--version"], capture_output=True, text=True).stdout.split()[1])
    if version < 254:
        said = [line for line in said if "FileDescriptorStorePreserve" not in line]
    assert said == []


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_the_daemon_stays_in_the_hosts_mount_namespace(path: Path) -> None:
    assert [line for line in path.read_text().splitlines() if PRIVATE_NAMESPACE.match(line)] == []


def test_the_daemon_is_kept_alive() -> None:
    assert setting("clip-shim.service", "Restart") == "always"
    assert setting("clip-shim.service", "StartLimitIntervalSec") == "0"
    assert setting("clip-shim.service", "Type") == "notify"
    assert setting("clip-shim.service", "KillMode") == "process"
    assert int(setting("clip-shim.service", "FileDescriptorStoreMax")) > 0
    assert setting("clip-shim.socket", "ListenStream") == "/run/clip-shim/control.sock"
