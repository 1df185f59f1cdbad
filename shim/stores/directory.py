"""Indexes in a local directory: the default store, below STATE/indexes."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO

from shim.errors import StoreError
from shim.index import codec, container
from shim.registry.ref import ImageRef
from shim.stores.base import digest_name, name_of

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class DirectoryStore:
    """Files named as `name_of` says. A file is written under another name, synced, and linked to its own, which fails
    when there is one: so the first writer wins, and a reader never meets half a file, also after a crash."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def url(self) -> str:
        return f"file://{self._root}"

    def open(self, name: str) -> int | None:
        """A descriptor of the file `name`, or None. A link at its end is not followed."""
        try:
            return os.open(self._root / name, _OPEN)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"{self._root / name} cannot be opened: {error.strerror}") from error

    def find(self, image: ImageRef, out: BinaryIO) -> bool:
        return self.fetch(name_of(image), out)

    def fetch(self, name: str, out: BinaryIO, *, limit: int = container.MAX_FILE) -> bool:
        """Write the file called `name`; False if there is none. StoreError when it is longer than `limit` bytes."""
        fd = self.open(name)
        if fd is None:
            return False
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_size > limit:
            os.close(fd)
            raise StoreError(f"{self._root / name} is no regular file of at most {limit} bytes")
        with open(fd, "rb") as file:
            shutil.copyfileobj(file, out, 1 << 20)
        return True

    def keep(self, image: ImageRef, file: Path) -> str:
        self.put(digest_name(file), file)
        return self.put(name_of(image), file)

    def put(self, name: str, file: Path, *, replace: bool = False, note: tuple[str, bytes] | None = None) -> str:
        """Store `file` as `name`. replace: in the place of what is there. note: an extended attribute, if possible."""
        target = self._root / name
        try:
            target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            codec.check_target(target)
            handle, temporary = tempfile.mkstemp(prefix=".incoming-", dir=target.parent)
            try:
                with open(handle, "wb") as out, open(file, "rb") as source:
                    shutil.copyfileobj(source, out, 1 << 20)
                    if note is not None:
                        set_note(out.fileno(), *note)
                    os.fchmod(out.fileno(), 0o644)
                    out.flush()
                    os.fsync(out.fileno())
                if replace:
                    os.replace(temporary, target)
                else:
                    try:
                        os.link(temporary, target)
                    except FileExistsError:
                        pass
            finally:
                Path(temporary).unlink(missing_ok=True)
            _sync(target.parent)
        except OSError as error:
            raise StoreError(
                f"{target} cannot be written: {error.strerror}", hint="is the directory yours, and the disk not full?"
            ) from error
        return f"file://{target}"


def set_note(fd: int, name: str, value: bytes) -> None:
    """Set an extended attribute, if the file system has them."""
    try:
        os.setxattr(fd, name, value)
    except OSError:
        pass


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
