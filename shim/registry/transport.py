"""The one HTTP layer: a single exchange with a single host. Retries, redirects and auth are decided above it.

`requests` is imported with the first exchange (`_session.py`), because a daemon that restarts serves cached bytes
before it needs a network. No error text holds a query string, a header value or a user part of a URL.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from shim.errors import RegistryError
from shim.registry.hooks import Counters, Hooks

if TYPE_CHECKING:
    from shim.registry._session import Answer, Sessions

CHUNK = 256 << 10
DRAIN = 64 << 10  # an unwanted rest up to this size is read, so that the connection can be used again
DRAIN_SECONDS = 2.0
MAX_ERROR_BODY = 64 << 10
DEFAULT_PORTS = {"http": 80, "https": 443}
_NETLOC = re.compile(r"(?:[A-Za-z0-9._-]+|\[[A-Za-z0-9:.%_-]+\])(?::[0-9]*)?\Z")


@dataclass(frozen=True, slots=True)
class TLS:
    """How a host is trusted: PEM files of private CAs (beside the system's), (certificate, key) pairs, or not."""

    ca: tuple[str, ...] = ()
    client: tuple[tuple[str, str], ...] = ()
    skip_verify: bool = False

    def foreign(self) -> TLS:
        """For another host that this one leads to: the same trust, but our certificate stays at home."""
        return TLS(self.ca, (), self.skip_verify)


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port (RFC 6454): what headers and credentials belong to."""

    scheme: str
    host: str
    port: int

    @property
    def netloc(self) -> str:
        """host[:port] for people and for counters; a default port is left out."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if DEFAULT_PORTS.get(self.scheme) == self.port else f"{host}:{self.port}"


def origin_of(url: str) -> Origin:
    """The origin of an http(s) URL. Raises RegistryError for anything else, and for URLs that carry credentials."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise RegistryError("the registry led to a URL that is not valid") from None
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or len(url) > 16384:
        raise RegistryError("the registry led to a URL that is not http or https")
    if parts.username is not None or parts.password is not None:
        raise RegistryError(f"the registry led to a URL with credentials in it, at {parts.hostname}")
    if not _NETLOC.match(parts.netloc):  # "127.0.0.1\\.example.com": for urllib3 the host ends at the backslash
        raise RegistryError("the registry led to a URL that is not valid")
    return Origin(parts.scheme, parts.hostname, DEFAULT_PORTS[parts.scheme] if port is None else port)


def is_loopback(host: str) -> bool:
    """localhost, *.localhost, 127.0.0.0/8, ::1 (host without port; brackets allowed)."""
    name = host.strip("[]").lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = _address(name)
    return address is not None and address.is_loopback


def is_internal(host: str) -> bool:
    """Loopback or link-local, where cloud metadata services live: not a place that a remote registry may send us to."""
    address = _address(host.strip("[]"))
    return is_loopback(host) or (address is not None and (address.is_link_local or address.is_unspecified))


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        try:  # what getaddrinfo(3) takes besides: 127.1, 0x7f000001, 2130706433, 0177.0.0.1
            return ipaddress.IPv4Address(socket.inet_aton(text.rstrip(".")))
        except (OSError, UnicodeError):
            return None
    return getattr(address, "ipv4_mapped", None) or address


class Response:
    """An answer whose body is still to be read. Close it, or read it to its end."""

    def __init__(self, answer: Answer, url: str, host: str, kind: str, transport: Transport) -> None:
        self._answer = answer
        self._transport = transport
        self.url = url
        self.host = host
        self.kind = kind
        self.status = answer.status
        self.headers: Mapping[str, str] = answer.headers

    def read_some(self, limit: int = CHUNK) -> bytes:
        """Up to `limit` bytes, as soon as some are there; b"" at the end.

        Raises RegistryError (retryable) when the connection breaks, stalls or ends before Content-Length.
        """
        self._transport.hooks.fault("chunk", self.host)
        try:
            data = self._answer.read_some(limit)
        except RegistryError:
            self._transport.counters.add(self.host, self.kind, errors=1)
            self.close()
            raise
        if data:
            self._transport.counters.add(self.host, self.kind, size=len(data))
        return data

    def read_all(self, limit: int, seconds: float | None = None) -> bytes:
        """The whole body. Raises RegistryError when it is longer than `limit` bytes, or drips for longer than
        `seconds`."""
        parts: list[bytes] = []
        size = 0
        end = None if seconds is None else self._transport.hooks.clock() + seconds
        while data := self.read_some(min(CHUNK, limit + 1 - size)):
            if end is not None and self._transport.hooks.clock() > end:
                self.close()
                raise RegistryError(f"{self.host} sends its answer too slowly", status=self.status)
            size += len(data)
            parts.append(data)
            if size > limit:
                self.close()
                raise RegistryError(f"{self.host} sent more than {limit} bytes where less was due", status=self.status)
        self.close()
        return b"".join(parts)

    def discard(self) -> None:
        """Be done with the body; the connection is kept when little is left."""
        try:
            self.read_all(DRAIN, DRAIN_SECONDS)
        except RegistryError:
            self.close()

    def length(self) -> int | None:
        """Content-Length, or None (RFC 9112 6.3: Transfer-Encoding overrides it)."""
        value = "" if "Transfer-Encoding" in self.headers else self.headers.get("Content-Length", "")
        return int(value) if value.isascii() and value.isdigit() and len(value) < 19 else None

    def close(self) -> None:
        self._answer.close()


class Transport:
    """Thread-safe. One connection pool for each kind of TLS trust; `pool_size` connections are kept for each host.

    connect_timeout, read_timeout: seconds, the second for each wait for bytes.
    """

    def __init__(
        self,
        hooks: Hooks | None = None,
        *,
        pool_size: int = 16,
        connect_timeout: float = 10.0,
        read_timeout: float = 30.0,
    ) -> None:
        self.hooks = hooks or Hooks()
        self.counters = Counters()
        self.pool_size = pool_size
        self.connect_timeout = connect_timeout
        self.read_timeout = read_timeout
        self._sessions: Sessions | None = None

    def exchange(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        tls: TLS | None = None,
        kind: str = "blob",
        deadline: float | None = None,
        body: bytes | None = None,
        outside: bool = False,
    ) -> Response:
        """Send one request and wait for the head of the answer. No status is an error here.

        outside: refuse a host whose name leads to loopback or link-local addresses.

        `deadline` is on `hooks.clock` and also bounds the reading of the body. Raises RegistryError, retryable when
        the network is to blame, and ConfigError when a certificate file cannot be used.
        """
        origin = origin_of(url)
        seconds = None if deadline is None else deadline - self.hooks.clock()
        if seconds is not None and seconds <= 0:
            raise RegistryError(f"{origin.netloc} did not answer before the deadline", retryable=True)
        self.counters.add(origin.netloc, kind, requests=1)
        try:
            self.hooks.fault("send", f"{method} {origin.netloc}")
            answer = self._lazy().send(method, url, headers, tls or TLS(), body, seconds, outside)
        except RegistryError:
            self.counters.add(origin.netloc, kind, errors=1)
            raise
        if answer.status >= 400:
            self.counters.add(origin.netloc, kind, errors=1)
        return Response(answer, url, origin.netloc, kind, self)

    def _lazy(self) -> Sessions:
        if self._sessions is None:
            from shim.registry._session import Sessions

            self._sessions = Sessions(self.pool_size, self.connect_timeout, self.read_timeout)
        return self._sessions

    def close(self) -> None:
        """Close idle connections."""
        if self._sessions is not None:
            self._sessions.close()
