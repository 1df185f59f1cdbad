"""A bundle for whoever helps: what this node looks like, without its secrets."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import subprocess
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shim import __version__, settings
from shim.doctor.installation import config_file
from shim.doctor.node import Node
from shim.doctor.result import Result
from shim.errors import ShimError, UsageError
from shim.install.engines import ENGINES
from shim.mount import mountinfo
from shim.runtime.launcher import find_runtimes

_MAX = 1 << 20  # bytes of one file; of logs the end is kept
_RECORDS_MAX = 200
_SECONDS = 15
_WORDS = r"pass(?:word|wd|phrase)?|secret|\w*token|credentials?|auth(?:orization)?|x-[\w-]+|\w*[-_]?key(?:[-_]data)?"
_SECRET_KEY = re.compile(rf"(?i)(?:.*[-_.])?(?:{_WORDS})\Z")
_HIDDEN = "***"
# key: value and key = value, also in JSON and TOML; the value to the end of the word, or of the quotes
_PAIR = re.compile(
    rf"""(?i)(["']?\b(?:[\w.-]*[-_.])?(?:{_WORDS})["']?\s*[:=]\s*)("(?:[^"\\]|\\.)*"|'[^']*'|[^\s,}}\]]+)"""
)
_USERINFO = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^/\s@\"']+@")
_QUERY = re.compile(r"(?i)(\bhttps?://[^\s?\"']*)\?[^\s\"']*")
_KEY = re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(-----END|\Z)", re.DOTALL)
_SCHEME = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9+/=._~-]{8,}")


def redact(text: str) -> str:
    """Text without passwords, tokens, user names in URLs and signed queries."""
    text = _KEY.sub(rf"\1{_HIDDEN}\2", text)
    text = _USERINFO.sub(rf"\1{_HIDDEN}@", text)
    text = _QUERY.sub(rf"\1?{_HIDDEN}", text)
    text = _SCHEME.sub(rf"\1 {_HIDDEN}", text)
    return _PAIR.sub(lambda match: match[1] + _HIDDEN, text)


def redact_value(value: Any) -> Any:
    """The same in a tree of values; what stands under `headers` may be a secret as a whole."""
    if isinstance(value, dict):
        return {key: _redact_item(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_value(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def _redact_item(key: str, value: Any) -> Any:
    if key == "headers":
        return dict.fromkeys(value, _HIDDEN) if isinstance(value, dict) else _HIDDEN
    if _SECRET_KEY.match(key) and value and not isinstance(value, dict):
        return _HIDDEN
    return redact_value(value)


def write(path: Path, node: Node, results: list[Result]) -> list[str]:
    """Write the bundle, .tar.gz, .tgz or .zip, mode 0600; the names of what is in it. UsageError, OSError.

    What was there is replaced, not written to: in /tmp it may be somebody else's.
    """
    kind = kind_of(path)
    top = path.name.removesuffix(kind)
    files = [(f"{top}/{part}", data) for part, data in _contents(node, results)]
    handle, temporary = tempfile.mkstemp(prefix=".clip-support-", dir=path.parent)
    try:
        _pack(handle, kind, files)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return [part for part, _ in files]


def kind_of(path: Path) -> str:
    """How a bundle's name ends. UsageError for a name that says nothing, or that leads nowhere."""
    kind = next((kind for kind in (".tar.gz", ".tgz", ".zip") if path.name.endswith(kind)), None)
    if kind is None:
        raise UsageError(f"{path} must end in .tar.gz, .tgz or .zip", hint="choose another --support FILE")
    if not path.parent.is_dir():
        raise UsageError(f"there is no directory {path.parent}", hint="make it first, or choose another --support FILE")
    return kind


def _pack(handle: int, kind: str, files: list[tuple[str, bytes]]) -> None:
    with open(handle, "wb") as out:
        if kind == ".zip":
            with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as box:
                for part, data in files:
                    box.writestr(part, data)
        else:
            with tarfile.open(fileobj=out, mode="w:gz") as tar:
                for part, data in files:
                    info = tarfile.TarInfo(part)
                    info.size, info.mtime, info.mode = len(data), int(time.time()), 0o600
                    tar.addfile(info, io.BytesIO(data))


def _contents(node: Node, results: list[Result]) -> Iterator[tuple[str, bytes]]:
    yield "doctor.json", _json({"checks": [redact_value(result.to_json()) for result in results]})
    values = {key: node.settings[key] for key in settings.BY_KEY}
    yield "settings.json", _json({"settings": redact_value(values), "source": dict(node.settings.source)})
    for path in (
        config_file(),
        node.launcher.with_name("settings.json"),
        Path("/proc/cmdline"),
        Path("/etc/os-release"),
    ):
        yield from _file(f"files/{path.name}", path)
    yield "versions.txt", _versions(node).encode()
    yield "mountinfo", redact(os.fsdecode(mountinfo.read_bytes())).encode("utf-8", "replace")
    try:
        yield "status.json", _json(redact_value(node.status))
    except ShimError as error:
        yield "status.json", _json({"error": redact(str(error))})
    run = node.settings.run_dir
    for path in sorted(run.glob("containers/*/*/state.json"))[:_RECORDS_MAX]:
        yield from _file(f"containers/{path.parent.parent.name}/{path.parent.name}.json", path)
    for path in (run / "daemon.log", run / "daemon.log.1"):
        yield from _file(f"logs/{path.name}", path)
    for engine, known in ENGINES.items():
        yield from _file(f"engines/{engine}-{known.config.name}", known.config)
    for name, command in {
        "logs/journal.txt": ["journalctl", "--no-pager", "-n", "2000", "-u", "clip-shim.service", "-o", "short-iso"],
        "logs/dmesg.txt": ["dmesg"],
        "processes.txt": ["ps", "-eo", "pid,ppid,lstart,rss,stat,comm"],
        "space.txt": ["df", "-hT"],
        "listing.txt": ["ls", "-la", str(run), str(node.settings.state_dir), str(node.settings.state_dir / "trees")],
    }.items():
        said = _run(command)
        if said:
            yield name, redact(said).encode("utf-8", "replace")[-_MAX:]


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, default=str).encode() + b"\n"


def _file(name: str, path: Path) -> Iterator[tuple[str, bytes]]:
    """The end of a text file, redacted; nothing if it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            size = os.fstat(fd).st_size
            file.seek(max(0, size - _MAX) if size else 0)
            data = file.read(_MAX)
    except OSError:
        return
    text = data.decode("utf-8", "replace")
    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            yield name, yaml.safe_dump(redact_value(yaml.safe_load(text)), sort_keys=False).encode()
        except (yaml.YAMLError, RecursionError):
            yield name, f"not valid YAML, {len(data)} bytes; left out, as secrets cannot be told\n".encode()
        return
    try:
        yield name, _json(redact_value(json.loads(text)))
    except (ValueError, RecursionError):
        yield name, redact(text).encode()


def _versions(node: Node) -> str:
    out = [f"clip-shim {__version__}", f"python {platform.python_version()}", " ".join(platform.uname())]
    runtimes = find_runtimes(node.settings["runtimes"], node.launcher)
    commands = [[path, "--version"] for path in runtimes]
    commands += [[name, "--version"] for name in ("dockerd", "containerd", "podman", "crio", "conmon", "systemctl")]
    for command in commands:
        said = _run(command).splitlines()
        out.append(f"{command[0]}: {said[0] if said else '-'}")
    return "\n".join(out) + "\n"


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
