"""Which registries an index may lead to, however their names are written."""

from __future__ import annotations

import pytest

from shim.daemon.trust import check_registry
from shim.errors import TrustError

LOCAL = [
    "localhost",
    "localhost:5000",
    "LOCALHOST:5000",
    "a.localhost",
    "127.0.0.1",
    "127.0.0.1:5000",
    "127.1:5000",
    "127.8.9.10",
    "0x7f.1:80",
    "0x7f000001",
    "0X7F.0.0.1",
    "2130706433:80",
    "0177.0.0.1",
    "017700000001:5000",
    "0:5000",
    "0.0.0.0:5000",
    "169.254.169.254",
    "169.254.169.254:80",
    "0xa9fea9fe:80",
    "2852039166:80",
    "[::1]",
    "[::1]:5000",
    "[0:0:0:0:0:0:0:1]:5000",
    "[::]:5000",
    "[::ffff:127.0.0.1]:5000",
    "[::ffff:7f00:1]",
    "[::ffff:169.254.169.254]",
    "[fe80::1]:5000",
]
REMOTE = [
    "docker.io",
    "registry.example.com:5000",
    "10.0.0.1:5000",
    "192.168.1.1",
    "[2001:db8::1]:5000",
    "127.example.com",
    "localhost.example.com",
    "0x7f.example.com:5000",
]


@pytest.mark.parametrize("registry", LOCAL)
def test_this_machine_and_its_link_must_be_named(registry: str) -> None:
    for trusted in ((), ("*",), ("docker.io", "*", "10.0.0.1")):
        with pytest.raises(TrustError) as caught:
            check_registry(registry, trusted)
        assert registry in str(caught.value)
        assert "trust.registries" in str(caught.value)
        assert registry in caught.value.hint
        assert "trust.registries" in caught.value.hint
    check_registry(registry, (registry,))


@pytest.mark.parametrize("registry", REMOTE)
def test_others_are_what_the_star_is_for(registry: str) -> None:
    check_registry(registry, ("*",))
    with pytest.raises(TrustError):
        check_registry(registry, ("other.example.com",))


@pytest.mark.parametrize(
    ("registry", "item"),
    [
        ("127.0.0.1:5000", "127.0.0.1"),
        ("127.0.0.1:5000", "127.0.0.1:5000"),
        ("0x7f.1:5000", "127.0.0.1"),
        ("127.0.0.1:5000", "0x7f.1"),
        ("Registry.Example.com:5000", "registry.example.COM"),
        ("localhost:5000", "LocalHost"),
        ("[::1]:5000", "::1"),
        ("[::1]:5000", "[::1]"),
        ("[0::1]:5000", "[::1]:5000"),
        ("[::ffff:127.0.0.1]:5000", "127.0.0.1"),
        ("registry.example.com", " registry.example.com "),
    ],
)
def test_named(registry: str, item: str) -> None:
    check_registry(registry, (item,))


@pytest.mark.parametrize(
    ("registry", "item"),
    [
        ("127.0.0.1:5001", "127.0.0.1:5000"),
        ("127.0.0.1", "127.0.0.1:5000"),
        ("127.0.0.2", "127.0.0.1"),
        ("[::1]:5001", "[::1]:5000"),
        ("evil-registry.example.com", "registry.example.com"),
        ("registry.example.com.evil.org", "registry.example.com"),
        ("a.registry.example.com", "registry.example.com"),
        ("docker.io", ""),
    ],
)
def test_not_named(registry: str, item: str) -> None:
    with pytest.raises(TrustError):
        check_registry(registry, (item,))
