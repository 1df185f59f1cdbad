"""Answers a registry's challenges: anonymous, basic, bearer tokens (distribution-spec "token authentication").

One Authenticator for each host. Tokens are kept by repository, renewed before they expire and when the registry refuses
them, by one thread while the others wait for it. Standard library only; the transport is handed in.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlencode, urlsplit, urlunsplit

from shim.errors import AuthError, RegistryError
from shim.registry.challenge import Challenge, parse_challenges
from shim.registry.credentials import Credentials, CredentialStore
from shim.registry.hooks import Hooks
from shim.registry.transport import Origin, is_internal, is_loopback, origin_of

MAX_TOKEN_ANSWER = 256 << 10
MAX_TOKEN = 64 << 10
MAX_REPOSITORIES = 1024  # whose tokens are kept
DEFAULT_LIFE = 60.0  # seconds, distribution-spec: when expires_in is missing
CLIENT_ID = "clip-shim"
LOCK_WAIT = 60.0

# (url, headers, form or None, deadline) -> (status, body)
Fetch = Callable[[str, dict[str, str], bytes | None, float | None], tuple[int, bytes]]


@dataclass(slots=True)
class _Grant:
    """What one repository's requests carry."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    challenge: Challenge | None = None
    header: str | None = field(default=None, repr=False)
    expires: float | None = None  # on hooks.clock; None: does not expire
    anonymous: bool = True
    source: str = ""
    sent: list[str] = field(default_factory=list, repr=False)  # the latest secrets, to know them when they come back


class Authenticator:
    """Credentials and tokens for one host. Thread-safe."""

    def __init__(self, origin: Origin, key: str, store: CredentialStore, fetch: Fetch, hooks: Hooks) -> None:
        self._origin = origin
        self._key = key
        self._store = store
        self._fetch = fetch
        self._hooks = hooks
        self._lock = threading.Lock()
        self._grants: OrderedDict[tuple[str, str], _Grant] = OrderedDict()

    def header(self, repository: str, actions: str = "pull", deadline: float | None = None) -> str | None:
        """The Authorization to send, or None while the host has not asked for any. Renews a token about to expire."""
        grant = self._grant(repository, actions)
        header, expires = grant.header, grant.expires
        if header is None or expires is None or self._hooks.clock() < expires:
            return header
        return self.renew(repository, actions, header, None, deadline) or grant.header

    def renew(
        self, repository: str, actions: str, rejected: str | None, www: str | None, deadline: float | None
    ) -> str | None:
        """Another Authorization than `rejected`, or None when there is none to try.

        www: the WWW-Authenticate that came with the refusal. Raises RegistryError or AuthError when the token service
        cannot be asked or refuses.
        """
        grant = self._grant(repository, actions)
        wait = LOCK_WAIT if deadline is None else max(0.0, deadline - self._hooks.clock())
        if not grant.lock.acquire(timeout=min(wait, threading.TIMEOUT_MAX)):
            raise RegistryError(f"no token for {self._origin.netloc} in time", retryable=True)
        try:
            if grant.header is not None and grant.header != rejected:
                return grant.header  # another thread was here meanwhile
            offered = parse_challenges(www)
            chosen = next((c for kind in ("bearer", "basic") for c in offered if c.scheme == kind), grant.challenge)
            if chosen is None:
                return None
            if rejected is not None:
                self._store.forget(self._key)
            credentials = self._store.lookup(self._key, repository)
            grant.challenge = chosen
            grant.source = credentials.source if credentials else ""
            grant.anonymous = credentials is None
            if chosen.scheme == "basic":
                usable = credentials is not None and credentials.password
                grant.header = credentials.basic if credentials is not None and usable else None
                grant.expires = None
            else:
                grant.header, grant.expires = self._bearer(chosen, credentials, repository, actions, deadline)
            grant.sent = [*grant.sent, *(grant.header or "").split(" ")[1:]][-4:]
            return grant.header if grant.header != rejected else None
        finally:
            grant.lock.release()

    def refusal(self, repository: str, actions: str, status: int, detail: str) -> AuthError:
        """The error for a refusal that stands."""
        grant = self._grant(repository, actions)
        what = f"{repository} at {self._origin.netloc}"
        problems = "; ".join(f"{name}: {why}" for name, why in sorted(self._store.problems.items())[:3])
        if grant.anonymous:
            message = f"{what} needs credentials and none were found ({status})"
        else:
            verb = "write" if "push" in actions else "read"
            message = f"the credentials of {grant.source} may not {verb} {what} ({status})"
        message += f": {detail}" if detail else ""
        return AuthError(message, status=status, hint=f"not used: {problems}" if problems else None)

    def secrets(self, repository: str, actions: str = "pull") -> tuple[str, ...]:
        """Texts that must not be repeated from this host's answers."""
        return tuple(self._grant(repository, actions).sent)

    def _grant(self, repository: str, actions: str) -> _Grant:
        with self._lock:
            grant = self._grants.setdefault((repository, actions), _Grant())
            self._grants.move_to_end((repository, actions))
            while len(self._grants) > MAX_REPOSITORIES:
                self._grants.popitem(last=False)
            return grant

    def _bearer(
        self,
        challenge: Challenge,
        credentials: Credentials | None,
        repository: str,
        actions: str,
        deadline: float | None,
    ) -> tuple[str, float | None]:
        if credentials is not None and credentials.registry_token:
            return f"Bearer {credentials.registry_token}", None
        realm = self._realm(challenge)
        query = {"service": challenge.params["service"]} if challenge.params.get("service") else {}
        scopes = list(
            dict.fromkeys((f"repository:{repository}:{actions}", *challenge.params.get("scope", "").split()[:8]))
        )
        headers: dict[str, str] = {}
        form = None
        if credentials is not None and credentials.identity_token:
            # distribution-spec "OAuth2 token authentication"
            fields = {**query, "grant_type": "refresh_token", "refresh_token": credentials.identity_token}
            form = urlencode({**fields, "client_id": CLIENT_ID, "scope": " ".join(scopes)}).encode()
            headers["Content-Type"] = "application/x-www-form-urlencoded"
            url = realm
        else:
            parts = urlsplit(realm)
            pairs = [*query.items(), *(("scope", scope) for scope in scopes)]
            if credentials is not None:
                headers["Authorization"] = credentials.basic
                pairs.append(("account", credentials.username))
            extra = urlencode(pairs)
            url = urlunsplit(parts._replace(query=f"{parts.query}&{extra}" if parts.query else extra))
        self._hooks.fault("token", origin_of(realm).netloc)
        status, body = self._fetch(url, headers, form, deadline)
        if status != 200:
            raise self._token_refused(status, realm, credentials, repository)
        return self._token(body, realm)

    def _realm(self, challenge: Challenge) -> str:
        """The token service's URL, if it is one we may go to with what we know."""
        realm = challenge.params.get("realm", "")
        where = origin_of(realm)
        plain = self._origin.scheme == "http" or is_loopback(self._origin.host)
        if where.scheme != "https" and not plain:
            raise AuthError(
                f"{self._origin.netloc} wants credentials sent over plain http to {where.netloc}: refused",
                hint="the registry's token service must speak https",
            )
        if is_internal(where.host) and not is_loopback(self._origin.host) and where.host != self._origin.host:
            raise AuthError(f"{self._origin.netloc} names {where.netloc} as its token service: refused")
        return realm.partition("#")[0]

    def _token_refused(
        self, status: int, realm: str, credentials: Credentials | None, repository: str
    ) -> RegistryError:
        where = origin_of(realm).netloc
        if status in (400, 401, 403):
            if credentials is None:
                return AuthError(f"{where} gives no anonymous token for {repository} ({status})", status=status)
            return AuthError(f"{where} refused the credentials of {credentials.source} ({status})", status=status)
        retryable = status in (408, 429) or status >= 500
        return RegistryError(f"the token service {where} answered {status}", retryable=retryable, status=status)

    def _token(self, body: bytes, realm: str) -> tuple[str, float | None]:
        where = origin_of(realm).netloc
        try:
            data = json.loads(body)
            token = data.get("token") or data.get("access_token")
            life = data.get("expires_in", DEFAULT_LIFE)
        except (ValueError, AttributeError, RecursionError):
            raise RegistryError(f"the token service {where} did not answer with JSON") from None
        if (
            not isinstance(token, str)
            or not 0 < len(token) <= MAX_TOKEN
            or not (token.isascii() and token.isprintable())
        ):
            raise RegistryError(f"the token service {where} answered without a usable token")
        seconds = float(life) if isinstance(life, int | float) and 0 < life < 1e9 else DEFAULT_LIFE
        # ask for the next one a little early: the clock of the registry decides
        return f"Bearer {token}", self._hooks.clock() + seconds - min(30.0, seconds * 0.2)
