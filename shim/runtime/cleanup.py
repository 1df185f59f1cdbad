"""Takes away what a container of ours leaves: by the poststop hook, by the next create of its ID, or by the sweep.

Each step is repeatable and none follows a path into a container's files while something is mounted there.
"""

from __future__ import annotations

import os
import sys

from shim.errors import ShimError
from shim.mount import mountinfo, overlay
from shim.runtime.records import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.runtime.config import Config

_STACK_MAX = 16
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def poststop(arguments: list[str], config: Config) -> int:
    """`clip-poststop DIRECTORY TOKEN`, called by the runtime after the container is gone. Returns an exit code.

    Does nothing when the directory is gone or belongs to a later run of the same ID.
    """
    if len(arguments) != 2:
        sys.stderr.write("clip-shim: usage: clip-poststop DIRECTORY TOKEN\n")
        return 2
    directory, token = arguments
    base, name = os.path.split(directory)
    top = os.path.join(config.run_dir, "containers")
    if os.path.dirname(base) != top or os.path.normpath(directory) != directory:
        sys.stderr.write(f"clip-shim: {directory} does not lie in {top}\n")
        return 2
    record = Record.at(config, os.path.basename(base), name)
    try:
        lock = record.lock()
    except OSError:
        return 0
    try:
        record.load()
        if record.state.get("token") != token:
            return 0
        restore_config(record)
        trash = discard(record)
        record.release()
    except (OSError, ShimError) as error:
        sys.stderr.write(f"clip-shim: {error}\n")
        return 1
    finally:
        os.close(lock)
    empty(trash)
    return 0


def discard(record: Record) -> str | None:
    """Unmount a merged root of ours and take its upper away (not a kept one). OSError, ShimError.

    Returns where the upper is now, to be deleted by `empty` when no lock is held any more.
    """
    unmount(record.rootfs)
    place = os.path.join(record.trash_dir, f"{os.getpid()}-{os.urandom(6).hex()}")
    try:
        os.makedirs(record.trash_dir, 0o700, exist_ok=True)
        os.rename(record.state_dir, place)
    except FileNotFoundError:
        return None
    return place


def empty(trash: str | None) -> None:
    """Delete what `discard` took away. What cannot be deleted stays for the sweep.

    A container makes directories as deep as it likes: those inside another are moved to the top first, so neither
    recursion nor a path's length ends this. (shutil.rmtree recurses, and takes as long to import as Python to start.)
    """
    if trash is None:
        return
    try:
        top = os.open(trash, _DIRECTORY)
    except OSError:
        return
    try:
        _empty(top)
        os.rmdir(trash)
    except OSError:
        pass
    finally:
        os.close(top)


def _empty(top: int) -> None:
    """Delete what is in an open directory, as far as possible."""
    prefix = os.urandom(8).hex()
    waiting = _strip(top)
    moved = 0
    while waiting:
        name = waiting.pop()
        try:
            fd = os.open(name, _DIRECTORY, dir_fd=top)
        except OSError:
            continue
        try:
            for below in _strip(fd):
                moved += 1
                os.rename(below, f"{prefix}-{moved}", src_dir_fd=fd, dst_dir_fd=top)
                waiting.append(f"{prefix}-{moved}")
            os.rmdir(name, dir_fd=top)
        except OSError:
            continue  # chattr +i here or below
        finally:
            os.close(fd)


def _strip(fd: int) -> list[str]:
    """Delete all in an open directory but its directories, which are named."""
    left = []
    with os.scandir(fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                left.append(entry.name)
            else:
                try:
                    os.unlink(entry.name, dir_fd=fd)
                except OSError:
                    continue  # chattr +i
    return left


def unmount(path: str) -> None:
    """Unmount all that is mounted on one of our own directories. OSError."""
    where = os.fsencode(os.path.realpath(path))
    for _ in range(_STACK_MAX):
        if mountinfo.at(where) is None:
            return
        overlay.detach(where)


def restore_config(record: Record) -> None:
    """Give the bundle its own config.json back, if it is still there as we left it."""
    before, after = record.kept_config()
    path = record.state.get("config")
    if not before or not isinstance(path, str):
        return
    from shim.runtime.bundle import Bundle

    try:
        current = Bundle(os.path.dirname(path), os.path.basename(path))
        if current.data == after:
            current.write(before)
    except (OSError, ShimError):
        return  # an engine deletes its bundles itself


def sweep(config: Config) -> list[str]:
    """Clean up after containers that are gone without a word: the daemon calls it at start and from time to time.

    Left alone: what a live process makes, what the runtime still knows, and overlays in place that are still mounted,
    as the engine may start that container again. Returns the directories that were cleaned up. OSError, ShimError.
    """
    done = [record.directory for record in _records(config, config.run_dir) if _sweep_one(record)]
    for record in _records(config, config.state_dir):  # uppers from before a reboot
        if not os.path.lexists(record.directory):
            discard(record)
            done.append(record.state_dir)
    trash = os.path.join(config.state_dir, "trash")
    for name in _names(trash):
        empty(os.path.join(trash, name))
    return done


def _sweep_one(record: Record) -> bool:
    try:
        lock = record.lock()
    except OSError:
        return False
    try:
        record.load()
        state = record.state
        if record.has_owner():
            return False
        if state and os.path.lexists(os.path.join(str(state.get("root")), str(state.get("container")))):
            return False
        if state.get("kind") == "in-place":
            entry = mountinfo.at(str(state.get("rootfs")))
            if entry is not None and entry.source.startswith(overlay.OURS):
                return False
        else:
            restore_config(record)
            discard(record)
        record.release()
    finally:
        os.close(lock)
    return True


def _records(config: Config, directory: str) -> list[Record]:
    top = os.path.join(directory, "containers")
    found: list[Record] = []
    for base in _names(top):
        found += [Record.at(config, base, name) for name in _names(os.path.join(top, base))]
    return found


def _names(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []
