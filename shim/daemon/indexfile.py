"""The index files that wrappers hand over: which one it is, and a copy of our own.

What comes is somebody else's open file: of any kind, any size, perhaps changing while it is read. Nothing is written
before it looks like an index, and the copy that is kept has the hash it is named by.
"""

from __future__ import annotations

import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from shim.cache import discard
from shim.errors import CacheError, IndexFormatError
from shim.index import container

Identity = tuple[int, int, int, int, int]

_PIECE = 1 << 20
_END = 16  # bytes of the trailer
_KNOWN = 4096
_SETTLED_NS = 2 * 10**9  # a file changed later than this before now can change again without new times


def identify(fd: int, known: dict[Identity, str]) -> str:
    """The hex of the SHA-256 of the index file open at `fd`, of our part of it.

    Raises IndexFormatError: it is none, or cannot be read.

    known: identities of files hashed before, which is added to. A file is remembered only when it has been left alone
    for a while, since within one tick of the file system's clock it may change and keep its times.
    """
    try:
        info = os.fstat(fd)
        now = identity(info)
        found = known.get(now)
        if found is not None:
            return found
        start = _check_form(fd, info)
        hasher = sha256()
        for piece in _pieces(fd, start):
            hasher.update(piece)
        hex_ = hasher.hexdigest()
        settled = time.time_ns() - max(info.st_mtime_ns, info.st_ctime_ns) > _SETTLED_NS
        if settled and identity(os.fstat(fd)) == now:
            if len(known) >= _KNOWN:
                known.clear()
            known[now] = hex_
    except OSError as error:
        raise IndexFormatError(f"the index cannot be read: {error.strerror}") from error
    return hex_


def part(fd: int) -> bytes:
    """Our part of the index file open at `fd`, read rather than mapped: a file that shrinks must not end the daemon.

    Raises IndexFormatError as `identify`.
    """
    try:
        return b"".join(_pieces(fd, _check_form(fd, os.fstat(fd))))
    except OSError as error:
        raise IndexFormatError(f"the index cannot be read: {error.strerror}") from error


def keep(fd: int, hex_: str, directory: Path) -> bool:
    """Copy the index at `fd` to `directory`/index.clip, unless it is there; True if it was not.

    Raises IndexFormatError (it changed since it was identified) and CacheError (our disk).
    """
    if (directory / "index.clip").exists():
        touch(directory)
        return False
    temporary = directory.parent / f".incoming-{threading.get_ident()}"
    hasher = sha256()
    try:
        start = _start(fd, os.fstat(fd).st_size)
        with open(temporary, "wb") as out:
            for piece in _pieces(fd, start):
                hasher.update(piece)
                out.write(piece)
            if hasher.hexdigest() != hex_:
                raise IndexFormatError("the index changed while it was read", hint="try again")
            out.flush()
            os.fsync(out.fileno())
        directory.mkdir(mode=0o700, exist_ok=True)
        temporary.rename(directory / "index.clip")
    except OSError as error:
        raise CacheError(
            f"the index cannot be kept in {directory.parent}: {error.strerror}",
            hint="see `state_dir` in the configuration: is the disk full?",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return True


def touch(directory: Path) -> None:
    """Note that a tree is used now, for the cleaner."""
    try:
        os.utime(directory / "meta.json")
    except OSError:
        pass  # it is not prepared yet, or nothing can be written there


def tidy(directory: Path) -> None:
    """Remove what killed daemons, jobs and cleaners left unfinished in STATE/trees. At start, when nobody works
    there."""
    discard.sweep(directory)
    for path in directory.iterdir():
        if path.name.startswith(".incoming-"):
            path.unlink(missing_ok=True)
        elif path.is_dir() and not (path / "meta.json").exists():
            shutil.rmtree(path, ignore_errors=True)


def identity(info: os.stat_result) -> Identity:
    """What changes when a file does."""
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def _start(fd: int, size: int) -> int:
    """Where our part begins: Go's parts, and an archive's data, stand before it."""
    return container.start_of_part(lambda offset, length: os.pread(fd, length, offset), size)


def _check_form(fd: int, info: os.stat_result) -> int:
    """Raises IndexFormatError unless it looks like an index; where our part of it begins."""
    if not stat.S_ISREG(info.st_mode):
        raise IndexFormatError("the index must be a regular file")
    start = _start(fd, info.st_size)
    if info.st_size - start > container.MAX_FILE:
        raise IndexFormatError(f"the index is {info.st_size} bytes long, at most {container.MAX_FILE} are allowed")
    if os.pread(fd, _END, max(0, info.st_size - _END))[-len(container.END_MAGIC) :] != container.END_MAGIC:
        container.locate(memoryview(os.pread(fd, _END, 0)))  # raises, and says what it is instead
        raise IndexFormatError("the file is not a clip index")
    return start


def _pieces(fd: int, start: int) -> Iterator[bytes]:
    offset = start
    while piece := os.pread(fd, _PIECE, offset):
        offset += len(piece)
        if offset - start > container.MAX_FILE:
            raise IndexFormatError("the index grew while it was read")
        yield piece
