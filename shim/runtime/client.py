"""The wrapper's side of the control socket (`shim/ARCHITECTURE.md`, wrapper ↔ daemon), without the `socket` module."""

from __future__ import annotations

import _socket
import errno
import os
import sys
import time

import shim.errors
from shim.errors import DaemonError, ShimError
from shim.runtime import jsontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shim.runtime.config import Config

_ANSWER_MAX = 8 << 20
_WAIT_MAX = 7200  # seconds
_TRIES = 10
_ABSENT = (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR)


class LostError(DaemonError):
    """The daemon ended before it answered. Its successor may do better."""


class Connection:
    """An open connection to the daemon. A tree that was acquired on it stays mounted until `close`."""

    __slots__ = ("_end", "_rest", "_socket")

    def __init__(self, socket: _socket.socket, end: float) -> None:
        self._socket = socket
        self._end = end
        self._rest = b""

    def request(self, message: dict[str, Any], fd: int = -1) -> dict[str, Any]:
        """Send one request, with a descriptor unless `fd` is -1, and wait for its answer.

        Raises the error that the daemon names, or DaemonError: no answer in time, or nonsense; LostError.
        """
        data = (jsontext.encode(message) + "\n").encode()
        beside = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))] if fd >= 0 else []
        try:
            self._limit()
            sent = self._socket.sendmsg([data], beside)
            if sent < len(data):
                self._socket.sendall(data[sent:])
            answer = self._receive()
            while isinstance(answer.get("wait"), int):  # the daemon makes an index, and says how long that may take
                self._end = time.monotonic() + min(answer["wait"], _WAIT_MAX)
                answer = self._receive()
        except TimeoutError:
            raise DaemonError(
                "the daemon did not answer in time", hint="see `clip-shim status --waiting`, or raise `mount_deadline`"
            ) from None
        except OSError as error:
            raise LostError(f"the daemon ended before it answered (errno {error.errno})") from error
        if answer.get("ok") is not True:
            raise _error_of(answer)
        return answer

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message whose answer nobody waits for. A daemon that is gone is no error."""
        try:
            self._socket.setblocking(False)
            self._socket.send((jsontext.encode(message) + "\n").encode())
        except OSError:
            pass

    def _limit(self) -> None:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)

    def _receive(self) -> dict[str, Any]:
        parts = [self._rest]
        size = 0
        while b"\n" not in parts[-1]:
            self._limit()
            part = self._socket.recv(65536)
            if not part:
                raise LostError("the daemon ended before it answered")
            parts.append(part)
            size += len(part)
            if size > _ANSWER_MAX:
                raise DaemonError("the daemon's answer has no end")
        line, _, self._rest = b"".join(parts).partition(b"\n")
        try:
            answer = jsontext.decode(line)
        except ValueError as error:
            raise DaemonError(f"the daemon's answer is no JSON: {error}") from None
        if not isinstance(answer, dict):
            raise DaemonError("the daemon's answer is no object")
        return answer

    def close(self) -> None:
        self._socket.close()


def _error_of(answer: dict[str, Any]) -> ShimError:
    text = answer.get("error")
    hint = answer.get("hint")
    kind = getattr(shim.errors, str(answer.get("kind")), None)
    if not (isinstance(kind, type) and issubclass(kind, ShimError)):
        kind = DaemonError
    return kind(str(text) if text else "the daemon refused without a reason", hint=str(hint) if hint else None)


def try_connect(run_dir: str, end: float) -> Connection | None:
    """Connect to the daemon's control socket. None if there is no daemon; DaemonError for any other trouble."""
    try:
        directory = os.open(run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        raise DaemonError(f"{run_dir} cannot be opened (errno {error.errno})") from error
    owner = os.fstat(directory).st_uid
    if owner not in (0, os.geteuid()):  # who could answer in the daemon's place
        os.close(directory)
        raise DaemonError(f"{run_dir} belongs to uid {owner}, not to root", hint=f"chown root:root {run_dir}")
    socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        # a socket's own path may have 107 bytes only
        _patiently(socket, f"/proc/self/fd/{directory}/control.sock", end)
    except OSError as error:
        socket.close()
        if error.errno in _ABSENT:
            return None
        raise DaemonError(
            f"the daemon at {run_dir}/control.sock cannot be reached: {error}",
            hint="run this as root" if error.errno == errno.EACCES else None,
        ) from error
    finally:
        os.close(directory)
    return Connection(socket, end)


def _patiently(socket: _socket.socket, path: str, end: float) -> None:
    """connect(2) before `end`. Also while more wait to be taken than the socket lets wait, as in a daemon's absence:
    only a connect that may block waits for room, and SO_SNDTIMEO is its deadline (unix(7))."""
    left = max(end - time.monotonic(), 0.001)
    socket.settimeout(left)
    try:
        socket.connect(path)
    except BlockingIOError:
        import struct

        socket.settimeout(None)
        socket.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, struct.pack("@ll", int(left), int(left % 1 * 1e6)))
        socket.connect(path)


def ask(
    config: Config, environ: dict[bytes, bytes], message: dict[str, Any], fd: int = -1
) -> tuple[Connection, dict[str, Any]]:
    """Connect to the daemon, which is started if none answers, and ask it: the open connection and the answer.

    Raises what `Connection.request` raises, or DaemonError within `config.mount_deadline`. Asked once
    more when the daemon ends meanwhile: its successor finishes what it had begun. Within the same deadline, and not
    for ever, should it be this request that ends it.
    """
    end = time.monotonic() + config.mount_deadline
    left = _TRIES
    while True:
        connection = _connect(config, environ, end)
        try:
            return connection, connection.request(message, fd)
        except LostError:
            connection.close()
            left -= 1
            if not left:
                raise
        except BaseException:
            connection.close()
            raise


def _connect(config: Config, environ: dict[bytes, bytes], end: float) -> Connection:
    connection = try_connect(config.run_dir, end)
    if connection is None:
        from shim.runtime.starter import start

        connection = start(config, environ, end)
    return connection
