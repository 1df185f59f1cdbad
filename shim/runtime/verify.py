"""Looks at a merged root before the runtime does, through openat2(2) inside that root only.

What it makes impossible is a container over a damaged tree: no /proc, a deleted directory, links that are empty or
lead nowhere. Names that a higher layer overrides are that layer's business.
"""

from __future__ import annotations

import errno
import os
import stat

from shim.errors import MountError
from shim.mount import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

_DIRS = {"proc": 0o555, "sys": 0o555, "dev": 0o755}  # what the runtime mounts on: names and usual modes
_LINKS_MAX = 4096
_NAME_MAX = 255
_ELSEWHERE = "the daemon may run in another mount namespace than this engine: restart it from there"
_HINT = "make the index again with `clip-shim index REF -o FILE`, from a registry reference"


def check_tree(tree: str, dirs: Iterable[Any], device: str = "") -> None:
    """See that the tree which the daemon names is visible here and has what the daemon says. Raises MountError.

    device: "major:minor" of the tree's mount, "" if the daemon does not say: without it an empty directory passes for
    an image that has none of `dirs`.
    """
    try:
        root = os.open(tree, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise MountError(f"the tree {tree} cannot be opened: {_name(error)}", hint=_ELSEWHERE) from error
    try:
        found = os.fstat(root).st_dev
        if device and device != f"{os.major(found)}:{os.minor(found)}":
            raise MountError(f"the daemon mounted a tree at {tree}, which is not to be seen here", hint=_ELSEWHERE)
        for name in dirs:
            if name in _DIRS and not _is_dir(_look(root, name)):
                raise MountError(
                    f"the tree {tree} shows no directory /{name}, although the index has one", hint=_ELSEWHERE
                )
    finally:
        os.close(root)


def check_root(root: int, answer: dict[str, Any], layers: list[bytes], *, writable: bool) -> None:
    """Check, and where that is safe mend, the merged root that descriptor `root` is open on.

    answer: the daemon's, with `tree` and `symlinks`; layers: the engine's upper and lowers; writable: whether the
    merged root has an upper, so that a missing /proc, /dev or /sys can be made. Raises MountError.
    """
    for name, mode in _DIRS.items():
        _check_dir(root, name, mode, writable=writable)
    symlinks = answer.get("symlinks") or {}
    if not isinstance(symlinks, dict) or len(symlinks) > _LINKS_MAX:
        raise MountError("the daemon's list of top-level links makes no sense")
    for name, link in symlinks.items():
        target = link.get("target") if isinstance(link, dict) else None
        if not isinstance(target, str) or not 0 < len(name) <= _NAME_MAX or "/" in name or "\0" in name + target:
            raise MountError("the daemon's list of top-level links makes no sense")
        _check_link(root, name, target, bool(link.get("resolves")), str(answer["tree"]), layers)


def _check_dir(root: int, name: str, mode: int, *, writable: bool) -> None:
    status = _look(root, name)
    if status is None:
        if not writable:
            raise MountError(
                f"the merged root has no /{name}, and nothing can be made in it: its overlay has no upper",
                hint="run the container without a read-only snapshot, or use an image that has the directory",
            )
        try:
            os.mkdir(name, mode, dir_fd=root)
            os.chmod(name, mode, dir_fd=root)  # whatever the umask
        except OSError as error:
            raise MountError(f"/{name} is missing in the merged root and cannot be made: {_name(error)}") from error
        status = _look(root, name)
    if not _is_dir(status):
        raise MountError(f"/{name} in the merged root is no directory: nothing can be mounted on it", hint=_HINT)
    try:
        os.close(syscalls.openat2(root, name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW))
    except OSError as error:
        raise MountError(f"/{name} in the merged root cannot be opened: {_name(error)}", hint=_HINT) from error


def _check_link(root: int, name: str, target: str, resolves: bool, tree: str, layers: list[bytes]) -> None:
    raw = name.encode("utf-8", "surrogateescape")
    if not target:
        raise MountError(f"the index has an empty symlink /{name}: it is damaged", hint=_HINT)
    status = _look(root, raw)
    if (
        status is not None
        and stat.S_ISLNK(status.st_mode)
        and _read_link(root, raw) == target.encode("utf-8", "surrogateescape")
    ):
        # a container may have removed what the link leads to; then the tree alone still has it
        if resolves and not _resolves(root, raw) and not _resolves_in(tree, raw):
            raise MountError(f"the symlink /{name} -> {target} leads nowhere in the tree", hint=_HINT)
        return
    if any(_exists(os.path.join(layer, raw)) for layer in layers):
        return  # the engine's layers say something else of that name, or removed it
    raise MountError(f"/{name} is not the symlink to {target} that the index has", hint=_HINT)


def _look(root: int, name: str | bytes) -> os.stat_result | None:
    """lstat inside the root. None if there is nothing; MountError for any other trouble, a dead tree above all."""
    try:
        fd = syscalls.openat2(root, name, os.O_PATH | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MountError(f"/{os.fsdecode(name)} in the root cannot be looked at: {_name(error)}") from error
    try:
        return os.fstat(fd)
    finally:
        os.close(fd)


def _is_dir(status: os.stat_result | None) -> bool:
    """A directory that still has a name: runc cannot mount on a deleted one."""
    return status is not None and stat.S_ISDIR(status.st_mode) and status.st_nlink > 0


def _read_link(root: int, name: bytes) -> bytes:
    fd = syscalls.openat2(root, name, os.O_PATH | os.O_NOFOLLOW)
    try:
        return os.readlink(b"", dir_fd=fd)
    finally:
        os.close(fd)


def _resolves(root: int, name: bytes) -> bool:
    try:
        os.close(syscalls.openat2(root, name, os.O_PATH))
    except OSError:
        return False
    return True


def _resolves_in(tree: str, name: bytes) -> bool:
    root = os.open(tree, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _resolves(root, name)
    finally:
        os.close(root)


def _exists(path: bytes) -> bool:
    try:
        os.lstat(path)
    except OSError:
        return False
    return True


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error.errno))
