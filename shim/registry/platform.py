"""Platforms `os/arch[/variant]`: parsing, normal form, and which manifest of an image index suits.

Follows containerd's `platforms` package (`database.go` for the normal form, `compare.go` for the order of preference),
so that the same manifest is chosen as by `docker pull` and `ctr pull`. Pure, standard library only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from shim.errors import UsageError

_PART = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
_ARCHES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armv5tel": ("arm", "v5"),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "ppc64el": ("ppc64le", ""),
}
_KNOWN = frozenset(("386", "amd64", "arm", "arm64", "loong64", "mips64le", "ppc64le", "riscv64", "s390x", "wasm"))
_DEFAULT_VARIANT = {("amd64", "v1"): "", ("arm64", "v8"): "", ("arm64", "8"): "", ("arm", ""): "v7"}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Platform:
    """In normal form: arm64 and amd64 baseline have no variant, arm always has one."""

    os: str
    arch: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.arch, self.variant)))


def normalise(os_: str, arch: str, variant: str = "") -> Platform:
    """containerd platforms.Normalize: aliases resolved, default variants dropped (arm's filled in)."""
    system, machine, kind = os_.lower(), arch.lower(), variant.lower()
    system = {"macos": "darwin"}.get(system, system)
    if machine in _ARCHES:
        machine, implied = _ARCHES[machine]
        kind = kind or implied
    if machine == "arm" and kind.isdigit():
        kind = "v" + kind
    return Platform(system, machine, _DEFAULT_VARIANT.get((machine, kind), kind))


def host() -> Platform:
    """This machine's platform."""
    uname = os.uname()
    return normalise(uname.sysname, uname.machine)


def parse(text: str | None) -> Platform:
    """`os/arch[/variant]`, or a lone architecture; None or "" is the host. Raises UsageError."""
    if not text:
        return host()
    parts = text.split("/")
    if len(parts) > 3 or len(text) > 200 or not all(_PART.match(part) for part in parts):
        raise _wrong(text)
    if len(parts) == 1:
        lone = normalise("linux", parts[0])
        if lone.arch not in _KNOWN:
            raise _wrong(text)
        return lone
    return normalise(*parts)


def _wrong(text: str) -> UsageError:
    return UsageError(
        f"{text[:80]!r} is not a platform",
        hint="a platform is os/arch[/variant], for example linux/amd64 or linux/arm/v7",
    )


def preferences(wanted: Platform) -> list[Platform]:
    """`wanted` and what else runs where it runs, best first (containerd platformVector)."""
    found = [wanted]
    if wanted.arch == "amd64":
        level = _level(wanted.variant)
        found += [normalise(wanted.os, "amd64", f"v{n}") for n in range(level - 1, 0, -1)]
        found.append(Platform(wanted.os, "386"))
    elif wanted.arch == "arm":
        found += [Platform(wanted.os, "arm", f"v{n}") for n in range(_level(wanted.variant) - 1, 4, -1)]
    elif wanted.arch == "arm64":
        if wanted.variant:  # v9 machines run the v8 baseline
            found.append(Platform(wanted.os, "arm64"))
        found += [Platform(wanted.os, "arm", f"v{n}") for n in (8, 7, 6, 5)]
    return found


def _level(variant: str) -> int:
    return int(variant[1:]) if re.fullmatch(r"v[0-9]{1,2}", variant) else 1


def choose(wanted: Platform, offered: Sequence[tuple[Platform | None, T]]) -> T | None:
    """The best of `offered` for `wanted`, or None. Among equals the first wins, as with containerd.

    Entries without a platform are passed over (the caller may look into them), and so are attestations, which
    BuildKit marks unknown/unknown.
    """
    for candidate in preferences(wanted):
        for platform, item in offered:
            if platform == candidate:
                return item
    return None


def matches(wanted: Platform, actual: Platform) -> bool:
    """Whether an image for `actual` runs where `wanted` is asked for."""
    return actual in preferences(wanted)
