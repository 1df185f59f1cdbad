"""Reads layers through their blob files, and never keeps a caller waiting who has been killed."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Self

from shim.errors import MountError
from shim.fuse.requests import kill_pending
from shim.index.model import BLOCK, Layer, Node
from shim.tree.view import pieces

_MAX_THREADS = 128
_LOOK_EVERY = 0.2  # seconds between looks at a waiting caller; the wait itself ends with the answer

Answer = bytes | OSError


class BlobFiles:
    """The open blob files of an index's layers, in its order. Their server has verified every byte they give."""

    def __init__(self, directory: str, names: Sequence[str], layers: Sequence[Layer]) -> None:
        """Open `names` in `directory`. Raises MountError if one is not the file of its layer."""
        self._fds: list[int] = []
        if len(names) != len(layers):
            raise MountError(f"{len(names)} layer files were given, the index has {len(layers)} layers")
        try:
            for name, layer in zip(names, layers, strict=True):
                self._fds.append(self._open(directory, name, layer))
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _open(directory: str, name: str, layer: Layer) -> int:
        if not name.startswith(layer.diff_id.partition(":")[2] + "-") or "/" in name:
            raise MountError(f"layer file {name} is not that of layer {layer.diff_id}")
        try:
            fd = os.open(os.path.join(directory, name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise MountError(f"cannot open layer file {name}: {error.strerror}") from error
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != -(-layer.uncompressed_size // BLOCK) * BLOCK:
            os.close(fd)
            raise MountError(f"layer file {name} has {found.st_size} bytes, the index says {layer.uncompressed_size}")
        return fd

    def read(self, node: Node, offset: int, size: int) -> bytes:
        """Up to `size` bytes of a file; fewer only at its end. Holes are zeros. Raises OSError."""
        size = min(size, node.size - offset)
        if size <= 0:
            return b""
        found = list(pieces(node, offset, size))
        if len(found) == 1 and found[0][3] == size:
            return self._pread(*found[0][1:])
        answer = bytearray(size)
        for place, layer, at, length in found:
            answer[place : place + length] = self._pread(layer, at, length)
        return bytes(answer)

    def _pread(self, layer: int, offset: int, length: int) -> bytes:
        data = os.pread(self._fds[layer], length, offset)
        while len(data) < length:
            more = os.pread(self._fds[layer], length - len(data), offset + len(data))
            if not more:
                raise OSError(errno.EIO, f"layer {layer + 1} ends before byte {offset + length}")
            data += more
        return data

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class KillableReads:
    """Runs reads in threads of its own, so that a caller that was killed can be let go.

    A thread that waits in read(2) of a blob file cannot be told to give up because *another* process was killed: the
    blob files' server asks for a kill of the reading thread, which is ours. So the read is done by a helper thread, the
    FUSE thread waits for it, and answers EINTR as soon as SIGKILL waits for the process that it works for; the read
    goes on, and what it fetched is in the cache.
    """

    def __init__(self, files: BlobFiles, max_threads: int = _MAX_THREADS) -> None:
        self._files = files
        self._max = max_threads
        self._jobs: SimpleQueue[tuple[Node, int, int, SimpleQueue[Answer]]] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0  # threads waiting for a job, less the jobs that wait for a thread
        self._threads = 0

    def read(self, node: Node, offset: int, size: int, tid: int) -> bytes:
        """As `BlobFiles.read`, for the caller with thread id `tid` (0: unknown). Raises OSError, EINTR if it dies."""
        done: SimpleQueue[Answer] = SimpleQueue()
        with self._lock:
            self._idle -= 1
            start = self._idle < 0 and self._threads < self._max
            self._threads += start
        if start:
            threading.Thread(target=self._work, name="blob-read", daemon=True).start()
        self._jobs.put((node, offset, size, done))
        while True:
            try:
                answer = done.get(timeout=_LOOK_EVERY)
            except Empty:
                if kill_pending(tid):
                    raise InterruptedError(errno.EINTR, "the reader was killed") from None
                continue
            if isinstance(answer, OSError):
                raise answer
            return answer

    def _work(self) -> None:
        while True:
            with self._lock:
                self._idle += 1
            node, offset, size, done = self._jobs.get()
            try:
                done.put(self._files.read(node, offset, size))
            except OSError as error:
                done.put(error)
            except MemoryError:
                done.put(OSError(errno.ENOMEM, "no memory for a read"))
