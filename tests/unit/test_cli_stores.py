"""`clip-shim push`, `pull` and `index --push` as people and scripts run them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.registry import Registry
from tests.unit.test_cli_index import LAYER, clip, env, facts, gzip_bytes

__all__ = ["env"]


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as running:
        for name in ("team/app", "team/bare"):
            running.push_image(name, "1.0", [gzip_bytes(LAYER)])
        yield running


def test_an_index_goes_beside_its_image_and_comes_back(registry: Registry, env: dict[str, str], tmp_path: Path) -> None:
    ref = registry.ref("team/app", "1.0")
    base = f"oci://{registry.host}/team/app"
    made = facts(clip(env, tmp_path, "index", ref, "--push", base, "--json"))
    assert made["url"].startswith(f"{base}@sha256:")
    assert "file" not in made
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    done = clip(env, tmp_path, "pull", f"{base}:1.0")
    assert done.stdout.startswith(f"app_1.0.clip: index of {ref}@sha256:")
    assert facts(clip(env, tmp_path, "inspect", "app_1.0.clip", "--json"))["digest"] == made["digest"]
    pushed = facts(clip(env, tmp_path, "push", "app_1.0.clip", f"{tmp_path}/store/", "--json"))
    assert pushed["bytes"] == made["index_bytes"]
    assert facts(clip(env, tmp_path, "pull", pushed["url"], "-o", "again.clip", "--json"))["kind"] == "index"
    assert (tmp_path / "again.clip").read_bytes() == (tmp_path / "app_1.0.clip").read_bytes()


def test_what_is_refused_writes_nothing(registry: Registry, env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no index")
    before = sorted(tmp_path.rglob("*"))
    for args, code, said in (
        (["push", "text", f"{tmp_path}/store/"], 1, "neither a clip index nor a clip archive"),
        (["push", "none", f"{tmp_path}/store/"], 1, "No such file"),
        (["push", "text", "gopher://x"], 2, "no URL of a store"),
        (["pull", f"oci://{registry.host}/team/bare:1.0"], 1, "no index is attached"),
        (["pull", f"{tmp_path}/text", "-o", "new.clip"], 1, "neither a clip index nor a clip archive"),
        (["pull", "s3://bucket/prefix/", "-o", "new.clip"], 2, "is a store"),
    ):
        done = clip(env, tmp_path, *args, code=code)
        assert said in done.stderr.splitlines()[0], done.stderr
    assert sorted(tmp_path.rglob("*")) == before
