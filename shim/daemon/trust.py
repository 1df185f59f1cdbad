"""Where an index may lead: the `trust:` part of the settings, as far as the daemon decides it."""

from __future__ import annotations

import difflib
import ipaddress
import socket
from typing import Any

from shim.errors import ConfigError, TrustError
from shim.registry.client import RegistryClient
from shim.registry.ref import ImageRef
from shim.registry.transport import is_internal
from shim.settings import Settings
from shim.stores.urls import S3Place

SOURCES = ("annotation", "bundle", "marker", "env", "mount")
_KEYS = ("registries", "stores")


class Trust:
    """The `trust:` settings, by where a reference stood. `trust.sources.SOURCE.registries` (or `stores`) takes the
    place of `trust.registries` (`trust.stores`) for references of that source. Raises ConfigError when it is wrong."""

    def __init__(self, settings: Settings) -> None:
        own = [url for url in (*settings["stores.lookup"], *settings["stores.write"]) if url.startswith("s3://")]
        self._general: dict[str, tuple[str, ...]] = {
            "registries": settings["trust.registries"],
            "stores": (*own, *settings["trust.stores"]),
        }
        self._by_source: dict[str, dict[str, tuple[str, ...]]] = {}
        for source, rules in settings["trust.sources"].items():
            key = f"trust.sources.{source}"
            if source not in SOURCES:
                near = difflib.get_close_matches(source, SOURCES, n=1)
                raise ConfigError(f"`{key}` is no source of references", hint=f"they are {', '.join(near or SOURCES)}")
            if not isinstance(rules, dict) or not all(name in _KEYS for name in rules):
                raise ConfigError(f"`{key}` must be a table of {' and '.join(_KEYS)}")
            self._by_source[source] = {name: _texts(value, f"{key}.{name}") for name, value in rules.items()}

    def is_narrowed(self, source: str) -> bool:
        """Whether references of this source have rules of their own."""
        return source in self._by_source

    def check_registry(self, source: str, image: ImageRef) -> None:
        """Raise TrustError unless a reference of `source` may lead to the image."""
        trusted = self._by_source.get(source, {}).get("registries", self._general["registries"])
        check_registry(image.registry, trusted, image.repository)

    def check_store(self, source: str, place: S3Place) -> None:
        """Raise TrustError unless a reference of `source` may name the object, which the node's credentials read."""
        trusted = self._by_source.get(source, {}).get("stores", self._general["stores"])
        if not any(item == "*" or f"{place}/".startswith(item.rstrip("/*") + "/") for item in trusted):
            raise TrustError(
                f"the reference leads to {place}, which neither `stores` nor `trust.stores` names",
                hint=f"add s3://{place.bucket}/ to `trust.stores` in the configuration if you want that",
            )


def registry_client(settings: Settings, **options: Any) -> RegistryClient:
    """A client as the daemon and its jobs must use it: what images and references name leads out of this machine.

    A registry (or where it redirects to, or gets its tokens from) whose *name* turns out to be a loopback or link-local
    address is refused unless `trust` names it, or the configuration says where it is. It is the connection that is
    looked at, so a name that is resolved twice can not lead elsewhere the second time.
    """
    narrower = [rules.get("registries", []) for rules in settings["trust.sources"].values() if isinstance(rules, dict)]
    listed = [item.partition("/")[0] for items in (settings["trust.registries"], *narrower) for item in items]

    def inside(name: str) -> bool:
        host, port = _split(name)
        return any(place != "*" and _split(place) in ((host, port), (host, "")) for place in listed)

    return RegistryClient(settings["registries"], inside=inside, **options)


def _texts(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item.isprintable() for item in value):
        raise ConfigError(f"`{key}` must be a list of texts")
    return tuple(value)


def check_registry(registry: str, trusted: tuple[str, ...], repository: str = "") -> None:
    """Raise TrustError unless `trust.registries` names the registry, as host or host:port, or a part of it as
    host[:port]/REPOSITORY, which stands for that repository and all below it.

    "*" stands for all that are not this machine (loopback) or its neighbours on the link, where metadata services live,
    however the address is written: 127.1, 0x7f000001 and 2130706433 are 127.0.0.1 to the C library. What names mean is
    looked at when they are used: see registry_client.
    """
    host, port = _split(registry)
    for item in trusted:
        place, _, part = item.partition("/")
        if part and not f"{repository}/".startswith(part.rstrip("/*") + "/"):
            continue
        if place == "*":
            if not is_internal(host):
                return
        elif _split(place) in ((host, port), (host, "")):
            return
    raise TrustError(
        f"the index leads to the registry {registry}, which `trust.registries` does not name",
        hint=f"add {registry} to `trust.registries` in the configuration if you want that",
    )


def _split(text: str) -> tuple[str, str]:
    """(host, port or "") in a form that can be compared: lower case, no brackets, addresses in their usual notation."""
    host, colon, port = text.strip().lower().rpartition(":")
    if not colon or not port.isdigit() or (":" in host and not host.endswith("]")):
        host, port = text.strip().lower(), ""
    return _canonical(host.strip("[]").rstrip(".")), port.lstrip("0")


def _canonical(host: str) -> str:
    try:
        address = ipaddress.ip_address(host)
        return str(getattr(address, "ipv4_mapped", None) or address)
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host)) if host else host
    except (OSError, UnicodeError):
        return host
