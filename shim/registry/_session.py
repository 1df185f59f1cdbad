"""The part of the transport that needs `requests`. Imported late, by `transport.py` alone.

Requests' adapters are used without its Session: no cookies, no .netrc, no redirects, no hooks.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import certifi
import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies, select_proxy
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from shim import __version__
from shim.errors import ConfigError, RegistryError
from shim.registry.transport import TLS, is_internal, is_loopback, origin_of
from shim.registry.watchdog import Watch, Watchdog

# urllib3 logs request lines with their query, which is where presigned URLs keep their signature
logging.getLogger("urllib3").setLevel(logging.ERROR)
# skip_verify is the administrator's word, said once in the configuration
urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)

USER_AGENT = f"clip-shim/{__version__}"
SYSTEM_CAS = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")

_watchdog = Watchdog()
# of this thread's exchange: .seconds it may take; .watch, what guards it; .outside: it must leave this machine
_call = threading.local()


class _InsideError(OSError):
    """A name has led to this machine or its link."""


class _Watched:
    """Mixed into urllib3's connections: the answer, from its first byte, stands under the watchdog; and what a name has
    led to is looked at before a byte is sent there, on the connection itself, so that no second look-up can differ."""

    sock: socket.socket | None

    def _new_conn(self) -> socket.socket:
        sock: socket.socket = super()._new_conn()  # type: ignore[misc]
        try:
            _check_peer(sock)
        except _InsideError:
            sock.close()
            raise
        return sock

    def putrequest(self, *args: Any, **kwargs: Any) -> None:
        if self.sock is not None:  # from the pool: it may have been made for another who may
            _check_peer(self.sock)
        super().putrequest(*args, **kwargs)  # type: ignore[misc]

    def getresponse(self) -> Any:
        watch = None
        if self.sock is not None and _call.seconds is not None:
            watch = _call.watch = _watchdog.add(self.sock, _call.seconds)
        try:
            return super().getresponse()  # type: ignore[misc]
        except BaseException:
            if watch is not None:
                _watchdog.cancel(watch)
            raise


def _check_peer(sock: socket.socket) -> None:
    if getattr(_call, "outside", False):
        peer = str(sock.getpeername()[0])
        if is_internal(peer):
            raise _InsideError(peer)


class _Http(_Watched, HTTPConnection):
    pass


class _Https(_Watched, HTTPSConnection):
    pass


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _Https


_POOLS = {"http": _HttpPool, "https": _HttpsPool}


class _Adapter(HTTPAdapter):
    """An adapter whose TLS is the given context and nothing else (requests would add certifi's CAs to it)."""

    def __init__(self, context: ssl.SSLContext | None, pool_size: int) -> None:
        self._context = context
        super().__init__(pool_connections=64, pool_maxsize=pool_size, max_retries=0, pool_block=False)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, ssl_context=self._context, **kwargs)
        if not proxy.lower().startswith("socks"):
            manager.pool_classes_by_scheme = _POOLS
        return manager

    def build_connection_pool_key_attributes(self, request: Any, verify: Any, cert: Any = None) -> Any:
        host, _ = super().build_connection_pool_key_attributes(request, verify, cert)
        return host, {"ssl_context": self._context} if host["scheme"] == "https" else {}

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """The context says it all."""


class Answer:
    """One answer of urllib3, under a watch."""

    def __init__(self, response: requests.Response, host: str, watch: Watch | None) -> None:
        self._response = response
        self._raw: Any = response.raw
        self._host = host
        self._watch = watch
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers

    def read_some(self, limit: int) -> bytes:
        try:
            # read1: what one recv gives. read() would go on until `limit` bytes are there, however slowly they drip
            data: bytes = self._raw.read1(limit, decode_content=False) or b""
        except _ERRORS as error:
            raise _network_error(error, self._host, self._watch) from None
        if self._watch is not None and self._watch.expired:
            raise _late(self._host)
        if not data:
            self.close()
        elif self._watch is not None and self._raw.length_remaining == 0:
            # the connection is in the pool again, and soon another request's: no deadline of ours may cut it
            _watchdog.cancel(self._watch)
        return data

    def close(self) -> None:
        if self._watch is not None:
            _watchdog.cancel(self._watch)
        self._raw.close()  # a body read to its end has given its connection back already
        self._raw.release_conn()


class Sessions:
    """Adapters by TLS trust. Thread-safe."""

    def __init__(self, pool_size: int, connect_timeout: float, read_timeout: float) -> None:
        self._pool_size = pool_size
        self._timeouts = (connect_timeout, read_timeout)
        self._adapters: dict[TLS | None, tuple[list[int], _Adapter]] = {}
        self._lock = threading.Lock()

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        tls: TLS,
        body: bytes | None,
        seconds: float | None,
        outside: bool,
    ) -> Answer:
        """outside: the host must not turn out to be this machine or its link (a proxy finds it by itself)."""
        origin = origin_of(url)
        connect, read = self._timeouts
        if seconds is not None:
            connect, read = min(connect, seconds), min(read, seconds)
        # a head that drips is cut off even when the body may take its time
        _call.seconds, _call.watch = 4 * read if seconds is None else seconds, None
        try:
            request = requests.PreparedRequest()
            # identity: ranges and digests are about the stored bytes
            request.prepare(
                method=method,
                url=url,
                headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **headers},
                data=body,
            )
            # as Go does, loopback never goes through a proxy
            proxies = {} if is_loopback(origin.host) else get_environ_proxies(url)
            _call.outside = outside and not select_proxy(url, proxies)
            response = self._adapter(tls if origin.scheme == "https" else None).send(
                request, stream=True, timeout=(connect, read), verify=not tls.skip_verify, proxies=proxies
            )
        except _ERRORS as error:
            raise _network_error(error, origin.netloc, _call.watch) from None
        finally:
            watch, _call.watch = _call.watch, None
        if seconds is None and watch is not None:
            _watchdog.cancel(watch)
        return Answer(response, origin.netloc, watch)

    def _adapter(self, tls: TLS | None) -> _Adapter:
        """The adapter for a kind of trust (None: plain http), made anew when its files have changed: they rotate."""
        files = [] if tls is None else [*tls.ca, *(file for pair in tls.client for file in pair if file)]
        stamps = [_stamp(file) for file in files]
        with self._lock:
            known = self._adapters.get(tls)
            if known is None or known[0] != stamps:
                known = (stamps, _Adapter(None if tls is None else _context(tls), self._pool_size))
                self._adapters[tls] = known
            return known[1]

    def close(self) -> None:
        with self._lock:
            for _, adapter in self._adapters.values():
                adapter.close()
            self._adapters.clear()


def _stamp(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0  # loading it says why


def _context(tls: TLS) -> ssl.SSLContext:
    """The system's CAs (or those of SSL_CERT_FILE, REQUESTS_CA_BUNDLE), the private ones, the client's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        _load_system(context)
    for path in tls.ca:
        try:
            context.load_verify_locations(cafile=path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot use the CA file {path}: {_why(error)}") from None
    for certificate, key in tls.client:
        try:
            context.load_cert_chain(certificate, key or None, password="")
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot use the client certificate {certificate}: {_why(error)}") from None
    return context


def _load_system(context: ssl.SSLContext) -> None:
    named = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
    for path in (named,) if named else SYSTEM_CAS:
        if os.path.isfile(path):
            try:
                context.load_verify_locations(cafile=path)
            except (OSError, ValueError) as error:
                raise ConfigError(f"cannot use the CA file {path}: {_why(error)}") from None
            return
    if named:
        raise ConfigError(f"the CA file {named} does not exist", hint="see REQUESTS_CA_BUNDLE and SSL_CERT_FILE")
    context.load_verify_locations(cafile=certifi.where())


def _why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError, OSError, EOFError, ValueError)


def _late(host: str) -> RegistryError:
    return RegistryError(f"{host} did not answer before the deadline", retryable=True)


def _network_error(error: BaseException, host: str, watch: Watch | None) -> RegistryError:
    """Our words for what went wrong. Never the library's: those hold whole URLs."""
    if watch is not None and watch.expired:
        return _late(host)
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, _InsideError):
            return RegistryError(
                f"the name of {host} leads to {cause}, this machine or its link: refused",
                hint=f"name {host} in `trust.registries` if that is meant",
            )
        if isinstance(cause, ssl.SSLCertVerificationError):
            return RegistryError(
                f"the certificate of {host} is not trusted: {cause.verify_message}",
                hint=f"give its CA as `ca` under `registries: {host}:` or in /etc/docker/certs.d/{host}/ca.crt",
            )
        if isinstance(cause, socket.gaierror):
            return RegistryError(f"the name of {host} cannot be resolved: {cause.strerror}", retryable=True)
        if isinstance(cause, ssl.SSLError):
            text = (cause.reason or "handshake failed").lower().replace("_", " ")
            hint = f"if it speaks plain http, set `plain_http: true` under `registries: {host}:`"
            return RegistryError(f"TLS with {host} failed: {text}", hint=hint, retryable="version" not in text)
    if any(isinstance(cause, requests.exceptions.InvalidURL | UnicodeError) for cause in chain):
        return RegistryError(f"a URL at {host} is not valid")
    return RegistryError(_symptom(chain, host), retryable=True)


def _symptom(chain: list[BaseException], host: str) -> str:
    if any(isinstance(c, requests.exceptions.ProxyError) for c in chain):
        return f"the proxy on the way to {host} failed"
    for cause in chain:
        if isinstance(cause, OSError) and cause.errno in errno.errorcode and cause.strerror:
            return f"cannot talk to {host}: {cause.strerror.lower()}"
    if any(isinstance(c, requests.exceptions.ConnectTimeout) for c in chain):
        return f"{host} cannot be reached in time"
    if any(isinstance(c, TimeoutError | requests.exceptions.Timeout | urllib3.exceptions.TimeoutError) for c in chain):
        return f"{host} sent nothing in time"
    return f"{host} cut the connection short"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and what lies beneath it, however it was wrapped. Bounded."""
    todo: list[object] = [error]
    for _ in range(32):
        if not todo:
            return
        item = todo.pop(0)
        if isinstance(item, BaseException):
            yield item
            todo += [getattr(item, "reason", None), item.__cause__, item.__context__, *item.args[:2]]
