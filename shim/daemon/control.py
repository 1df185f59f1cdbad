"""The control socket: one JSON object a line in each direction, descriptors beside it (see ARCHITECTURE.md)."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shim import log
from shim.errors import DaemonError, ShimError

_MAX_LINE = 1 << 16  # bytes; a request names one container
_MAX_FDS = 4
_MAX_CONNECTIONS = 512
_BACKLOG = 4096  # as systemd has it: all containers of a node may start while we are replaced
_RETRY_SECONDS = 0.1
_CLOSE_SECONDS = 0.5
_SHOWN = 256  # characters of an ID in a log line

Answer = dict[str, Any]
Handler = Callable[["Session", dict[str, Any], list[int]], Answer]


class Session:
    """One connection. What it holds (`on_close`: leases) goes when it closes, however the peer died."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self.on_close: list[Callable[[], None]] = []
        self._send = send
        self.notes: dict[str, Any] = {}  # what a handler wants to find again

    def announce(self, seconds: float) -> None:
        """Tell the peer that its answer may take this much longer."""
        try:
            self._send(_line({"wait": round(seconds)}))
        except OSError:
            pass  # it is gone; what is being made will be there for the next

    def close(self) -> None:
        while self.on_close:
            self.on_close.pop()()


class ControlServer:
    """Serves RUN/control.sock. One thread a connection; connections are short, or wait in one acquire.

    Only root of our own user namespace may talk: the socket is 0600 in a 0700 directory, and a peer is refused whose
    uid is not 0 as *we* see it (which is what SO_PEERCRED gives, also across user namespaces), or that was in another
    user namespace, one where our uid 0 is mapped, when it connected.
    """

    def __init__(self, path: Path, handlers: dict[str, Handler], listener: int = -1) -> None:
        """listener: a socket at `path` that the service manager made or kept, and which stays there when we end; -1 for
        none."""
        self._path = path
        self._inherited = listener >= 0
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._handlers = handlers
        self._slots = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        self._closed = threading.Event()
        self._ended = threading.Condition()
        self._open = 0  # connections, guarded by `_ended`
        if self._inherited:
            self._socket = socket.socket(fileno=listener)
            self._socket.setblocking(False)
            return
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path.unlink(missing_ok=True)
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        old = os.umask(0o177)
        try:
            self._socket.bind(f"/proc/self/fd/{directory}/{path.name}")  # a socket's own path may have 107 bytes only
        finally:
            os.umask(old)
            os.close(directory)
        self._socket.listen(_BACKLOG)
        self._socket.setblocking(False)

    @property
    def listener(self) -> int:
        return self._socket.fileno()

    def outlives_us(self) -> None:
        """Somebody keeps the socket: it is not closed when we end."""
        self._inherited = True

    def serve(self) -> None:
        """Accept until `close`; runs in a thread of its own."""
        while not self._closed.is_set():
            self._slots.acquire()
            connection = None
            try:
                select.select([self._socket.fileno(), self._wake], [], [])
                if self._closed.is_set():
                    return
                connection, _ = self._socket.accept()  # BlockingIOError: its peer has gone again
                threading.Thread(target=self._connection, args=(connection,), name="control", daemon=True).start()
            except (OSError, RuntimeError) as error:  # closed; or files, memory or threads ran out, for now
                self._slots.release()
                if connection is not None:
                    connection.close()
                if not self._closed.wait(_RETRY_SECONDS):
                    log.error("a control connection was not taken", error=str(error))

    def close(self) -> None:
        """Take no more connections; those whose peer is gone have ended when this returns (0.5 s at most).

        Who connects to a socket of the service manager's waits for a successor.
        """
        self._closed.set()
        os.eventfd_write(self._wake, 1)
        if not self._inherited:
            self._path.unlink(missing_ok=True)
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._ended:
            self._ended.wait_for(lambda: not self._open, _CLOSE_SECONDS)

    def _connection(self, connection: socket.socket) -> None:
        session = Session(connection.sendall)
        with self._ended:
            self._open += 1
        try:
            with connection:
                self._converse(connection, session)
        except OSError as error:
            log.debug("control connection ended", error=str(error))
        finally:
            session.close()
            self._slots.release()
            with self._ended:
                self._open -= 1
                self._ended.notify_all()

    def _converse(self, connection: socket.socket, session: Session) -> None:
        pid, uid, _ = struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != 0 or _is_foreign(pid):
            connection.sendall(_line(_failure(DaemonError("only root may talk to the daemon", hint="use sudo"))))
            log.warning("control connection refused", pid=pid, uid=uid)
            return
        buffer = b""
        fds: list[int] = []
        try:
            while True:
                while b"\n" not in buffer:
                    data, more, _, _ = socket.recv_fds(connection, _MAX_LINE, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
                    fds += more
                    if not data or len(fds) > _MAX_FDS:
                        return
                    buffer += data
                    if len(buffer) > _MAX_LINE:
                        connection.sendall(_line(_failure(DaemonError("the request is too long"))))
                        return
                line, _, buffer = buffer.partition(b"\n")
                answer = self._answer(session, line, fds)
                if self._closed.is_set() and not answer["ok"]:
                    return  # it failed because we end: who loses the connection asks our successor
                connection.sendall(_line(answer))
                while fds:
                    os.close(fds.pop())
        finally:
            while fds:
                os.close(fds.pop())

    def _answer(self, session: Session, line: bytes, fds: list[int]) -> Answer:
        try:
            request: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            return _failure(DaemonError(f"the request is not valid: {error}"))
        with log.context(container=_container(request)):
            return self._handle(session, request, fds)

    def _handle(self, session: Session, request: Any, fds: list[int]) -> Answer:
        try:
            if not isinstance(request, dict) or request.get("v") != 1:
                raise DaemonError("the request is not of protocol version 1", hint="wrapper and daemon differ: restart")
            handler = self._handlers.get(str(request.get("op")))
            if handler is None:
                raise DaemonError(f"unknown operation {str(request.get('op'))[:40]!r}")
            return {"ok": True, **handler(session, request, fds)}
        except ShimError as error:
            log.warning("request failed", error=str(error), hint=error.hint)
            return _failure(error)
        except (ValueError, RecursionError) as error:
            return _failure(DaemonError(f"the request is not valid: {error}"))
        except Exception as error:  # noqa: BLE001  one bad request must not end the daemon; the trace goes to the log
            log.exception("request failed")
            return _failure(DaemonError(f"internal error: {type(error).__name__}: {error}"))


def refuse(listener: int, error: ShimError) -> None:
    """Give an error to all who wait at a listening socket; it is closed. For a daemon that cannot start at all."""
    with socket.socket(fileno=listener) as server:
        server.setblocking(False)
        try:
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(_CLOSE_SECONDS)
                    try:
                        while b"\n" not in (data := connection.recv(_MAX_LINE)) and data:
                            pass  # who is answered before it has asked would take us for lost
                        connection.sendall(_line(_failure(error)))
                    except OSError:
                        continue  # it is gone
        except OSError:
            return  # nobody is left


def _container(request: Any) -> str | None:
    """The ID of the container that a request is for, for log lines."""
    container = request.get("container") if isinstance(request, dict) else None
    return str(container.get("id"))[:_SHOWN] if isinstance(container, dict) else None


def _is_foreign(pid: int) -> bool:
    """Whether a process is in another user namespace than we are; False if it is gone."""
    try:
        return os.readlink(f"/proc/{pid}/ns/user") != os.readlink("/proc/self/ns/user")
    except OSError:
        return False


def _failure(error: ShimError) -> Answer:
    return {"ok": False, "kind": type(error).__name__, "error": str(error), "hint": error.hint}


def _line(answer: Answer) -> bytes:
    return json.dumps(answer).encode() + b"\n"
