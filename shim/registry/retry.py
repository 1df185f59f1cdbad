"""When to try again, and how long to wait before. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from shim.errors import RegistryError
from shim.registry.hooks import Hooks

RETRYABLE = frozenset((408, 425, 429, 500, 502, 503, 504))


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """`attempts` in all, exponential backoff from `base` seconds up to `cap`, with jitter.

    A Retry-After above `max_retry_after` seconds is not waited for. `mirror_attempts` is for a host that has another
    one behind it: going on is better than waiting.
    """

    attempts: int = 5
    mirror_attempts: int = 2
    base: float = 0.2
    cap: float = 8.0
    max_retry_after: float = 30.0

    def backoff(self, failures: int, random: float) -> float:
        """Seconds to wait after the `failures`-th failure (from 1); half of it is chance, so that nodes spread out."""
        return float(min(self.cap, self.base * 2 ** min(failures - 1, 16)) * (0.5 + 0.5 * random))


class BusyError(RegistryError):
    """A retryable answer that says when to come back: `after` seconds, or None."""

    def __init__(
        self, message: str, *, hint: str | None = None, status: int | None = None, after: float | None = None
    ) -> None:
        super().__init__(message, hint=hint, retryable=True, status=status)
        self.after = after


def retry_after(value: str | None, hooks: Hooks) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110 10.2.3: seconds or an HTTP date), or None."""
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    if not text or len(text) > 64:
        return None
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - hooks.wall())
    except (ValueError, TypeError, OverflowError):
        return None


def pause(policy: RetryPolicy, hooks: Hooks, failures: int, error: RegistryError, deadline: float | None) -> bool:
    """Wait as long as `error` and the policy ask for. False when that is too long: give up now instead."""
    wait = policy.backoff(failures, hooks.random())
    after = error.after if isinstance(error, BusyError) else None
    if after is not None:
        if after > policy.max_retry_after:
            return False
        wait = after + 0.1 * wait
    if deadline is not None and hooks.clock() + wait >= deadline:
        return False
    hooks.sleep(wait)
    return True
