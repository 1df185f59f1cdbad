"""From when on the ages of what is kept can be believed.

Time of last use is a file's time, by the wall clock. Should that go ahead by weeks, because it was wrong before (no
battery, and no network yet) or is wrong now, everything would be old at once and deleted. So each look of the cleaner
is noted by three clocks; if the wall clock went ahead much further than the time since boot accounts for, whatever was
used before counts as used now. A machine that was off for long is no different: nobody could have used anything.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from shim import log

_NAME = "clock"
_LEAST = 60.0


@dataclass(frozen=True, slots=True)
class Look:
    """wall: seconds since the epoch; up: since boot, suspended or not; boot: which boot that was; believed: what was
    used before this time counts as used then."""

    wall: float
    up: float
    boot: str
    believed: float = 0.0


def believed(last: Look | None, now: Look, max_age: float) -> float:
    """The new look's `believed`. An error of less than half of `max_age` takes only what would have gone soon."""
    if last is None:
        return 0.0
    passed = now.up - last.up if now.boot == last.boot else now.up
    if now.wall - last.wall - passed > max(max_age / 2, _LEAST):
        return now.wall
    return last.believed if last.believed <= now.wall else 0.0  # set back: it was wrong when we believed it


def look(directory: Path, max_age: float, *, note: bool) -> float:
    """Look at the clocks, note them in `directory` for the next look; returns `believed`."""
    last, is_damaged = _read(directory / _NAME)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    now = Look(time.time(), time.clock_gettime(time.CLOCK_BOOTTIME), boot)
    # a note that a power failure destroyed said something: nobody knows what, so nothing is old for now
    now = Look(now.wall, now.up, boot, now.wall if is_damaged else believed(last, now, max_age))
    if last is not None and now.believed == now.wall:
        log.warning("the clock went ahead: what is cached counts as used now", seconds=round(now.wall - last.wall))
    if note:
        _write(directory / _NAME, now)
    return now.believed


def _read(path: Path) -> tuple[Look | None, bool]:
    """The last look, if there is one, and whether what is there cannot be read."""
    try:
        note = json.loads(path.read_bytes())
        return Look(float(note["wall"]), float(note["up"]), str(note["boot"]), float(note["believed"])), False
    except FileNotFoundError:
        return None, False
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None, True


def _write(path: Path, now: Look) -> None:
    temporary = path.with_name(f"{_NAME}.tmp")
    try:
        with open(temporary, "w") as out:
            out.write(json.dumps(asdict(now)))
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except OSError:
        pass  # nothing can be deleted there either
