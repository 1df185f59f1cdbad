"""A TCP proxy in front of the registry: delay, rate, a stall at will, and a count of what went through.

Of HTTP it knows one thing: `requests` counts the request lines that clients sent. Latency is added once per direction
of a turn-round (half of `round_trip` on requests, half on answers); `rate` limits a connection.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from types import TracebackType

_PIECE = 65_536
_REQUEST = re.compile(rb"(?:GET|HEAD|POST|PUT) \S+ HTTP/1\.[01]\r\n")


class Proxy:
    """See the module. `address` is "127.0.0.1:PORT"; use as a context manager.

    `stall()` holds back answers (of open connections too, after `after` more bytes) until `resume()`.
    """

    def __init__(self, upstream: str, *, round_trip: float = 0.0, rate: float = 0.0) -> None:
        """round_trip in seconds; rate in bytes a second and connection, 0 for no limit."""
        host, _, port = upstream.rpartition(":")
        self._upstream = (host, int(port))
        self.round_trip = round_trip
        self.rate = rate
        self._lock = threading.Lock()
        self._open = threading.Event()
        self._open.set()
        self._sockets: set[socket.socket] = set()
        self._allowance = 0
        self._closing = False
        self.answered = 0  # bytes to clients
        self.requests = 0
        self._server = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        self._open.set()
        self._server.close()
        with self._lock:
            for end in self._sockets:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def stall(self, *, after: int = 0) -> None:
        """Hold back every answer once `after` more bytes have passed."""
        with self._lock:
            self._allowance = after
            self._open.clear()

    def resume(self) -> None:
        self._open.set()

    def reset(self) -> None:
        """Count from nought."""
        with self._lock:
            self.answered = self.requests = 0

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._upstream)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._sockets |= {client, server}
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._up, args=(client, server), daemon=True).start()
            threading.Thread(target=self._down, args=(server, client), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        tail = b""
        with contextlib.suppress(OSError):
            while piece := client.recv(_PIECE):
                found = len(_REQUEST.findall(tail + piece)) - len(_REQUEST.findall(tail))
                tail = (tail + piece)[-8192:] if not found else b""
                with self._lock:
                    self.requests += found
                if self.round_trip:
                    time.sleep(self.round_trip / 2)
                server.sendall(piece)
        self._end(server)

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        last = 0.0
        with contextlib.suppress(OSError):
            while piece := server.recv(_PIECE):
                if self.round_trip and time.monotonic() - last > self.round_trip:
                    time.sleep(self.round_trip / 2)
                if self.rate:
                    time.sleep(len(piece) / self.rate)
                self._wait_open(len(piece))
                client.sendall(piece)
                last = time.monotonic()
                with self._lock:
                    self.answered += len(piece)
        self._end(client)

    def _wait_open(self, size: int) -> None:
        if self._open.is_set():
            return
        with self._lock:
            self._allowance -= size
            if self._allowance >= 0:
                return
        self._open.wait()

    def _end(self, end: socket.socket) -> None:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._sockets.discard(end)
