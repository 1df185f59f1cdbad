"""The node that is looked at: settings and what several checks need, made once and late."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shim.daemon.prepare import read_meta
from shim.errors import DaemonError, ShimError
from shim.registry.client import RegistryClient
from shim.registry.ref import ImageRef
from shim.runtime import client, jsontext
from shim.settings import Settings

_ANSWER_SECONDS = 5.0
_IMAGES_MAX = 64


@dataclass(frozen=True, slots=True)
class KnownImage:
    """An image, and the digests of its compressed layers."""

    ref: ImageRef
    layers: list[str]


class Node:
    """settings: as loaded, or the defaults if they could not be (`problem`); launcher: the file that engines run, if it
    is there; write_launcher: makes it; daemon_command: starts `clip-shim`. Not for several threads."""

    def __init__(
        self,
        settings: Settings,
        launcher: Path,
        write_launcher: Callable[[], object],
        problem: ShimError | None = None,
        daemon_command: Sequence[str] = (),
    ) -> None:
        self.settings = settings
        self.launcher = launcher
        self._write_launcher = write_launcher
        self.problem = problem
        self.daemon_command = list(daemon_command)
        self.answers: list[Any] | None = None  # what registries said, see network.py

    def make_launcher(self) -> str:
        self._write_launcher()
        return f"{self.launcher} was written"

    @property
    def work_dir(self) -> Path:
        """Where tries write: STATE, or the nearest directory above that exists, so that nothing is made for it."""
        path = self.settings.state_dir
        while not path.is_dir():
            path = path.parent
        return path

    @cached_property
    def status(self) -> dict[str, Any] | None:
        """What the daemon answers to `status`; None if none runs. Raises DaemonError when one runs but does not
        answer as it should."""
        connection = client.try_connect(str(self.settings.run_dir), time.monotonic() + _ANSWER_SECONDS)
        if connection is None:
            return None
        with closing(connection):
            answer: dict[str, Any] = _plain(connection.request({"v": 1, "op": "status"}))
            return answer

    @property
    def daemon_pid(self) -> int:
        """The daemon's process, 0 if none answers."""
        try:
            return int((self.status or {}).get("daemon", {}).get("pid", 0))
        except DaemonError:
            return 0

    @cached_property
    def registry(self) -> RegistryClient:
        """Raises ConfigError."""
        return RegistryClient(self.settings["registries"], deadline=15, connect_timeout=5, read_timeout=10)

    @cached_property
    def images(self) -> list[KnownImage]:
        """The images whose trees this node has, the newest first."""
        found = []
        base = self.settings.state_dir / "trees"
        try:
            names = sorted(base.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        except OSError:
            return []
        for directory in names[:_IMAGES_MAX]:
            meta = read_meta(directory)
            if meta is not None and meta["layers"]:
                try:
                    ref = ImageRef.parse(meta["image"], local_paths=False)
                except ShimError:
                    continue
                found.append(KnownImage(ref, [layer["digest"] for layer in meta["layers"]]))
        return found

    def forget(self) -> None:
        """Look anew at what may have changed."""
        for name in ("status", "images"):
            self.__dict__.pop(name, None)
        self.answers = None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return float(value.text) if isinstance(value, jsontext.Number) else value


def why(error: OSError | ShimError) -> str:
    """An error in a few words."""
    if isinstance(error, OSError) and not isinstance(error, ShimError):
        where = f"{error.filename}: " if isinstance(error.filename, str) else ""
        return f"{where}{error.strerror or os.strerror(error.errno or 0)}"
    return str(error)
