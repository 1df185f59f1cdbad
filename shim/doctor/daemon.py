"""The daemon: whether it answers, and whether it would survive its own death."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

from shim import __version__
from shim.doctor.node import Node
from shim.doctor.result import Result, failed, ok, skipped, warning
from shim.errors import DaemonError


def answering(node: Node) -> Iterator[Result]:
    expected = f"a daemon of version {__version__} answers at {node.settings.run_dir}/control.sock"
    try:
        status = node.status
    except DaemonError as error:
        yield failed(str(error), expected, error.hint or "")
        return
    if status is None:
        yield skipped("no daemon runs: the first container starts it", expected)
        return
    daemon = status["daemon"]
    found = f"pid {daemon['pid']}, version {daemon['version']}, trees by {daemon['tier']}"
    if daemon["version"] != __version__:
        yield warning(
            found, expected, "restart it: `systemctl restart clip-shim`, or end it and let the next container start it"
        )
    elif daemon["tier"] == "none":
        yield failed(f"{found}: {daemon['tier_reason']}", expected, "see the checks erofs and fuse-device")
    else:
        yield ok(found, expected)


def supervised(node: Node) -> Iterator[Result]:
    expected = "systemd or `clip-shim daemon --supervise` starts the daemon again, and keeps its descriptor"
    pid = node.daemon_pid
    if not pid:
        yield skipped("no daemon runs", expected)
        return
    said = (node.status or {})["daemon"]
    trouble = str(said.get("handover") or "")  # what becomes of reads should it be killed now, "" for nothing
    unit, parent = _unit(pid), said.get("supervisor")
    if unit is not None:
        yield from _systemd(unit, expected)
    elif parent is None:
        yield warning(
            f"nobody looks after the daemon (pid {pid}): {trouble or 'it is not started again'}",
            expected,
            "end it: the next container starts one that is looked after; or `systemctl enable --now clip-shim`",
        )
        return
    else:
        yield ok(f"pid {parent} looks after the daemon (pid {pid})", expected)
    if trouble:
        yield warning(
            f"reads that wait when the daemon is killed will fail: {trouble}", expected, "see the check fuse-resend"
        )


def _systemd(unit: str, expected: str) -> Iterator[Result]:
    try:
        done = subprocess.run(
            ["/usr/bin/systemctl", "show", unit, "-p", "NFileDescriptorStore,FileDescriptorStoreMax,Restart"],
            capture_output=True, text=True, timeout=10, check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        shown = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    except (OSError, subprocess.SubprocessError) as error:
        yield warning(f"systemd cannot be asked about {unit}: {error}", expected, f"see `systemctl status {unit}`")
        return
    fix = f"use the unit of the package: `systemctl revert {unit}`"
    if shown.get("Restart") != "always":
        yield warning(f"{unit} has Restart={shown.get('Restart')}", expected, fix)
    elif shown.get("FileDescriptorStoreMax", "0") == "0":
        yield failed(f"{unit} has no descriptor store", expected, fix)
    else:
        held = shown.get("NFileDescriptorStore", "0")
        yield ok(f"{unit} is restarted by systemd, which holds {held} descriptors for it", expected)


def _unit(pid: int) -> str | None:
    """The systemd service that a process belongs to (cgroups(7))."""
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return None
    names = [part for line in text.splitlines() for part in line.rpartition(":")[2].split("/")]
    return next((name for name in names if name.startswith("clip-shim") and name.endswith(".service")), None)
