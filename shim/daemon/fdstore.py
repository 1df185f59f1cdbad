"""The receiving end of sd_notify(3), as systemd has it: what a server says, and the descriptors that it leaves here.

Understood: READY=1, WATCHDOG=1, FDSTORE=1 with FDNAME=, FDSTOREREMOVE=1 with FDNAME=, and of our own
`witness.leave`. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from pathlib import Path

from shim.daemon.witness import WITNESS

MAX_FDS = 16
_MAX_MESSAGE = 4096
_FIRST_FD = 3  # SD_LISTEN_FDS_START
_CREDENTIALS = struct.Struct("=iII")  # pid, uid, gid


class FdStore:
    """One server's descriptors, by name, kept over its death; and a socket in RUN on which it talks.

    Only messages of the server itself count (SCM_CREDENTIALS). They are read before a successor is started, so what
    was sent before a crash is here: the kernel keeps the messages of a sender that is dead.
    """

    def __init__(self, run_dir: Path, inherited: dict[str, list[int]]) -> None:
        """inherited: as `notify.inherited` gives it. Raises OSError."""
        self.fds = {name: fds[0] for name, fds in inherited.items()}
        self.ready = False  # the server has said so
        self.last_ping = 0.0  # monotonic time of its last WATCHDOG=1
        self.witness = -1  # readable when it is dead, reaped or not; -1: it has sent none
        self._path = run_dir / f"notify-{os.getpid()}.sock"
        self._directory = os.open(run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for left in run_dir.glob("notify-*.sock"):
            if left == self._path or not os.path.exists(f"/proc/{left.stem[7:]}"):
                left.unlink(missing_ok=True)
        # a socket's own path may have 107 bytes only
        self.address = f"/proc/{os.getpid()}/fd/{self._directory}/{self._path.name}"
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        old = os.umask(0o177)
        try:
            self.socket.bind(self.address)
        finally:
            os.umask(old)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        self.socket.close()
        os.close(self._directory)

    def started(self) -> None:
        """A server is about to be started."""
        self.ready = False
        self.last_ping = time.monotonic()
        if self.witness >= 0:
            os.close(self.witness)
            self.witness = -1

    def receive(self, server: int) -> None:
        """Take in all messages that `server`, a process id, has sent. Never blocks."""
        space = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(4 * MAX_FDS)
        while True:
            try:
                data, ancillary, _, _ = self.socket.recvmsg(_MAX_MESSAGE, space, socket.MSG_CMSG_CLOEXEC)
            except OSError:
                return
            fds, sender = [], (0, -1)
            for _, kind, payload in ancillary:
                if kind == socket.SCM_RIGHTS:
                    fds += list(struct.unpack(f"={len(payload) // 4}i", payload[: len(payload) // 4 * 4]))
                elif kind == socket.SCM_CREDENTIALS:
                    sender = _CREDENTIALS.unpack(payload)[:2]
            if sender == (server, os.getuid()):
                fds = self._obey(data, fds)
            for fd in fds:
                os.close(fd)

    def _obey(self, data: bytes, fds: list[int]) -> list[int]:
        """Do what a message says; returns the descriptors that were not taken."""
        lines = data.decode("utf-8", "replace").split("\n")
        said = dict(line.partition("=")[::2] for line in lines if "=" in line)
        name = said.get("FDNAME", "stored")
        if said.get("READY") == "1":
            self.ready = True
        if said.get("WATCHDOG") == "1":
            self.last_ping = time.monotonic()
        if said.get(WITNESS) == "1" and fds and self.witness < 0:
            self.witness = fds.pop(0)
        if said.get("FDSTOREREMOVE") == "1" and name in self.fds:
            os.close(self.fds.pop(name))
        if said.get("FDSTORE") == "1" and fds and ":" not in name and len(self.fds) < MAX_FDS:
            old, self.fds[name] = self.fds.get(name, -1), fds[0]
            return fds[1:] + ([old] if old >= 0 else [])
        return fds

    def hand_over(self, environ: dict[str, str]) -> None:
        """In a process that is about to become a server (or a supervisor): its descriptors are 3, 4, … from now on, and
        `environ` says so, as sd_listen_fds(3) wants it."""
        high = [_above(fd, _FIRST_FD + len(self.fds)) for fd in self.fds.values()]
        for number, fd in enumerate(high):
            os.dup2(fd, _FIRST_FD + number, inheritable=True)
        for name in ("LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"):
            environ.pop(name, None)
        if self.fds:
            environ["LISTEN_PID"] = str(os.getpid())
            environ["LISTEN_FDS"] = str(len(self.fds))
            environ["LISTEN_FDNAMES"] = ":".join(self.fds)


def _above(fd: int, low: int) -> int:
    """A copy of `fd`, close-on-exec, with a number of at least `low`."""
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, low)


def remove_socket(path: Path) -> None:
    """The path of a listening socket that nobody will serve any more."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
