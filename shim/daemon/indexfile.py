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
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from shim.cache import discard
from shim.errors import CacheError, IndexFormatError
from shim.index import codec, container
from shim.registry.ref import ImageRef

Identity = tuple[int, int, int, int, int]

_PIECE = 1 << 20
_END = 16  # bytes of the trailer
_KNOWN = 4096
_SETTLED_NS = 2 * 10**9  # a file changed later than this before now can change again without new times


@dataclass(frozen=True, slots=True)
class Head:
    """What an index file says it is, and the hash of the very bytes that say so.

    hex: SHA-256 of our part of the file. image, digest: as in Index. archive: where the data are, if in an archive.
    """

    hex: str
    image: str
    digest: str
    archive: str | None

    @property
    def ref(self) -> ImageRef:
        """The image, by its platform's manifest. Raises ImageReferenceError."""
        return ImageRef.parse(self.image, local_paths=False).with_digest(self.digest)


def identify(fd: int, known: dict[Identity, Head]) -> Head:
    """The head of the index file open at `fd`, which is read rather than mapped: one that shrinks must not end the
    daemon. Raises IndexFormatError: it is none, is damaged, or cannot be read.

    known: files read before, which is added to. A file is remembered only when it has been left alone for a while,
    since within one tick of the file system's clock it may change and keep its times.
    """
    try:
        info = os.fstat(fd)
        now = identity(info)
        found = known.get(now)
        if found is not None:
            return found
        data = b"".join(_pieces(fd, _check_form(fd, info)))
        index = codec.decode(data, tree=False, spans=False)
        archive = None if index.archive is None else index.archive.location
        head = Head(sha256(data).hexdigest(), index.image, index.digest, archive)
        settled = time.time_ns() - max(info.st_mtime_ns, info.st_ctime_ns) > _SETTLED_NS
        if settled and identity(os.fstat(fd)) == now:
            if len(known) >= _KNOWN:
                known.clear()
            known[now] = head
    except OSError as error:
        raise IndexFormatError(f"the index cannot be read: {error.strerror}") from error
    return head


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
