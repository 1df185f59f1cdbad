"""The daemon: whether it answers, and whether it would survive its own death."""

from __future__ import annotations

from collections.abc import Iterator

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
