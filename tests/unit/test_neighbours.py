"""Speculation keeps to its budget, and right guesses make room for more."""

from __future__ import annotations

import random

from shim.cache.neighbours import Neighbours


def test_the_first_guess_is_the_next_run() -> None:
    assert Neighbours(10).read(4) == [5]
    assert Neighbours(10).read(9) == [8]
    assert Neighbours(1).read(0) == []
    assert Neighbours(0).read(0) == []


def test_wrong_guesses_use_the_budget_up() -> None:
    chance = random.Random(1)
    layer = Neighbours(100_000)
    read = chance.sample(range(0, 100_000, 10), 400)  # no two beside each other: every guess is wrong
    guesses = [guess for run in read for guess in layer.read(run)]
    assert len(guesses) == len(set(guesses)) == 60


def test_right_guesses_cost_nothing() -> None:
    layer = Neighbours(1000)
    guessed: set[int] = set()
    missed = 0
    for run in range(500):
        missed += run not in guessed
        guessed.update(layer.read(run))
    assert missed == 1


def test_a_dropped_guess_makes_room() -> None:
    layer = Neighbours(100)
    (guess,) = layer.read(50)
    assert layer.read(70) == []
    layer.dropped(guess)
    assert layer.read(80) == [81]
