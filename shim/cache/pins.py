"""Images that the cleaner leaves alone: STATE/pins, one line each.

    sha256:<64 hex>  a name for people

The digest is an index file's own or an image's (its manifest's). The file is replaced as a whole.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shim.errors import CacheError

_LINE = re.compile(r"(sha256:[0-9a-f]{64})(?:\s+(\S.*))?")
_MAX_BYTES = 1 << 20


class Pins:
    """STATE/pins. Each change is made under a lock of the state directory, so that two at once both last."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "pins"

    def read(self) -> dict[str, str]:
        """Digest → name. Raises CacheError when the file cannot be read: then nothing may be taken for unpinned."""
        try:
            with open(self._path, encoding="utf-8", errors="replace") as file:
                text = file.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise CacheError(f"cannot read {self._path}: {error.strerror}") from error
        if len(text) > _MAX_BYTES:
            raise CacheError(f"{self._path} is too long", hint="remove lines, or the file")
        found = {}
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            match = _LINE.fullmatch(line.strip())
            if match is None:
                raise CacheError(
                    f"{self._path}, line {number}: no digest", hint="a line is sha256:<64 hex>, a space and a name"
                )
            found[match[1]] = match[2] or ""
        return found

    def add(self, digest: str, name: str) -> bool:
        """False if it is pinned already."""
        with self._changed() as pins:
            known = digest in pins
            pins[digest] = " ".join(name.split())
        return not known

    def remove(self, digest: str) -> bool:
        """False if it was not pinned."""
        with self._changed() as pins:
            return pins.pop(digest, None) is not None

    @contextmanager
    def _changed(self) -> Iterator[dict[str, str]]:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                pins = self.read()
                yield pins
                self._write(pins)
                os.fsync(lock)
            finally:
                os.close(lock)
        except OSError as error:
            raise CacheError(f"cannot write {self._path}: {error.strerror}") from error

    def _write(self, pins: dict[str, str]) -> None:
        temporary = self._path.with_name("pins.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write("".join(f"{digest} {name}".rstrip() + "\n" for digest, name in pins.items()))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._path)
