"""Which hosts serve a registry, in what order and how: the settings table `registries`, in hosts.toml's terms.

    registries:
      docker.io:
        mirrors:                                  # asked in this order, then the registry itself
          - host: https://mirror.example.com/dockerhub   # scheme and path prefix may be left out
            capabilities: [pull, resolve]         # resolve: may say what a tag is; default both
            ca: /etc/ssl/mirror.pem               # or a list
            client: [/etc/ssl/me.pem, /etc/ssl/me.key]
            skip_verify: false
            plain_http: false
            headers: {X-Team: infra}
      registry.example.com:5000:                  # the same keys, for the registry itself
        ca: /etc/ssl/private-ca.pem
      "*": …                                      # for registries that are not listed

A host without TLS settings of its own takes those of /etc/containers/certs.d/HOST and /etc/docker/certs.d/HOST, as
podman and Docker do. Plain http is used without being asked for on loopback only. Standard library only.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from shim.errors import ConfigError, RegistryError
from shim.registry.transport import TLS, Origin, is_loopback, origin_of

CERTS_DIRS = ("/etc/containers/certs.d", "/etc/docker/certs.d")  # containers-certs.d(5), dockerd's "certs.d"
DOCKER_HUB = "registry-1.docker.io"
PULL, RESOLVE = "pull", "resolve"
MAX_MIRRORS = 32
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}\Z")  # RFC 9110 token
NO_TLS = TLS()
_KEYS = ("ca", "client", "skip_verify", "plain_http", "headers", "capabilities", "host")


@dataclass(frozen=True, slots=True)
class Host:
    """One host that may be asked for what belongs to `registry`. `base` is its URL up to, without, "/v2"."""

    registry: str
    base: str
    origin: Origin
    tls: TLS = NO_TLS
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    capabilities: frozenset[str] = frozenset((PULL, RESOLVE))
    is_mirror: bool = False
    is_given: bool = False  # the configuration says where it is

    @property
    def name(self) -> str:
        return self.origin.netloc

    @property
    def namespace(self) -> str | None:
        """The `ns` a mirror is told, so that one mirror can serve many registries (containerd hosts.md)."""
        return self.registry if self.is_mirror else None

    @property
    def credential_key(self) -> str:
        """What the host is called in credential files."""
        if self.origin.host == DOCKER_HUB:
            return "docker.io"
        return self.name if self.is_given else self.registry  # as it was written at `login`: example.com:443


class Hosts:
    """The parsed table. Raises ConfigError, naming the key, when it is wrong."""

    def __init__(self, table: Mapping[str, Any] | None = None, certs_dirs: Sequence[str] = CERTS_DIRS) -> None:
        self._certs_dirs = tuple(certs_dirs)
        self._table: dict[str, Mapping[str, Any]] = {}
        for name, entry in (table or {}).items():
            key = f"registries.{name}"
            if name != "*" and _bare_host(name) is None:
                raise ConfigError(f"{key} must be named by a registry host, for example registry.example.com:5000")
            if not isinstance(entry, Mapping):
                raise ConfigError(f"{key} must be a table")
            _known(entry, key, ("mirrors", *_KEYS))
            self._table["docker.io" if name in ("index.docker.io", DOCKER_HUB) else name] = entry
            self._build("example.invalid" if name == "*" else name, entry, key)

    def of(self, registry: str) -> list[Host]:
        """The hosts to ask for `registry`, best first; the registry itself is the last."""
        name = registry if registry in self._table else "*"
        return self._build(registry, self._table.get(name, {}), f"registries.{name}")

    def _build(self, registry: str, entry: Mapping[str, Any], key: str) -> list[Host]:
        mirrors = [] if entry.get("mirrors") is None else entry["mirrors"]
        if not isinstance(mirrors, list) or len(mirrors) > MAX_MIRRORS:
            raise ConfigError(f"{key}.mirrors must be a list of at most {MAX_MIRRORS} tables")
        hosts = []
        for n, item in enumerate(mirrors):
            where = f"{key}.mirrors[{n}]"
            mirror = {"host": item} if isinstance(item, str) else item
            if not isinstance(mirror, Mapping):
                raise ConfigError(f"{where} must be a table with `host`")
            _known(mirror, where, _KEYS)
            hosts.append(self._host(registry, mirror, where, mirror.get("host"), is_mirror=True))
        own = entry.get("host") or (DOCKER_HUB if registry == "docker.io" else registry)
        return [*hosts, self._host(registry, entry, key, own, is_mirror=False)]

    def _host(self, registry: str, entry: Mapping[str, Any], key: str, where: object, *, is_mirror: bool) -> Host:
        if not isinstance(where, str) or not where:
            raise ConfigError(f"{key}.host must be a host or a URL, for example https://mirror.example.com")
        plain = _flag(entry, "plain_http", key)
        tls = _tls(entry, key)
        url = where
        if "://" not in where:
            bare = _bare_host(where.partition("/")[0])
            if bare is None:
                raise ConfigError(f"{key}.host: {where[:100]!r} is not a host or a URL")
            secure = entry.get("plain_http") is False or tls != NO_TLS or bare[1] == 443
            url = f"{'http' if plain or (is_loopback(bare[0]) and not secure) else 'https'}://{where}"
        elif plain and url.startswith("https://"):
            raise ConfigError(f"{key}: `plain_http: true` contradicts the https:// of `host`")
        try:
            origin = origin_of(url)
        except RegistryError:
            raise ConfigError(f"{key}.host must be an http or https URL without credentials") from None
        parts = urlsplit(url)
        if parts.query or parts.fragment:
            raise ConfigError(f"{key}.host must not have a query")
        if tls == NO_TLS and origin.scheme == "https":
            tls = self._certs_d(origin)
        base = f"{origin.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v2')}"
        given = is_mirror or bool(entry.get("host"))
        return Host(registry, base, origin, tls, _headers(entry, key), _capabilities(entry, key), is_mirror, given)

    def _certs_d(self, origin: Origin) -> TLS:
        """*.crt are CAs, NAME.cert with NAME.key a client certificate."""
        for directory in self._certs_dirs:
            for name in (f"{origin.host}:{origin.port}", origin.netloc):
                path = os.path.join(directory, name)
                try:
                    files = sorted(os.listdir(path))[:64]
                except OSError:
                    continue
                cas = tuple(os.path.join(path, f) for f in files if f.endswith(".crt"))
                pairs = tuple(
                    (os.path.join(path, f), os.path.join(path, f[:-5] + ".key"))
                    for f in files
                    if f.endswith(".cert") and f[:-5] + ".key" in files
                )
                if cas or pairs:
                    return TLS(cas, pairs)
        return NO_TLS


def _bare_host(text: str) -> tuple[str, int | None] | None:
    """(host, port) of host[:port], or None."""
    try:
        parts = urlsplit("//" + text)
        port = parts.port
    except ValueError:
        return None
    good = parts.hostname and parts.netloc == text and parts.username is None and not re.search(r"[\s\\%<>\"']", text)
    return (parts.hostname or "", port) if good else None


def _known(entry: Mapping[str, Any], key: str, names: tuple[str, ...]) -> None:
    for name in entry:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            raise ConfigError(
                f"{key}: unknown key `{str(name)[:60]}`", hint=f"did you mean `{near[0]}`?" if near else None
            )


def _flag(entry: Mapping[str, Any], name: str, key: str) -> bool:
    value = entry.get(name, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{key}.{name} must be true or false")
    return value


def _path(value: object, key: str) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ConfigError(f"{key} must be an absolute path")
    return value


def _tls(entry: Mapping[str, Any], key: str) -> TLS:
    cas = entry.get("ca") or []
    cas = [cas] if isinstance(cas, str) else cas
    if not isinstance(cas, list) or len(cas) > 64:
        raise ConfigError(f"{key}.ca must be a path or a list of paths")
    pairs = entry.get("client") or []
    if isinstance(pairs, str) or (isinstance(pairs, list) and pairs and isinstance(pairs[0], str)):
        pairs = [pairs]  # one pair, or one file that holds both
    if not isinstance(pairs, list) or len(pairs) > 64:
        raise ConfigError(f"{key}.client must be [certificate, key] or a list of those")
    client = []
    for n, pair in enumerate(pairs):
        files = [pair] if isinstance(pair, str) else pair
        if not isinstance(files, list) or len(files) not in (1, 2):
            raise ConfigError(f"{key}.client[{n}] must be [certificate, key]")
        paths = [_path(file, f"{key}.client[{n}]") for file in files]
        client.append((paths[0], paths[1] if len(paths) == 2 else ""))
    return TLS(tuple(_path(ca, f"{key}.ca") for ca in cas), tuple(client), skip_verify=_flag(entry, "skip_verify", key))


def _headers(entry: Mapping[str, Any], key: str) -> tuple[tuple[str, str], ...]:
    table = entry.get("headers") or {}
    if not isinstance(table, Mapping) or len(table) > 64:
        raise ConfigError(f"{key}.headers must be a table of texts")
    found = []
    for name, value in table.items():
        # hosts.toml allows a list; the value may be a secret and is never shown
        for text in value if isinstance(value, list) else [value]:
            good = isinstance(text, str) and len(text) <= 8192 and text.isprintable() and text.isascii()
            if not isinstance(name, str) or not _HEADER.match(name) or not good:
                raise ConfigError(f"{key}.headers: `{str(name)[:60]}` is not a valid header")
            found.append((name, text.strip()))
    return tuple(found)


def _capabilities(entry: Mapping[str, Any], key: str) -> frozenset[str]:
    items = entry.get("capabilities")
    if items is None:
        return frozenset((PULL, RESOLVE))
    if not isinstance(items, list) or not items or not all(item in (PULL, RESOLVE, "push") for item in items):
        raise ConfigError(f"{key}.capabilities must be a list of pull, resolve and push")
    return frozenset(items)
