"""Every error says what to do, and survives a trip between processes."""

from __future__ import annotations

import pickle

import pytest

from shim import errors


def all_errors() -> list[type[errors.ShimError]]:
    found, todo = [], [errors.ShimError]
    while todo:
        cls = todo.pop()
        found.append(cls)
        todo += cls.__subclasses__()
    return found


@pytest.mark.parametrize("cls", all_errors())
def test_each_has_a_hint_a_docstring_and_an_exit_code(cls: type[errors.ShimError]) -> None:
    assert cls.__doc__
    assert cls("what").hint
    assert cls.exit_code in (1, 2)


@pytest.mark.parametrize("cls", all_errors())
def test_each_can_be_pickled_with_its_hint(cls: type[errors.ShimError]) -> None:
    back = pickle.loads(pickle.dumps(cls("what", hint="do this")))
    assert type(back) is cls
    assert str(back) == "what"
    assert back.hint == "do this"
