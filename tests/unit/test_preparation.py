"""What happens beside the making of a tree: its registry is asked, its layers are let go if it fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from shim.daemon import indexfile, jobs, preparation, prepare
from shim.daemon.imagetree import Files
from shim.daemon.layers import Layers
from shim.daemon.startprofiles import StartProfiles
from shim.errors import AuthError, CacheError, DaemonError, IndexFormatError

META = {"version": prepare.META_VERSION, "image": "r/i", "digest": "", "platform": "", "layers": []}
SHAPE: dict[str, Any] = {"symlinks": {}, "dirs": [], "probes": []}
WAIT = 20.0


class Node:
    """Stands in for the daemon's layers and profiles, and for the jobs; notes what is called, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, make_tree: Callable[[], dict[str, Any]]) -> None:
        self.calls: list[str] = []
        self.asked = threading.Event()
        self.answer: Callable[[], object] = lambda: None
        self._make_tree = make_tree
        monkeypatch.setattr(jobs, "run", self._run)
        monkeypatch.setattr(indexfile, "keep", lambda *_: True)

    def _run(self, _deadline: float, func: Callable[..., object], *_args: object) -> dict[str, Any]:
        return dict(META) if func is prepare.prepare_layers else self._make_tree()

    def add(self, *_args: object) -> None:
        self.calls.append("add")

    def begin(self, *_args: object) -> None:
        self.calls.append("profile")

    def confirm(self, *_args: object) -> None:
        self.asked.set()
        self.answer()
        self.calls.append("confirmed")

    def discard(self, _tree: str) -> None:
        self.calls.append("discard")

    def ready(self, directory: Path) -> tuple[dict[str, Any], preparation.Access]:
        layers, profiles, files = cast(Layers, self), cast(StartProfiles, self), Files(cast(Any, None), -1, -1)
        return preparation.ready(layers, profiles, "0f", directory, files, "erofs", 1e12)


def test_the_registry_is_asked_while_the_tree_is_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def make_tree() -> dict[str, Any]:
        assert node.asked.wait(WAIT), "nobody asked before the tree was made"
        return SHAPE

    node = Node(monkeypatch, make_tree)
    meta, access = node.ready(tmp_path)
    access.result()
    assert node.calls == ["add", "profile", "confirmed"]
    assert prepare.read_meta(tmp_path) == meta


def test_a_refusal_comes_when_it_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse() -> None:
        raise AuthError("no")

    node = Node(monkeypatch, lambda: SHAPE)
    node.answer = refuse
    _, access = node.ready(tmp_path)
    with pytest.raises(AuthError):
        access.result()


@pytest.mark.parametrize("error", [DaemonError("slow"), IndexFormatError("bad"), CacheError("full")])
def test_the_layers_are_let_go_when_no_tree_comes_but_not_while_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    def make_tree() -> dict[str, Any]:
        assert node.asked.wait(WAIT)
        failed.set()
        raise error

    failed = threading.Event()
    node = Node(monkeypatch, make_tree)
    node.answer = lambda: failed.wait(WAIT)
    with pytest.raises(type(error)):
        node.ready(tmp_path)
    assert node.calls == ["add", "profile", "confirmed", "discard"]
