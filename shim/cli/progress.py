"""Progress of long work: a bar on a terminal, now and then a plain line elsewhere. Both on standard error."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any, Self

_LINE_EVERY = 5.0  # seconds between plain lines


class Progress:
    """`update` is a `shim.index.build.Progress`. Use it in a `with` block, so that the bar is wiped at the end."""

    def __init__(self, label: str, *, quiet: bool = False) -> None:
        self._label = label
        self._quiet = quiet
        self._bar: Any = None
        self._terminal = sys.stderr.isatty()
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, layer: int, done: int, total: int) -> None:  # noqa: ARG002
        """`done` of `total` bytes."""
        if self._quiet:
            return
        if self._terminal:
            if self._bar is None:
                from tqdm import tqdm

                sized = all(os.get_terminal_size(sys.stderr.fileno()))  # not always so: some give terminals no size
                self._bar = tqdm(
                    total=total,
                    desc=self._label,
                    unit="B",
                    unit_scale=True,
                    unit_divisor=1024,
                    leave=False,
                    ncols=None if sized else 80,
                    nrows=None if sized else 24,
                    file=sys.stderr,
                )
            if self._bar.total != total:  # the next image
                self._bar.reset(total)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() - self._said >= _LINE_EVERY:
            self._said = time.monotonic()
            print(f"{self._label}: {human(done)} of {human(total)}", file=sys.stderr, flush=True)


def human(size: float) -> str:
    """A size as people read it: 12.3 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
