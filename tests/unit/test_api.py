"""The Python API of build workers: what each call gives, raises and leaves behind."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim import api, settings
from shim.errors import (
    AbsentError,
    ImageReferenceError,
    LayerError,
    NotFoundError,
    RegistryError,
    StoreError,
    UsageError,
)
from shim.index import build as index_build
from shim.index import codec
from shim.registry.ref import ImageRef
from shim.settings import Settings
from shim.stores.oci import OciStore
from tests.support.ocitar import Entry, gzip_bytes, tar
from tests.support.registry import Registry, make_client
from tests.support.smallimage import noise

DATA = noise(3, 5 << 20)
LAYER = gzip_bytes(tar([Entry(b"usr/tool", mode=0o4755, data=DATA), Entry(b"usr/other", data=b"x")]))


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as running:
        running.push_image("app", "v1", [LAYER])
        running.push_image("broken", "v1", [LAYER[:-2000]], diff_ids=["sha256:" + "0" * 64])
        yield running


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_SHIM_CONFIG", os.devnull)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()


def test_index_push_pull(registry: Registry, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    ref = registry.ref("app", "v1")
    made = api.create_from_oci_image(
        image_ref=ref,
        output_path=tmp_path / "a.clip",
        checkpoint_mib=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert (made.image, made.layers, made.entries) == (ref, 1, 4)
    assert made.index_bytes == (tmp_path / "a.clip").stat().st_size
    assert made.seek_points >= 5
    assert seen[-1] == (made.image_bytes, made.image_bytes)
    assert codec.read_index(tmp_path / "a.clip").digest == made.digest
    url = api.push(tmp_path / "a.clip", f"oci://{registry.host}/app")
    found = api.pull(url, tmp_path / "b.clip")
    assert (found.kind, found.image) == ("index", f"{ref}@{made.digest}")
    assert (tmp_path / "b.clip").read_bytes() == (tmp_path / "a.clip").read_bytes()


def test_errors_have_their_type_and_leave_nothing(registry: Registry, tmp_path: Path) -> None:
    out = tmp_path / "x.clip"
    with pytest.raises(ImageReferenceError, match="registry reference"):
        api.create_from_oci_image("./local", out)
    with pytest.raises(NotFoundError):
        api.create_from_oci_image(registry.ref("app", "none"), out)
    with pytest.raises(LayerError):
        api.create_from_oci_image(registry.ref("broken", "v1"), out)
    with pytest.raises(RegistryError):
        api.create_from_oci_image("127.0.0.1:1/x:y", out)
    with pytest.raises(StoreError):
        api.create_from_oci_image(registry.ref("app", "v1"), tmp_path / "none" / "x.clip")
    with pytest.raises(AbsentError):
        api.pull(f"oci://{registry.host}/app:none", out)
    with pytest.raises(UsageError):
        api.push(tmp_path / "none", "gopher://x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tmp"]


def test_settings_that_are_given_are_the_ones_used(registry: Registry, tmp_path: Path) -> None:
    """Nothing of the machine's own, and nothing that is kept between calls."""
    loaded = settings.load()
    wrong = Settings({**loaded.values, "registries": {registry.host: {"host": "127.0.0.1:1"}}}, loaded.source)
    with pytest.raises(RegistryError):
        api.create_from_oci_image(registry.ref("app", "v1"), tmp_path / "x.clip", settings=wrong)
    assert api.create_from_oci_image(registry.ref("app", "v1"), tmp_path / "x.clip").entries == 4


def test_build_stores_an_index(registry: Registry, tmp_path: Path) -> None:
    built = api.build(registry.ref("app", "v1"), f"{tmp_path}/store/")
    assert (built.kind, built.reason, built.image) == ("index", "", registry.ref("app", "v1"))
    assert Path(built.url.removeprefix("file://")).stat().st_size == built.bytes
    assert list((tmp_path / "tmp").iterdir()) == []


def test_build_makes_an_archive_of_what_cannot_be_indexed(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LayerError("no index, on purpose")

    monkeypatch.setattr(index_build, "build_index", fail)
    built = api.build(registry.ref("app", "v1"), f"{tmp_path}/store/")
    assert (built.kind, built.reason) == ("archive", "no index, on purpose")
    assert built.bytes > len(DATA)
    assert built.url.endswith("-archive.clip")
    beside = api.build(registry.ref("app", "v1"), f"oci://{registry.host}/app")
    assert beside.kind == "archive"
    client = make_client(tmp_path)
    out = io.BytesIO()
    assert OciStore(client).find_archive(ImageRef(registry.host, "app", "v1", beside.digest), out)
    assert len(out.getvalue()) == beside.bytes
    assert api.pull(beside.url, tmp_path / "a.clip").kind == "archive"
    with pytest.raises(LayerError, match=r"on purpose \(and no archive: "):
        api.build(registry.ref("broken", "v1"), f"{tmp_path}/store/")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_build_on_the_command_line(registry: Registry, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "shim", "build", registry.ref("app", "v1")]
    done = subprocess.run(
        [*command, "--store", f"{tmp_path}/store/", "--json"], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert list(found) == ["kind", "url", "image", "digest", "platform", "bytes", "reason", "seconds"]
    assert found["kind"] == "index"
    done = subprocess.run([*command, "--store", "gopher://x"], capture_output=True, text=True)
    assert done.returncode == 2
