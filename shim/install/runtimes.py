"""The table of runtimes in an engine's TOML file, by default a drop-in of our own: what CRI-O and podman have alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shim.errors import InstallError
from shim.install.plan import Change, Runtime, change, check_free, read
from shim.install.toml import TomlFile

DROP_IN = "50-clip-shim.conf"


class RuntimeTable:
    """`file` is changed by `set` and `remove`, as TomlFile is; `changes` says what is to be written."""

    def __init__(self, config: Path, keys: tuple[str, ...], path_of: Callable[[Any], str | None]) -> None:
        """keys: where the table is; path_of: the program that an entry of it leads to. Raises InstallError."""
        self._config = config
        self._before = read(config)
        self._keys = keys
        self._path_of = path_of
        self.file = TomlFile(config, self._before or b"")

    def _entry(self, runtime: Runtime, *, force: bool) -> Any:
        entry = self.file.table(*self._keys).get(runtime.name)
        if entry is not None and not force:
            check_free(self._config, runtime, self._path_of(entry))
        return entry

    def set(self, runtime: Runtime, entry: Any, *, force: bool) -> None:
        """Have the runtime there. Raises InstallError: its name is somebody else's."""
        if self._path_of(self._entry(runtime, force=force)) != runtime.path:
            self.file.set([*self._keys, runtime.name], entry)

    def remove(self, runtime: Runtime, default: tuple[str, ...], other: str, *, force: bool) -> bool:
        """Take the entry away; False if there is none. default: where the engine's default runtime is named; other:
        what that could be set to. Raises InstallError: it is that, or somebody else's."""
        if self._entry(runtime, force=force) is None:
            return False
        if self.file.get(*default) == runtime.name:
            raise InstallError(f"`{default[-1]}` in {self._config} is {runtime.name}", hint=f"set it to {other} first")
        self.file.remove([*self._keys, runtime.name])
        return True

    def paths(self) -> dict[str, str]:
        """Name → path of all entries."""
        return {name: self._path_of(entry) or "" for name, entry in self.file.table(*self._keys).items()}

    def changes(self) -> list[Change]:
        """A drop-in of ours in which nothing is left goes."""
        after = self.file.encode()
        is_empty = self._config.name == DROP_IN and not after.strip()
        return change(self._config, self._before, None if is_empty else after)
