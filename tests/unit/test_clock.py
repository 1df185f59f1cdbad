"""When ages can be believed: clocks that go ahead, and back, and machines that were off."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from shim.cache import clock
from shim.cache.clock import Look, believed

DAY = 86400.0
MAX_AGE = 30 * DAY
LAST = Look(wall=1000 * DAY, up=10 * DAY, boot="a", believed=900 * DAY)


@pytest.mark.parametrize(
    ("wall", "up", "boot", "from_now"),
    [
        (0.003, 0.003, "a", False),
        (100, 100, "a", False),  # no cleaner ran for long, or the machine slept
        (10, 0, "a", False),  # an error that does little harm
        (100, 0.003, "a", True),
        (20_000, 0.003, "a", True),  # 1970, and then the network came
        (-200, 0.003, "a", False),
        (10, 0.1, "b", False),  # off for ten days
        (40, 0.1, "b", True),
        (40, 30, "b", False),  # up for most of it
    ],
)
def test_ages_count_from(wall: float, up: float, boot: str, from_now: bool) -> None:
    """wall, up: days on each clock since the last look; up: since boot if that is another."""
    now = Look(LAST.wall + wall * DAY, up * DAY + (LAST.up if boot == LAST.boot else 0), boot)
    before = LAST.believed if LAST.believed <= now.wall else 0.0
    assert believed(LAST, now, MAX_AGE) == (now.wall if from_now else before)


def test_a_clock_set_back_was_wrong_before() -> None:
    ahead = Look(5000 * DAY, 11 * DAY, "a", believed=5000 * DAY)
    assert believed(ahead, Look(1001 * DAY, 12 * DAY, "a"), MAX_AGE) == 0.0


HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "\0",
        '{"wall": "x", "up": 2, "boot": "x", "believed": 3}',
        f'{{"wall": {HUGE}, "up": 2, "boot": "x", "believed": 3}}',
    ],
)
def test_a_note_that_was_destroyed_makes_nothing_old(tmp_path: Path, text: str) -> None:
    """It may have said that the clock went ahead."""
    (tmp_path / "clock").write_text(text)
    before = time.time()
    assert before <= clock.look(tmp_path, MAX_AGE, note=False) <= time.time()
    assert (tmp_path / "clock").read_text() == text
    since = clock.look(tmp_path, MAX_AGE, note=True)
    assert before <= since <= time.time()
    assert clock.look(tmp_path, MAX_AGE, note=True) == since


def test_a_note_nested_too_deeply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(_text: bytes) -> None:  # a real one lets finalizers of other tests' objects run out of stack too
        raise RecursionError

    (tmp_path / "clock").write_text("[[")
    monkeypatch.setattr(clock.json, "loads", loads)
    before = time.time()
    assert clock.look(tmp_path, MAX_AGE, note=False) >= before


def test_where_nothing_can_be_noted(tmp_path: Path) -> None:
    assert clock.look(tmp_path / "none", MAX_AGE, note=True) == 0.0


def test_a_jump_is_remembered(tmp_path: Path) -> None:
    clock.look(tmp_path, MAX_AGE, note=True)
    note, is_damaged = clock._read(tmp_path / "clock")
    assert note is not None
    assert not is_damaged
    clock._write(tmp_path / "clock", Look(note.wall - 100 * DAY, note.up, note.boot))
    since = clock.look(tmp_path, MAX_AGE, note=True)
    assert time.time() - 60 < since <= time.time()
    assert clock.look(tmp_path, MAX_AGE, note=True) == since
