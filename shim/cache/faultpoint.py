"""Named points in the code at which tests make a race or a failure happen. Nothing in production.

Points: "publish.write" (before a span is written), "publish.set" (written, not yet visible), "read.copied" (bytes read,
not yet checked again), "drop.cleared" (bits cleared, hole not yet punched), "fetch.open" (before a range is requested),
"fetch.failed" (before the waiters hear of an error), "flush.sync" (before data is synced), "flush.synced" (data on
disk, bitmap not yet),
"discard.begin", "discard.renamed", "discard.deleted" (a directory that is removed).
"""

from __future__ import annotations

from collections.abc import Callable

hook: Callable[[str], None] | None = None


def fault(name: str) -> None:
    """Call the test's hook, if there is one; it may wait, or raise."""
    if hook is not None:
        hook(name)
