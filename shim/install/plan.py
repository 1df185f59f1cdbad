"""What is to be changed in an engine's files, and how that is done without ever leaving half a file."""

from __future__ import annotations

import difflib
import errno
import os
import re
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from shim.errors import InstallError

LAUNCHER_NAME = "clip-shim-runtime"
BACKUP = ".clip-shim.bak"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z")
_MAX = 4 << 20
_HINTS = {
    errno.EROFS: "change it where the system's files are made (an image, a generator), or use --config",
    errno.EBUSY: "the file is a mount by itself: change it where it comes from",
    errno.ENOSPC: "free space there",
}


@dataclass(frozen=True, slots=True)
class Runtime:
    """name: what engines call it; path: the file they run. Raises InstallError for a name that they do not take."""

    name: str
    path: str

    def __post_init__(self) -> None:
        if not _NAME.match(self.name) or self.name in ("runc", "crun"):
            raise InstallError(
                f"{self.name!r} cannot be the name of the runtime",
                hint="lower-case letters, digits, dots and dashes; runc and crun are taken; `clip` is the default",
            )

    def is_ours(self, path: object) -> bool:
        """Whether an entry that leads to `path` is one that an install of ours wrote."""
        return isinstance(path, str) and (path == self.path or os.path.basename(path) == LAUNCHER_NAME)


@dataclass(frozen=True, slots=True)
class Change:
    """One file. before: its bytes, None if there is none; after: None to remove it. check: called with a file that has
    the new content and lies beside the old one; raises InstallError if the engine would not take it."""

    path: Path
    before: bytes | None
    after: bytes | None
    check: Callable[[Path], None] | None = None

    def diff(self) -> str:
        """Unified; "" when nothing changes."""
        old, new = (_lines(data) for data in (self.before, self.after))
        names = (f"a{self.path}" if self.before is not None else "/dev/null", f"b{self.path}")
        return "".join(difflib.unified_diff(old, new, names[0], names[1] if self.after is not None else "/dev/null"))

    def apply(self) -> Path | None:
        """Do it in one step: mode, owner and labels are kept, a link stays a link. Returns the backup, if any.

        Raises InstallError, also if the file is not what was planned for.
        """
        target = Path(os.path.realpath(self.path))
        try:
            if read(target) != self.before:
                raise InstallError(f"{self.path} was changed meanwhile", hint="run this again")
            if self.after is None:
                target.unlink()
                _sync(target.parent)
                return None
            target.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            temporary = _aside(target) / f".{target.name}.clip-{os.getpid()}"
            try:
                _write(temporary, self.after, target if self.before is not None else None)
                if self.check is not None:
                    self.check(temporary)
                backup = self._keep(target)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            _sync(target.parent)
        except OSError as error:
            hint = _HINTS.get(error.errno or 0, "run this as root")
            raise InstallError(f"{error.filename or target}: {error.strerror}", hint=hint) from error
        return backup

    def _keep(self, target: Path) -> Path | None:
        """A copy of the old file."""
        if self.before is None:
            return None
        backup = _aside(target) / (target.name + BACKUP)
        temporary = backup.with_name(f".{backup.name}.{os.getpid()}")
        try:
            _write(temporary, self.before, target)
            os.replace(temporary, backup)
        finally:
            temporary.unlink(missing_ok=True)
        return backup


@dataclass(frozen=True, slots=True)
class Plan:
    """changes: empty when all is as it should be; reload: the command that makes the engine see them, or "" when none
    is needed; usage: how a container is started; notes: what a person should know."""

    changes: list[Change]
    reload: str
    usage: str
    notes: list[str] = field(default_factory=list)


def change(
    path: Path, before: bytes | None, after: bytes | None, check: Callable[[Path], None] | None = None
) -> list[Change]:
    """The change, or none."""
    return [] if before == after else [Change(path, before, after, check)]


def check_free(config: Path, runtime: Runtime, path: str | None, shown: object = None) -> None:
    """Raise InstallError unless the entry of the runtime's name, which leads to `path`, is one of ours.

    shown: what the message says of one without a path.
    """
    if not runtime.is_ours(path):
        raise InstallError(
            f"the runtime {runtime.name} in {config} is another one: {path or shown or 'without a path'}",
            hint="choose another with --runtime-name, or take its place with --force",
        )


def read(path: Path) -> bytes | None:
    """A file's bytes, None if there is none. Raises InstallError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InstallError(f"{path} cannot be read: {error.strerror}") from error
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode) or info.st_size > _MAX:
        os.close(fd)
        raise InstallError(f"{path} is no regular file of at most {_MAX >> 20} MiB", hint="name another file")
    with open(fd, "rb") as file:
        return file.read(_MAX)


def _aside(target: Path) -> Path:
    """Where a copy of `target` may lie, also for ever, should we be killed: not in a drop-in directory, since CRI-O
    reads all that is in its own, whatever its name. (One that is a file system of its own has to hold its own.)"""
    folder = target.parent
    if folder.name.endswith(".d") and folder.stat().st_dev == folder.parent.stat().st_dev:
        return folder.parent
    return folder


def _write(path: Path, data: bytes, like: Path | None) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        if like is None:
            os.fchmod(fd, 0o644)
        else:
            info = os.stat(like)
            os.fchown(fd, info.st_uid, info.st_gid)
            shutil.copystat(like, path)  # mode and extended attributes, SELinux's label among them
            os.utime(fd)
        os.fsync(fd)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lines(data: bytes | None) -> list[str]:
    text = (data or b"").decode("utf-8", "replace")
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n\\ No newline at end of file\n"
    return lines
