"""Plain tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, right: str = "") -> list[str]:
    """Lines of a table whose columns are as wide as they need; `right`: the letter r for each column that is flushed
    right, in order, anything else for the others. The last column is not padded."""
    cells = [[_plain(str(cell)) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = []
    for row in cells:
        parts = [
            cell.rjust(width) if right[column : column + 1] == "r" else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(parts).rstrip())
    return lines


def _plain(text: str) -> str:
    """Names come from images and containers: nothing of them reaches the terminal but what can be seen."""
    return "".join(char if char.isprintable() else "?" for char in text)


def ago(seconds: float) -> str:
    """A duration as people say it: 42 s, 5 min, 3 h, 2 d."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
