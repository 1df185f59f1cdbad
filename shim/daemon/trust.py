"""Where an index may lead: the `trust:` part of the settings, as far as the daemon decides it."""

from __future__ import annotations

import ipaddress
import socket

from shim.errors import TrustError
from shim.registry.transport import is_internal


def check_registry(registry: str, trusted: tuple[str, ...]) -> None:
    """Raise TrustError unless `trust.registries` names the registry, as host or host:port.

    "*" stands for all that are not this machine (loopback) or its neighbours on the link, where metadata services live,
    however the address is written: 127.1, 0x7f000001 and 2130706433 are 127.0.0.1 to the C library. Names are not
    looked up: what they mean can change between the look and the use.
    """
    host, port = _split(registry)
    for item in trusted:
        if item == "*":
            if not is_internal(host):
                return
        elif _split(item) in ((host, port), (host, "")):
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
