"""TOML files, changed in place: comments and order stay, and nothing but what was meant is different afterwards."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from shim.errors import InstallError

Table = dict[str, Any]


class TomlFile:
    """path, and its bytes (b"" for a new file). `plain` is what the file says; `set`, `remove` change it. Raises
    InstallError when it is not valid."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        self._data = data
        try:
            text = data.decode("utf-8")
            self.plain: Table = tomllib.loads(text)
            self._document = tomlkit.parse(text)
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, TOMLKitError, RecursionError) as error:
            raise InstallError(
                f"{path} is not valid TOML: {' '.join(str(error).split())}",
                hint="mend it first (a template, as k3s has, must be edited by hand)",
            ) from None
        self._wanted = copy.deepcopy(self.plain)

    def get(self, *keys: str) -> Any:
        """The value at `keys`, None if there is none. InstallError when something on the way is no table."""
        here: Any = self.plain
        for number, key in enumerate(keys):
            if not isinstance(here, dict):
                raise InstallError(f"{self.path}: `{'.'.join(keys[:number])}` must be a table")
            if key not in here:
                return None
            here = here[key]
        return here

    def table(self, *keys: str) -> Table:
        """The table at `keys`, {} if there is none."""
        found = self.get(*keys)
        if found is not None and not isinstance(found, dict):
            raise InstallError(f"{self.path}: `{'.'.join(keys)}` must be a table")
        return found or {}

    def set(self, keys: Sequence[str], value: Any, comment: str = "") -> None:
        """Set a value or a whole table, and make the tables above it."""
        here: Any = self._document
        wanted = self._wanted
        try:
            for number, key in enumerate(keys[:-1]):
                if key not in here:
                    here[key] = tomlkit.table(is_super_table=number < len(keys) - 2 or isinstance(value, dict))
                here = here[key]
                wanted = wanted.setdefault(key, {})
            here[keys[-1]] = _item(value, comment)
        except (TOMLKitError, ValueError, TypeError) as error:  # an inline table on the way, which takes no tables
            raise self._unsafe() from error
        wanted[keys[-1]] = value

    def remove(self, keys: Sequence[str]) -> None:
        """Remove what is there, and the tables above it that are empty then."""
        for length in range(len(keys), 0, -1):
            here: Any = self._document
            wanted = self._wanted
            for key in keys[: length - 1]:
                here, wanted = here[key], wanted[key]
            if length < len(keys) and wanted[keys[length - 1]]:
                return
            del here[keys[length - 1]]
            del wanted[keys[length - 1]]

    def comment(self, *keys: str) -> str:
        """The comment on the line of a table's or value's name."""
        here: Any = self._document
        for key in keys:
            here = here[key]
        return str(here.trivia.comment) if hasattr(here, "trivia") else ""

    def encode(self) -> bytes:
        """The file's new bytes. InstallError if they would not say just what was asked for."""
        if self._wanted == self.plain:
            return self._data
        text = tomlkit.dumps(self._document).rstrip("\n") + "\n"
        try:
            same = tomllib.loads(text) == self._wanted
        except tomllib.TOMLDecodeError:
            same = False
        if not same:
            raise self._unsafe()
        return text.encode()

    def _unsafe(self) -> InstallError:
        return InstallError(
            f"{self.path} is written in a way that cannot be changed safely", hint="add the runtime by hand"
        )


def _item(value: Any, comment: str) -> Any:
    if isinstance(value, dict):
        made = tomlkit.table()
        for key, item in value.items():
            made[key] = _item(item, "")
    else:
        made = tomlkit.item(value)
    if comment:
        made.comment(comment)
    return made
