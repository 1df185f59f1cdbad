"""podman's hooks, for where its runtime cannot be chosen: two files in a directory of their own, which containers are
given by `podman --hooks-dir` or `hooks_dir` in containers.conf.

Never where hooks are looked for without being asked: CRI-O reads those directories too, does not know the stage
precreate, and does not start.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from shim.errors import InstallError
from shim.install.plan import Change, Plan, Runtime, read

TITLE = "podman, by hooks"
CONFIG = Path("/etc/clip-shim/hooks.d")
MARK = "/clip-shim-hooks/"
_SHARED = ("/usr/share/containers/oci/hooks.d", "/etc/containers/oci/hooks.d", "/usr/libexec/oci/hooks.d")
_SECONDS = 300  # an index may have to be made
_STAGES = ("precreate", "poststop")
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def install(config: Path, runtime: Runtime, *, force: bool) -> Plan:
    """config: the directory. Raises InstallError."""
    _refuse_shared(config)
    changes = []
    for stage in _STAGES:
        path = config / f"clip-{stage}.json"
        before = read(path)
        if before is not None and not force and not _is_ours(before, stage):
            raise InstallError(f"{path} is not a file of ours", hint="move it away, or take its place with --force")
        after = _encode(stage, _program(runtime, stage), runtime.path)
        if before != after:
            changes.append(Change(path, before, after))
    usage = f"podman --hooks-dir {config} run …, and so for start and restart; or `hooks_dir` in containers.conf"
    return Plan(changes, "", usage)


def uninstall(config: Path, runtime: Runtime, *, force: bool) -> Plan:  # noqa: ARG001
    """Raises InstallError."""
    changes = []
    for stage in _STAGES:
        path = config / f"clip-{stage}.json"
        before = read(path)
        if before is not None and (force or _is_ours(before, stage)):
            changes.append(Change(path, before, None))
    return Plan(changes, "", "")


def configured(_: Path) -> dict[str, str]:
    """Hooks are no runtimes."""
    return {}


def users(_config: Path, _runtime: Runtime) -> None:
    """podman does not say which containers have hooks: the records do."""


def _refuse_shared(config: Path) -> None:
    if os.path.realpath(config) in {os.path.realpath(path) for path in _SHARED}:
        raise InstallError(
            f"{config} is read by CRI-O too, which does not start when it meets the stage precreate",
            hint=f"choose a directory of its own, such as {CONFIG}",
        )


def _program(runtime: Runtime, stage: str) -> Path:
    """The hook's executable: beside the launcher in a package, in hooks/ of a checkout."""
    name = f"clip-{stage}"
    beside = Path(runtime.path).with_name(name)
    checkout = Path(__file__).resolve().parents[2] / "hooks" / name
    for path in (beside, checkout):
        if os.access(path, os.X_OK):
            return path
    raise InstallError(f"{beside} is not there", hint="install clip-shim's package, or run this from a checkout")


def _encode(stage: str, program: Path, launcher: str) -> bytes:
    """hooks 1.0.0 (oci-hooks(5))."""
    args = [program.name, launcher] if stage == "precreate" else [program.name]
    names = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("CLIP_SHIM_CONFIG")]
    hook: dict[str, Any] = {"path": str(program), "args": args, "env": [_PATH, *names], "timeout": _SECONDS}
    value = {"version": "1.0.0", "hook": hook, "when": {"always": True}, "stages": [stage]}
    return (json.dumps(value, indent=2) + "\n").encode()


def _is_ours(data: bytes, stage: str) -> bool:
    try:
        return bool(os.path.basename(json.loads(data)["hook"]["path"]) == f"clip-{stage}")
    except (ValueError, KeyError, TypeError):
        return False
