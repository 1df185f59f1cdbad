"""What a check says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from shim.doctor.node import Node

Status = Literal["ok", "skipped", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Result:
    """One finding. check: the check's name, set by whoever ran it; fix: what to do, "" when there is nothing to do;
    mend: does that, where it is safe (`doctor --fix`), and returns what it did. It may raise ShimError or OSError."""

    status: Status
    found: str
    expected: str
    fix: str = ""
    check: str = ""
    mend: Callable[[], str] | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, str]:
        """The documented keys."""
        return {
            "check": self.check,
            "status": self.status,
            "found": self.found,
            "expected": self.expected,
            "fix": self.fix,
        }


def ok(found: str, expected: str) -> Result:
    return Result("ok", found, expected)


def skipped(found: str, expected: str = "") -> Result:
    """What the check is about does not exist here, and need not."""
    return Result("skipped", found, expected)


def warning(found: str, expected: str, fix: str, mend: Callable[[], str] | None = None) -> Result:
    return Result("warning", found, expected, fix, mend=mend)


def failed(found: str, expected: str, fix: str, mend: Callable[[], str] | None = None) -> Result:
    return Result("failed", found, expected, fix, mend=mend)


Run = Callable[["Node"], Iterator[Result]]


@dataclass(frozen=True, slots=True)
class Check:
    """name: what `--check` takes; help: what it looks at, for `--list`; seconds: how long it may take, None for as long
    as it likes."""

    name: str
    run: Run
    help: str
    seconds: float | None = 90.0
