"""What is judged is what is used: an index file is a tenant's, who may change it at any moment."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from shim import settings
from shim.daemon import indexfile
from shim.daemon.eager import Eager
from shim.daemon.imagetree import Files, ImageTree
from shim.daemon.layers import Layers
from shim.daemon.plan import Plan, Request
from shim.daemon.resolve import Resolver
from shim.daemon.trees import Trees
from shim.daemon.trust import Trust
from shim.errors import IndexFormatError, TrustError
from shim.index import codec
from shim.registry.ref import ImageRef
from shim.settings import Settings
from shim.stores.base import name_of
from tests.support.indexes import sample

GOOD, BAD = "good.example.com/team/app:1", "evil.example.com/team/app:1"


class KeptTrees(Trees):
    """Trees that are mounted by keeping their index."""

    used: Files

    def _mount(self, tree: ImageTree, files: Files, *_: Any) -> dict[str, Any]:
        self.used = files
        kept = self._state / tree.hex
        indexfile.keep(files.index, tree.hex, kept)
        return {"image": codec.read_index(kept / "index.clip").image, "symlinks": {}, "dirs": [], "layers": []}


@pytest.fixture
def config(tmp_path: Path) -> Settings:
    loaded = settings.load(env={"CLIP_SHIM_CONFIG": os.devnull})
    own = {
        "state_dir": tmp_path / "state",
        "run_dir": tmp_path / "run",
        "fallback": ("lazy",),
        "trust.sources": {"annotation": {"registries": ["good.example.com"]}},
    }
    (tmp_path / "state").mkdir()
    return Settings({**loaded.values, **own}, loaded.source)


@pytest.fixture
def trees(config: Settings) -> KeptTrees:
    layers = SimpleNamespace(confirm_archive=lambda *_: None)
    return KeptTrees(config, cast(Layers, layers), "/nowhere")


def index_of(image: str) -> bytes:
    index = sample()
    index.image = image
    return codec.encode(index)


def take(plan: Plan, fd: int) -> str:
    lease = plan.acquire(Request("annotation", "a.clip", fd, lambda _: None))
    lease.release()
    return str(lease.answer["image"])


def test_an_index_that_changes_after_it_was_judged(
    config: Settings, trees: KeptTrees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = index_of(GOOD), index_of(BAD)
    plan = Plan(config, Resolver(config), trees, cast(Eager, None))
    file = tmp_path / "a.clip"
    file.write_bytes(bad)
    with open(file, "rb") as opened:
        with pytest.raises(TrustError, match="evil"):
            take(plan, opened.fileno())
        file.write_bytes(good)
        judge = Trust.check_registry

        def judge_and_swap(self: Trust, source: str, image: ImageRef) -> None:
            judge(self, source, image)
            file.write_bytes(bad)

        with monkeypatch.context() as patched:
            patched.setattr(Trust, "check_registry", judge_and_swap)
            with pytest.raises(IndexFormatError, match="changed while it was read"):
                take(plan, opened.fileno())
        assert list((tmp_path / "state" / "trees").iterdir()) == []

        file.write_bytes(good)
        assert take(plan, opened.fileno()) == GOOD
        with monkeypatch.context() as patched:
            patched.setattr(Trust, "check_registry", judge_and_swap)
            assert take(plan, opened.fileno()) == GOOD, "its copy is kept: what the file has become does not matter"


def test_a_hot_start_reads_no_index(
    config: Settings, trees: KeptTrees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(config, Resolver(config), trees, cast(Eager, None))
    file = tmp_path / "a.clip"
    file.write_bytes(index_of(GOOD))
    monkeypatch.setattr(indexfile, "_SETTLED_NS", -(10**9))  # as if nobody had touched it for a while
    with open(file, "rb") as opened:
        assert take(plan, opened.fileno()) == GOOD
        monkeypatch.setattr(indexfile, "_pieces", lambda *_: pytest.fail("it was read again"))
        assert take(plan, opened.fileno()) == GOOD


def test_an_index_that_is_kept_too_is_no_other(config: Settings, trees: KeptTrees, tmp_path: Path) -> None:
    """Also behind the data of its archive: it is the index that is compared, not the file."""
    eager = SimpleNamespace(fill=None)
    resolver = Resolver(config)
    plan = Plan(Settings({**config.values, "fallback": ("eager",)}, config.source), resolver, trees, cast(Eager, eager))
    given, kept = tmp_path / "a.clip", tmp_path / "b.clip"
    given.write_bytes(bytes(1 << 20) + index_of(GOOD))
    kept.write_bytes(index_of(GOOD))
    with open(given, "rb") as opened:
        resolver.indexes.local.put(name_of(resolver.indexes.identify(kept).ref), kept)
        assert take(plan, opened.fileno()) == GOOD
        assert trees.used.index == opened.fileno()
