"""WWW-Authenticate, read as RFC 9110 11.6.1 has it: several challenges in one header, quoted strings, commas in both.

The header comes from outside: it is bounded, reading it is linear, and what makes no sense is passed over. Standard
library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

MAX_HEADER = 8192
MAX_CHALLENGES = 16
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # noqa: S105 - the grammar's "token"
_PARAM = re.compile(rf"({_TOKEN})[ \t]*=[ \t]*(?:\"((?:[^\"\\]|\\.)*)\"|([^\s,\"=][^\s,\"]*))")
_SCHEME = re.compile(rf"({_TOKEN})(?=[ \t,]|\Z)")
_SPACE = re.compile(r"[ \t,]*")
_REST = re.compile(r"[^,]*")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge: `scheme` in lower case, parameter names too."""

    scheme: str
    params: dict[str, str] = field(default_factory=dict)


def parse_challenges(header: str | None) -> list[Challenge]:
    """All challenges of a WWW-Authenticate header (several headers joined by a comma), in order. Never raises."""
    found: list[Challenge] = []
    text = (header or "")[:MAX_HEADER]
    at = 0
    while at < len(text) and len(found) <= MAX_CHALLENGES:
        space = _SPACE.match(text, at)
        at = space.end() if space else at
        param = _PARAM.match(text, at)
        if param:
            if found:
                quoted, bare = param[2], param[3]
                value = bare if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
                found[-1].params.setdefault(param[1].lower(), value)
            at = param.end()
            continue
        scheme = _SCHEME.match(text, at)
        if scheme:
            found.append(Challenge(scheme[1].lower()))
            at = scheme.end()
            continue
        rest = _REST.match(text, at)  # token68 or nonsense: up to the next comma
        at = max(rest.end() if rest else at, at + 1)
    return found[:MAX_CHALLENGES]
