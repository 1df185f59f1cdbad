"""One host of a registry: a request to it with auth answered and redirects followed. No retries here.

Redirects are followed by hand. What we know about a host (Authorization, configured headers, client certificate) goes
to that origin alone; https never leads to http; a remote host never leads to this machine. Where a blob's redirect led
to is remembered, so that the next range goes there at once, and asked for again when that address no longer answers.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit

from shim.errors import NotFoundError, RegistryError
from shim.registry.auth import MAX_TOKEN_ANSWER, Authenticator
from shim.registry.credentials import CredentialStore
from shim.registry.hosts import Host
from shim.registry.retry import RETRYABLE, BusyError, retry_after
from shim.registry.transport import MAX_ERROR_BODY, Response, Transport, is_internal, origin_of

MAX_REDIRECTS = 8
MAX_REMEMBERED = 4096
ERROR_SECONDS = 10.0  # for what a registry says about a failure
REDIRECTS = frozenset((301, 302, 303, 307, 308))
REMOTE_HEADERS = ("Range", "Accept", "Content-Type", "Content-Range")  # all that a foreign origin is told


@dataclass(frozen=True, slots=True)
class Call:
    """What is asked: `path` below /v2/REPOSITORY/. `memo` names the thing for the memory of redirects. `target` takes
    the place of `path`, which then is only for messages: another path, or the URL that an upload was given."""

    method: str
    repository: str
    path: str
    kind: str
    headers: tuple[tuple[str, str], ...] = ()
    memo: str | None = None
    actions: str = "pull"
    follow: bool = True  # False: that the host redirects is answer enough
    body: bytes | None = None
    target: str | None = None


class Endpoint:
    """Thread-safe."""

    def __init__(
        self, host: Host, transport: Transport, store: CredentialStore, inside: Callable[[str], bool] | None = None
    ) -> None:
        """inside: see RegistryClient."""
        self.host = host
        self._inside = inside
        self._transport = transport
        self._hooks = transport.hooks
        self._auth = Authenticator(host.origin, host.credential_key, store, self._fetch_token, transport.hooks)
        self._lock = threading.Lock()
        self._places: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._away_until = 0.0

    @property
    def name(self) -> str:
        return self.host.name

    @property
    def is_away(self) -> bool:
        """Lately without an answer, or caught serving wrong bytes: asked after the others."""
        return self._hooks.clock() < self._away_until

    def put_off(self, seconds: float) -> None:
        """Ask this host last for a while, and forget where it led."""
        self._away_until = self._hooks.clock() + seconds
        with self._lock:
            self._places.clear()

    def request(self, call: Call, deadline: float | None) -> Response:
        """An answer of 2xx or 416; everything else is raised.

        Raises NotFoundError (404), AuthError (401, 403), BusyError and RegistryError.
        """
        response = self._from_memory(call, deadline) or self._through_registry(call, deadline)
        if response.status < 300 or response.status == 416 or (response.status in REDIRECTS and not call.follow):
            return response
        raise self._error(call, response)

    def _url(self, call: Call) -> str:
        path = call.target or call.path
        if path.startswith(("http://", "https://")):
            return path
        query = ("&" if "?" in path else "?") + urlencode({"ns": self.host.namespace}) if self.host.namespace else ""
        return f"{self.host.base}/v2/{call.repository}/{path}{query}"

    def _from_memory(self, call: Call, deadline: float | None) -> Response | None:
        """The answer of the remembered address, or None when there is none or it has expired."""
        if call.memo is None:
            return None
        with self._lock:
            url = self._places.get((call.repository, call.memo))
        if url is None:
            return None
        try:
            response = self._foreign(call, url, deadline)
            if response.status < 300 or response.status == 416:
                return response
            response.discard()
        except RegistryError:
            pass  # the registry may lead elsewhere by now
        with self._lock:
            self._places.pop((call.repository, call.memo), None)
        return None

    def _remember(self, call: Call, url: str) -> None:
        if call.memo is not None:
            with self._lock:
                self._places[(call.repository, call.memo)] = url
                while len(self._places) > MAX_REMEMBERED:
                    self._places.popitem(last=False)

    def _through_registry(self, call: Call, deadline: float | None) -> Response:
        header = self._auth.header(call.repository, call.actions, deadline)
        tried: set[int] = set()
        while True:
            response, home = self._follow(call, header, deadline)
            status = response.status
            # 403 too: some registries answer an expired token so. Anonymous 403s have nothing to renew.
            if not home or status not in (401, 403) or status in tried or (status == 403 and header is None):
                return response
            tried.add(status)
            renewed = self._auth.renew(
                call.repository, call.actions, header, response.headers.get("WWW-Authenticate"), deadline
            )
            if renewed is None:
                return response
            response.discard()
            header = renewed

    def _follow(self, call: Call, header: str | None, deadline: float | None) -> tuple[Response, bool]:
        """(answer that is no redirect, whether it is the host's own)."""
        url = self._url(call)
        home = origin_of(url) == self.host.origin  # an upload may go elsewhere from its beginning
        for _ in range(MAX_REDIRECTS):
            if home:
                headers = {**dict(self.host.headers), **dict(call.headers)}
                if header is not None:
                    headers["Authorization"] = header
                response = self._send(call, url, headers, deadline)
            else:
                response = self._foreign(call, url, deadline)
            if response.status not in REDIRECTS or "Location" not in response.headers or not call.follow:
                if not home and response.status < 300:
                    self._remember(call, url)
                return response, home
            response.discard()
            url = self.target(url, response.headers["Location"])
            home = home and origin_of(url) == self.host.origin  # once away, our headers stay away
        raise RegistryError(f"{self.name} redirects more than {MAX_REDIRECTS} times")

    def target(self, url: str, location: str) -> str:
        """Where an answer of `url` leads to by its Location. Raises RegistryError: not a place to go to."""
        try:
            target = urljoin(url, location)
        except ValueError:
            raise RegistryError(f"{self.name} leads to a URL that is not valid") from None
        here, there = origin_of(url), origin_of(target)
        if here.scheme == "https" and there.scheme == "http":
            raise RegistryError(f"{self.name} leads from https to plain http at {there.netloc}: refused")
        if is_internal(there.host) and not is_internal(here.host) and there.host != here.host:
            raise RegistryError(f"{self.name} leads to {there.netloc}, an address of this machine: refused")
        return target

    def _foreign(self, call: Call, url: str, deadline: float | None) -> Response:
        headers = {name: value for name, value in call.headers if name in REMOTE_HEADERS}
        return self._send(call, url, headers, deadline, away=True)

    def _send(
        self, call: Call, url: str, headers: Mapping[str, str], deadline: float | None, *, away: bool = False
    ) -> Response:
        tls = self.host.tls.foreign() if away else self.host.tls
        return self._transport.exchange(
            call.method,
            url,
            headers,
            tls=tls,
            kind=call.kind,
            deadline=deadline,
            body=call.body,
            outside=self._must_be_outside(url),
        )

    def _must_be_outside(self, url: str) -> bool:
        """Whether a name's answer may not be an address of this machine. What is *written* as one was judged before."""
        if self._inside is None or is_internal(self.host.origin.host):
            return False
        there = origin_of(url)
        if there == self.host.origin and (self.host.is_given or self._inside(self.host.registry)):
            return False
        return not self._inside(there.netloc)

    def _fetch_token(
        self, url: str, headers: dict[str, str], form: bytes | None, deadline: float | None
    ) -> tuple[int, bytes]:
        """One exchange with the token service. A redirect is followed for GET, without the credentials elsewhere."""
        start = origin_of(url)
        for _ in range(MAX_REDIRECTS):
            here = origin_of(url)
            own = here == self.host.origin
            response = self._transport.exchange(
                "GET" if form is None else "POST",
                url,
                headers if here == start else {},
                tls=self.host.tls if own else self.host.tls.foreign(),
                kind="token",
                deadline=deadline,
                body=form,
                outside=self._must_be_outside(url),
            )
            if response.status not in REDIRECTS or form is not None or "Location" not in response.headers:
                return response.status, response.read_all(MAX_TOKEN_ANSWER)
            response.discard()
            url = self.target(url, response.headers["Location"])
        raise RegistryError(f"the token service of {self.name} redirects more than {MAX_REDIRECTS} times")

    def _error(self, call: Call, response: Response) -> RegistryError:
        status, where = response.status, response.host
        home = origin_of(response.url) == self.host.origin
        secrets = self._auth.secrets(call.repository, call.actions)
        secrets += tuple(value for _, value in self.host.headers)
        # a signature is in the address, and some servers repeat what they were asked
        secrets += tuple(value for _, value in parse_qsl(urlsplit(response.url).query) if len(value) >= 16)
        detail = self._detail(response, secrets) if home else ""
        what = f"{call.kind} {call.path.rpartition('/')[2]} of {call.repository}"
        suffix = f": {detail}" if detail else ""
        if status in RETRYABLE:
            after = retry_after(response.headers.get("Retry-After"), self._hooks)
            asked = f", and asks to wait {after:g} s" if after else ""
            return BusyError(f"{where} answered {status} for {what}{asked}{suffix}", status=status, after=after)
        if not home:
            # storage behind the registry: an address that expired on the way is worth another try
            return RegistryError(
                f"{where}, where {self.name} redirects to, answered {status} for {what}",
                retryable=status in (401, 403, 404, 410),
                status=status,
            )
        if status in (401, 403):
            return self._auth.refusal(call.repository, call.actions, status, detail)
        if status in (404, 410):
            return NotFoundError(f"{where} has no {what}{suffix}", status=status)
        if status == 400 and self.host.origin.scheme == "http" and "HTTPS server" in detail:
            return RegistryError(
                f"{where} speaks https, and was asked in plain http",
                status=status,
                hint=f"set `plain_http: false` under `registries: {where}:`, and its `ca`",
            )
        return RegistryError(f"{where} answered {status} for {what}{suffix}", status=status)

    def _detail(self, response: Response, secrets: tuple[str, ...]) -> str:
        """What the registry says about a failure (distribution-spec "Error Codes"): one short line without secrets."""
        try:
            body = response.read_all(MAX_ERROR_BODY, ERROR_SECONDS)
        except RegistryError:
            return ""
        try:
            first = json.loads(body)["errors"][0]
            text = str(first.get("message") or first.get("code") or "")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            text = body[:200].decode("utf-8", "replace") if b"<" not in body else ""
        for secret in secrets:
            if secret:
                text = text.replace(secret, "***")
        return redact(text)


def redact(text: str) -> str:
    """One printable line of at most 200 characters, without what looks like a credential or a signed query."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text[:2000]).split())
    line = re.sub(r"(?i)\b(bearer|basic|token)\s+[A-Za-z0-9+/=._~-]{8,}", r"\1 ***", line)
    line = re.sub(r"(https?://[^\s?]*)\?\S*", r"\1?***", line)
    # whatever else is long and no digest: a part of a token, perhaps
    line = re.sub(r"(?<![A-Za-z0-9+=_~.-])(?![0-9a-f]{64}\b)[A-Za-z0-9+=_~.-]{40,}", "***", line)
    return line if len(line) <= 200 else line[:197] + "..."
