"""A real HTTP server on loopback that serves blobs or stands before a registry, and does wrong what it is told to.

    with FaultServer(upstream=registry.host) as server:
        server.faults.add("GET", r"/blobs/", truncate_at=1000, times=2)
        ...  # use server.host as the registry
        assert server.count("GET", r"/blobs/") == 3

Without faults it is a plain, correct proxy (or server of `blobs`: path -> bytes, ranges included); with `latency_ms`
and `bandwidth` it is a slow one: that many ms before each answer, that many MB/s on each connection. It counts requests
and bytes of bodies. Faults apply in the order they were added; the first that matches and has `times` left is used.
"""

from __future__ import annotations

import http.client
import http.server
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

CHUNK = 64 << 10
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-connection"}


@dataclass
class Fault:
    """What goes wrong. Offsets count bytes of the answer's body."""

    method: str
    path: re.Pattern[str]
    times: int | None = None  # None: always
    status: int | None = None  # answer this instead
    headers: dict[str, str | None] = field(default_factory=dict)  # put into the answer, replacing; None: left out
    body: bytes | None = None  # with `status`
    retry_after: str | None = None
    redirect: str | Callable[[str], str] | None = None  # Location, or made from the path asked for
    ignore_range: bool = False  # 200 and everything
    truncate_at: int | None = None  # end the connection in order after that many bytes
    reset_at: int | None = None  # end it with RST
    corrupt_at: int | None = None  # flip that byte
    delay: float = 0.0  # seconds before the answer
    drip: tuple[int, float] | None = None  # (bytes, seconds between them)
    drip_head: float | None = None  # seconds between the bytes of the head
    hang: bool = False  # no answer before `clear`
    hang_at: int | None = None  # stop there, connection open
    drop: bool = False  # close without an answer
    need: tuple[str, str] | None = None  # only for requests whose header matches this pattern ("" also when absent)
    when: Callable[[], bool] | None = None  # only while this is true
    used: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def matches(self, method: str, path: str, headers: http.client.HTTPMessage) -> bool:
        if self.when is not None and not self.when():
            return False
        if self.method not in ("*", method) or not self.path.search(path):
            return False
        return self.need is None or re.search(self.need[1], headers.get(self.need[0], "")) is not None


class Faults:
    """The rules of one server. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def add(self, method: str, path: str, **what: object) -> Fault:
        """A rule for `method` ("*" for all) and paths (with query) in which the pattern `path` is found; see Fault."""
        fault = Fault(method, re.compile(path), **what)  # type: ignore[arg-type]
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        """All is well again; connections that hang are closed."""
        with self._lock:
            for fault in self._faults:
                fault.over.set()
            self._faults.clear()

    def take(self, method: str, path: str, headers: http.client.HTTPMessage) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if (fault.times is None or fault.used < fault.times) and fault.matches(method, path, headers):
                    fault.used += 1
                    return fault
        return None


@dataclass(frozen=True)
class Seen:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    body: bytes = b""


class FaultServer:
    """`host` is ADDRESS:PORT. upstream: host:port of a plain-http server to pass requests on to."""

    def __init__(
        self,
        upstream: str | None = None,
        *,
        address: str = "127.0.0.1",
        port: int = 0,
        tls: Path | None = None,
        latency_ms: float = 0.0,
        bandwidth: float = 0.0,
    ) -> None:
        self.upstream = upstream
        self.blobs: dict[str, bytes] = {}
        self.types: dict[str, str] = {}  # path -> Content-Type
        self.faults = Faults()
        self.latency_ms = latency_ms
        self.bandwidth = bandwidth
        self.seen: list[Seen] = []
        self.bytes_sent = 0
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._server = _Server((address, port), self)
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls / "server.crt", tls / "server.key")
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.host = f"{address}:{self._server.server_address[1]}"
        self.url = f"{'https' if tls else 'http'}://{self.host}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> FaultServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self.faults.clear()
        with self._lock:
            sockets = list(self._sockets)
        for sock in sockets:
            try:
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                pass  # the client was first
        self._server.shutdown()
        self._server.server_close()

    def serve(self, path: str, data: bytes, content_type: str = "application/octet-stream") -> str:
        """Serve `data` at `path` (query not counted); the URL."""
        self.blobs[path] = data
        self.types[path] = content_type
        return self.url + path

    def count(self, method: str = "*", path: str = "") -> int:
        """How many requests came."""
        return len(self.requests(method, path))

    def requests(self, method: str = "*", path: str = "") -> list[Seen]:
        with self._lock:
            return [s for s in self.seen if method in ("*", s.method) and re.search(path, s.path)]

    def reset_counts(self) -> None:
        with self._lock:
            self.seen.clear()
            self.bytes_sent = 0

    def note(self, seen: Seen) -> None:
        with self._lock:
            self.seen.append(seen)

    def sent(self, size: int) -> None:
        with self._lock:
            self.bytes_sent += size

    def track(self, sock: socket.socket, *, gone: bool) -> None:
        with self._lock:
            (self._sockets.discard if gone else self._sockets.add)(sock)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], owner: FaultServer) -> None:
        self.owner = owner
        super().__init__(address, _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are what this server is for."""


class _StopError(Exception):
    """End this connection."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.owner = self.server.owner
        self.upstream: http.client.HTTPConnection | None = None
        self.owner.track(self.connection, gone=False)

    def finish(self) -> None:
        self.owner.track(self.connection, gone=True)
        if self.upstream is not None:
            self.upstream.close()
        try:
            super().finish()
        except OSError:
            pass  # the client is gone

    def log_message(self, *args: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return self._handle
        raise AttributeError(name)

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.owner.note(Seen(self.command, self.path, headers, body))
        fault = self.owner.faults.take(self.command, self.path, self.headers) or Fault("*", re.compile(""))
        try:
            self._answer(fault, body)
        except (_StopError, OSError, http.client.HTTPException):
            self.close_connection = True

    def _answer(self, fault: Fault, body: bytes) -> None:
        self._wait(fault.delay + self.owner.latency_ms / 1000)
        if fault.hang:
            fault.over.wait(120)
            raise _StopError
        if fault.drop:
            raise _StopError
        ranged = None if fault.ignore_range else self.headers.get("Range")
        if fault.status is not None or fault.redirect is not None:
            status = fault.status or 307
            default = json.dumps({"errors": [{"code": "FAULT", "message": f"injected {status}"}]}).encode()
            self._send(fault, status, {}, default if fault.body is None else fault.body, None)
            return
        path = self.path.partition("?")[0]
        if path in self.owner.blobs:
            self._serve(fault, path, ranged)
        elif self.owner.upstream is not None:
            self._forward(fault, body, ranged)
        else:
            self._send(fault, 404, {}, b'{"errors":[{"code":"NOT_FOUND"}]}', None)

    def _serve(self, fault: Fault, path: str, ranged: str | None) -> None:
        data = self.owner.blobs[path]
        headers = {"Content-Type": self.owner.types.get(path, "application/octet-stream")}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", ranged or "")
        if match is None:
            self._send(fault, 200, headers, data, None)
            return
        first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
        if first >= len(data):
            self._send(fault, 416, {"Content-Range": f"bytes */{len(data)}"}, b"", None)
            return
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._send(fault, 206, headers, data[first : last + 1], None)

    def _forward(self, fault: Fault, body: bytes, ranged: str | None) -> None:
        assert self.owner.upstream is not None
        if self.upstream is None:
            self.upstream = http.client.HTTPConnection(self.owner.upstream, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in (*HOP_BY_HOP, "range")}
        if ranged:
            headers["Range"] = ranged
        self.upstream.request(self.command, self.path, body or None, headers)
        answer = self.upstream.getresponse()
        passed = {k: v for k, v in answer.getheaders() if k.lower() not in (*HOP_BY_HOP, "content-length")}
        size = int(answer.headers.get("Content-Length") or 0)
        self._send(fault, answer.status, passed, b"", (answer, size))
        answer.read()

    def _send(
        self,
        fault: Fault,
        status: int,
        headers: dict[str, str],
        data: bytes,
        stream: tuple[http.client.HTTPResponse, int] | None,
    ) -> None:
        size = len(data) if stream is None else stream[1]
        full = {**headers, "Content-Length": str(size)}
        if fault.retry_after is not None:
            full["Retry-After"] = fault.retry_after
        if fault.redirect is not None:
            full["Location"] = fault.redirect if isinstance(fault.redirect, str) else fault.redirect(self.path)
        full = {k: v for k, v in full.items() if k.lower() not in {n.lower() for n in fault.headers}}
        full |= {k: v for k, v in fault.headers.items() if v is not None}
        self.close_connection |= full.get("Connection") == "close"
        lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, 'Status')}"]
        head = "\r\n".join([*lines, *(f"{k}: {v}" for k, v in full.items()), "", ""]).encode("latin-1")
        if fault.drip_head is not None:
            for byte in head:
                self._wait(fault.drip_head)
                self.connection.sendall(bytes([byte]))
        else:
            self.connection.sendall(head)
        if self.command != "HEAD":
            self._body(fault, data, stream)

    def _body(self, fault: Fault, data: bytes, stream: tuple[http.client.HTTPResponse, int] | None) -> None:
        began, done = time.monotonic(), 0
        size = len(data) if stream is None else stream[1]
        stops = [n for n in (fault.truncate_at, fault.reset_at, fault.hang_at) if n is not None]
        stop = min([size, *stops])
        step = fault.drip[0] if fault.drip else CHUNK
        while done < stop:
            want = min(step, stop - done)
            chunk = data[done : done + want] if stream is None else stream[0].read(want)
            if not chunk:
                raise _StopError
            if fault.corrupt_at is not None and done <= fault.corrupt_at < done + len(chunk):
                wrong = bytearray(chunk)
                wrong[fault.corrupt_at - done] ^= 0x40
                chunk = bytes(wrong)
            done += len(chunk)
            if self.owner.bandwidth:
                self._wait(began + done / (self.owner.bandwidth * 1e6) - time.monotonic())
            self.owner.sent(len(chunk))  # before: the client may look as soon as it has them
            self.connection.sendall(chunk)
            if fault.drip:
                self._wait(fault.drip[1])
        if not stops or min(stops) > size:
            return
        if fault.hang_at is not None and fault.hang_at == stop:
            fault.over.wait(120)
        elif fault.reset_at is not None and fault.reset_at == stop:
            # RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.socket.close(self.connection)
        raise _StopError

    def _wait(self, seconds: float) -> None:
        """The slowness that was asked for; ends early when the server stops."""
        if seconds > 0 and self.owner.stopping.wait(seconds):
            raise _StopError
