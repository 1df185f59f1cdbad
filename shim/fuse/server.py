"""The blob server: answers the kernel's FUSE requests for a directory of read-only files, one per layer.

Threads
    readers (2 by default)   each waits on the descriptor with its own epoll (EPOLLEXCLUSIVE: one request wakes one
                             thread), reads a request and answers it at once, if no network is needed: lookups, opens,
                             cached reads. A miss is parked and given to the blob; the reader goes on.
    the blobs' pool threads  call back with bytes or an error; the reply is written from there.
    one watcher              deadlines and SIGKILL of parked reads (requests.py).
Locks: `_lock` guards the tables of blobs; it is held for dictionary work and a journal line, never for I/O on a blob.

Rules
    - This process never opens, stats or lists anything below the mount, nor on an EROFS or overlay above it.
    - A reply may meet ENOENT: the request is gone (aborted, or answered by a predecessor). That is no error.
    - A request that cannot be understood is answered with an errno; nothing the kernel sends ends a reader
      except ENODEV (unmounted).
    - Replies are complete before they are sent: bytes are copied from the cache file into a buffer, the blob's epoch is
      looked at again, then they go out. splice(2) from the cache file would save a copy (measured: 3.1 against 2.8 GB/s
      for 1 MiB reads), but pages in a pipe are zeroed in place when the cleaner punches them out of the file, and a
      pipe of more than 1 MiB needs CAP_SYS_RESOURCE.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from shim import log
from shim.counters import Histogram
from shim.errors import DaemonError, ShimError
from shim.fuse import proto
from shim.fuse.blob import Blob, Buffer, ReadFailure, Waiting
from shim.fuse.journal import FIRST_NODE, Journal
from shim.fuse.reader import Reader
from shim.fuse.requests import Parked, ParkedRequests

_GONE = (errno.ENOENT, errno.ENODEV, errno.ENOTCONN)


def log_failure(failure: ReadFailure) -> None:
    """The one log line of a failed read."""
    log.error(
        "read failed",
        blob=failure.blob,
        offset=failure.offset,
        size=failure.size,
        pid=failure.pid,
        waited=round(failure.waited, 3),
        cause=failure.cause,
    )


class BlobServer:
    """Serves blobs on a FUSE descriptor until `stop`, or until it is unmounted.

    fd: from `connection.mount`, or taken over from a predecessor. init: None for a fresh descriptor (the server waits
    for INIT), the predecessor's state otherwise. journal: see journal.py; the blobs it names must be added again before
    `start` after a hand-over. read_deadline: seconds. direct_io: see `OPEN` below.

    Page cache or not (measured with tests/bench/reads.py, every file of a 206 MB tree through EROFS, all cached, kernel
    caches dropped): with direct_io every read of EROFS is a request (8,100; 1.4 to 2.2 s, 0.6 to 0.7 of ext4's time,
    0.46 s of CPU here); without it the kernel reads blobs ahead and keeps their pages beside EROFS's own (1,000
    requests; 1.0 to 1.2 s, 0.3 to 0.5 of ext4's, 0.1 to 0.2 s). What is fetched for a cold start is the same. The page
    cache is the default; the second copy is clean and goes first when memory is short. The blobs' read-ahead stays at
    the kernel's 128 KiB: more is hardly faster, and would reach into runs of the layer that nobody asked for.
    """

    def __init__(
        self,
        fd: int,
        init: proto.InitState | None,
        journal: Journal,
        *,
        read_deadline: float = 60.0,
        threads: int = 2,
        direct_io: bool = False,
        on_failure: Callable[[ReadFailure], None] = log_failure,
        on_unmounted: Callable[[], None] | None = None,
    ) -> None:
        self.fd = fd
        self.init = init
        self._journal = journal
        self._read_deadline = read_deadline
        self._open_flags = proto.FOPEN_NOFLUSH | (proto.FOPEN_DIRECT_IO if direct_io else proto.FOPEN_KEEP_CACHE)
        self._on_failure = on_failure
        self._on_unmounted = on_unmounted
        self._lock = threading.Lock()
        self.blobs: dict[int, Blob] = {}
        self._names: dict[bytes, Blob] = {}
        self._parked = ParkedRequests(self._answer_killed, self._answer_late)
        self.stopping = False
        self._unmounted = False
        self.stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._readers = [Reader(self, number) for number in range(threads)]

    @classmethod
    def create(
        cls,
        fd: int,
        run_dir: Path,
        *,
        journal: Journal | None = None,
        read_deadline: float = 60.0,
        on_failure: Callable[[ReadFailure], None] = log_failure,
        on_unmounted: Callable[[], None] | None = None,
    ) -> BlobServer:
        """A server for a descriptor fresh from `connection.mount`, with a new journal in `run_dir`; or for one that was
        taken over, with the `journal` it had."""
        if journal is None:
            journal = Journal(run_dir / "blobs.journal", fresh=True)
        init = journal.init
        return cls(fd, init, journal, read_deadline=read_deadline, on_failure=on_failure, on_unmounted=on_unmounted)

    def node_id(self, name: bytes) -> int:
        """The node id for a blob of this name: the one it had in this mount's life, or a new one."""
        return self._journal.allocate(name)

    def add(self, blob: Blob) -> None:
        """Show a blob. It can be looked up when this returns. Raises DaemonError (name taken, or no name), OSError."""
        name = blob.name
        if not name or len(name) > proto.NAME_MAX or b"/" in name or b"\0" in name or blob.node_id < FIRST_NODE:
            raise DaemonError(f"{name!r} (node {blob.node_id}) cannot be a blob's name")
        with self._lock:
            if name in self._names or blob.node_id in self.blobs:
                raise DaemonError(f"the blob {os.fsdecode(name)} is there already")
            self._journal.add_node(blob.node_id, name, blob.size)
            self.blobs[blob.node_id] = blob
            self._names[name] = blob

    def remove(self, node_id: int) -> bool:
        """Take a blob away. False, and nothing changed, while it is open or when it is not there.

        The kernel is told to forget the name. Without that an open of the path would get ESTALE and look again, but not
        one of an O_PATH descriptor, as mounts make it.
        """
        with self._lock:
            blob = self.blobs.get(node_id)
            if blob is None or self._journal.open_count(node_id):
                return False
            del self.blobs[node_id], self._names[blob.name]
        self._notify(proto.NOTIFY_INVAL_ENTRY, proto.inval_entry(blob.name))  # waits for lookups: not under the lock
        self._journal.remove_node(node_id)  # last: a successor that still finds it there takes it away as well
        return True

    def substitute(self, blob: Blob) -> None:
        """Answer reads of a blob's file from `blob` from now on, which has the same name, node and size."""
        with self._lock:
            if blob.node_id in self.blobs:
                self.blobs[blob.node_id] = blob

    def open_count(self, node_id: int) -> int:
        """How many open files the blob has: those of EROFS mounts, loop devices and readers."""
        return self._journal.open_count(node_id)

    def start(self) -> None:
        """Serve. After a hand-over the blobs that the journal names must be there again: the kernel delivers once more
        what the predecessor read and did not answer, before we read anything (later it would repeat ours too)."""
        self.resend()
        sys.setswitchinterval(0.0005)  # a cached read waits this long for the GIL beside CPU-bound threads, not 5 ms
        os.set_blocking(self.fd, False)
        self._parked.start()
        for reader in self._readers:
            reader.start()

    def stop(self) -> None:
        """Stop reading the descriptor; it stays open, the mount stays. Parked reads stay unanswered for a successor."""
        self.stopping = True
        if self.stop_fd >= 0:
            os.eventfd_write(self.stop_fd, 1)
        self._parked.close()
        for reader in self._readers:
            if reader.is_alive() and reader is not threading.current_thread():
                reader.join()
        if self.stop_fd >= 0:
            os.close(self.stop_fd)
            self.stop_fd = -1
        self._journal.close()

    def resend(self) -> None:
        """Ask the kernel to deliver unanswered requests again, after a hand-over. Nothing where it cannot (< 6.9)."""
        if self.init is not None and self.init.can_resend:
            self._notify(proto.NOTIFY_RESEND)

    def _notify(self, code: int, data: bytes = b"") -> None:
        """A message to the kernel that answers nothing: its header has the code instead of an error."""
        self.send((proto.OUT_HEADER.pack(proto.OUT_HEADER.size + len(data), code, 0), data))

    @property
    def can_resend(self) -> bool:
        """Whether a successor can answer what we leave unanswered (Linux >= 6.9); False before the first request."""
        return self.init is not None and self.init.can_resend

    @property
    def waits(self) -> Histogram:
        """How long reads waited that were not answered from the cache."""
        return self._parked.waits

    def waiting(self) -> list[Waiting]:
        """The reads that wait for bytes now, oldest first."""
        now = time.monotonic()
        parked = sorted(self._parked.snapshot(), key=lambda request: request.since)
        return [
            Waiting(p.pid, os.fsdecode(p.blob.name), p.offset, p.size, now - p.since, p.blob.trouble()) for p in parked
        ]

    # Answers. Also called from pool threads and the watcher.

    def reply(self, unique: int, data: Buffer = b"") -> None:
        self.send((proto.OUT_HEADER.pack(proto.OUT_HEADER.size + len(data), 0, unique), data))

    def reply_error(self, unique: int, code: int) -> None:
        self.send((proto.OUT_HEADER.pack(proto.OUT_HEADER.size, -code, unique),))

    def send(self, parts: tuple[Buffer, ...]) -> None:
        try:
            os.writev(self.fd, parts)
        except OSError as error:
            if error.errno not in _GONE:
                log.error("the kernel refused a FUSE reply", error=str(error))

    def park(self, unique: int, pid: int, blob: Blob, offset: int, size: int) -> None:
        """Hand a miss to its blob; the answer comes from one of the blob's threads, or from the watcher."""
        now = time.monotonic()
        self._parked.park(Parked(unique, blob, offset, size, pid, now, now + self._read_deadline))

        def done(result: Buffer | ShimError) -> None:
            request = self._parked.take(unique)
            if request is None:
                return
            if isinstance(result, ShimError):
                self.reply_error(unique, errno.EIO)
                self._fail(request, str(result))
            elif len(result) != size:
                self.reply_error(unique, errno.EIO)
                self._fail(request, f"{len(result)} bytes came instead of {size}")
            else:
                self.reply(unique, result)

        try:
            blob.read_missing(offset, size, done)
        except ShimError as error:
            done(error)

    def _answer_killed(self, request: Parked) -> None:
        self.reply_error(request.unique, errno.EINTR)

    def _answer_late(self, request: Parked) -> None:
        self.reply_error(request.unique, errno.EIO)
        self._fail(request, request.blob.trouble() or "the bytes did not come in time")

    def _fail(self, request: Parked, cause: str) -> None:
        waited = time.monotonic() - request.since
        failure = ReadFailure(os.fsdecode(request.blob.name), request.offset, request.size, request.pid, waited, cause)
        try:
            self._on_failure(failure)
        except Exception:  # noqa: BLE001 - a listener must not take a server thread down
            log.exception("a listener for failed reads failed")

    # Requests. Called from reader threads; `body` is what follows the header.

    def dispatch(self, opcode: int, unique: int, node_id: int, body: memoryview) -> None:
        """Answer any request but READ. Raises struct.error for a body that is too short."""
        handler = _HANDLERS.get(opcode)
        if handler is None:
            self.reply_error(unique, errno.ENOSYS)
        else:
            handler(self, unique, node_id, body)

    def interrupt(self, body: memoryview) -> None:
        self._parked.interrupt(int.from_bytes(body[:8], sys.byteorder))

    def _init(self, unique: int, _node_id: int, body: memoryview) -> None:
        try:
            state = proto.negotiate(body)
        except proto.ProtocolError as error:
            log.error("cannot serve this kernel", error=str(error))
            self.reply_error(unique, errno.EPROTO)
            return
        self._journal.record_init(state)
        self.init = state
        self.reply(unique, proto.init_out(state))

    def _lookup(self, unique: int, node_id: int, body: memoryview) -> None:
        blob = self._names.get(bytes(body).rstrip(b"\0")) if node_id == proto.ROOT_ID else None
        if blob is None:
            self.reply_error(unique, errno.ENOENT)  # an error is not remembered: a blob added later is seen at once
        else:
            self.reply(unique, proto.entry_out(blob.node_id, proto.file_attr(blob.node_id, blob.size)))

    def _getattr(self, unique: int, node_id: int, _body: memoryview) -> None:
        blob = self.blobs.get(node_id)
        if blob is not None:
            self.reply(unique, proto.attr_out(proto.file_attr(node_id, blob.size)))
        elif node_id == proto.ROOT_ID:
            self.reply(unique, proto.attr_out(proto.root_attr()))
        else:
            self.reply_error(unique, errno.ESTALE)

    def _open(self, unique: int, node_id: int, _body: memoryview) -> None:
        handle = unique & proto.UNIQUE_MASK
        with self._lock:  # against `remove`
            if node_id not in self.blobs:
                self.reply_error(unique, errno.ESTALE)
                return
            self._journal.opened(handle, node_id)
        self.reply(unique, proto.OPEN_OUT.pack(handle, self._open_flags, 0))

    def _release(self, unique: int, _node_id: int, body: memoryview) -> None:
        self._journal.closed(proto.RELEASE_IN.unpack_from(body)[0])
        self.reply(unique)

    def _statfs(self, unique: int, _node_id: int, _body: memoryview) -> None:
        with self._lock:
            sizes = [blob.size for blob in self.blobs.values()]
        self.reply(unique, proto.statfs_out(sum(sizes), len(sizes)))

    def _opendir(self, unique: int, _node_id: int, _body: memoryview) -> None:
        self.reply(unique, proto.OPEN_OUT.pack(0, 0, 0))

    def _readdir(self, unique: int, node_id: int, body: memoryview) -> None:
        if node_id != proto.ROOT_ID:
            self.reply_error(unique, errno.ENOTDIR)
            return
        _, after, room, _ = proto.READ_IN.unpack_from(body)
        with self._lock:
            entries = sorted((blob.node_id, blob.name) for blob in self.blobs.values())
        self.reply(unique, proto.dirents(entries, after, min(room, proto.MAX_READ)))

    def _done(self, unique: int, _node_id: int, _body: memoryview) -> None:
        self.reply(unique)

    def unmounted(self) -> None:
        """The kernel says there is no mount any more: the readers end, `on_unmounted` is called once."""
        with self._lock:
            first, self._unmounted = not self._unmounted, True
        if first and self._on_unmounted is not None:
            self._on_unmounted()


_HANDLERS: dict[int, Callable[[BlobServer, int, int, memoryview], None]] = {
    proto.INIT: BlobServer._init,
    proto.LOOKUP: BlobServer._lookup,
    proto.GETATTR: BlobServer._getattr,
    proto.OPEN: BlobServer._open,
    proto.RELEASE: BlobServer._release,
    proto.STATFS: BlobServer._statfs,
    proto.OPENDIR: BlobServer._opendir,
    proto.READDIR: BlobServer._readdir,
    proto.RELEASEDIR: BlobServer._done,
    proto.ACCESS: BlobServer._done,
    proto.FLUSH: BlobServer._done,
    proto.FSYNC: BlobServer._done,
    proto.DESTROY: BlobServer._done,
}
