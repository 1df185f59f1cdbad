"""config.json: what is read is written back as it was, and nothing but our keys changes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.errors import BundleError
from shim.runtime import jsontext
from shim.runtime.bundle import Bundle
from shim.runtime.jsontext import Number

ODD = """{
  "ociVersion": "1.0.2",
  "zebra": {"unknown": [1, null, true, false, {}, []]},
  "root": {"path": "rootfs", "readonly": true},
  "linux": {"resources": {"memory": {"limit": 18446744073709551615, "min": -9223372036854775808}},
            "ratio": 1.10, "big": 1e400, "exact": 0.1234567890123456789012345},
  "annotations": {"z": "\\u0000\\ud83d\\ude00\\ud800 ünï", "a": "</script>\\n"},
  "hooks": null
}"""


def write(directory: Path, text: str | bytes = ODD) -> Bundle:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return Bundle(str(directory))


def test_what_we_do_not_know_survives(tmp_path: Path) -> None:
    bundle = write(tmp_path)
    bundle.annotate({"io.clip.image": "x"})
    bundle.add_poststop({"path": "/hook"})
    written = bundle.write().decode()
    before = json.loads(ODD, parse_float=lambda text: ("number", text))
    after = json.loads(written, parse_float=lambda text: ("number", text))
    assert after["annotations"].pop("io.clip.image") == "x"
    assert after.pop("hooks") == {"poststop": [{"path": "/hook"}]}
    before.pop("hooks")
    assert after == before
    assert list(json.loads(written)) == list(json.loads(ODD))
    assert "18446744073709551615" in written
    assert "1.10" in written
    assert "1e400" in written
    assert "0.1234567890123456789012345" in written


def test_mode_and_owner_are_kept(tmp_path: Path) -> None:
    bundle = write(tmp_path)
    path = tmp_path / "config.json"
    path.chmod(0o640)
    if os.getuid() == 0:
        os.chown(path, 7, 8)
    before = path.stat()
    Bundle(str(tmp_path)).write()
    after = path.stat()
    assert (stat.S_IMODE(after.st_mode), after.st_uid, after.st_gid) == (0o640, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino  # replaced, not rewritten in place
    assert os.listdir(tmp_path) == ["config.json"]
    assert bundle.path == str(path)


def test_symlinked_configuration_stays_a_link(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    write(real)
    bundle_dir = tmp_path / "bundle"
    bundle_dir.mkdir()
    (bundle_dir / "config.json").symlink_to(real / "config.json")
    bundle = Bundle(str(bundle_dir))
    bundle.annotate({"io.clip.x": "1"})
    bundle.write()
    assert (bundle_dir / "config.json").is_symlink()
    assert json.loads((real / "config.json").read_text())["annotations"]["io.clip.x"] == "1"


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(BundleError, match="cannot be rewritten"):
        bundle.write()
    assert (tmp_path / "config.json").read_text() == ODD
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("kind", ["fifo", "directory", "missing", "device"])
def test_configuration_that_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/null")
    with pytest.raises((BundleError, OSError)):
        Bundle(str(tmp_path))


def test_configuration_that_has_no_end(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(BundleError, match="larger than 16 MiB"):
        Bundle(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b'{"a":}',
        b"{} x",
        b'{"a": "\xff"}',
        b"nul",
        b'{"a" 1}',
        b"[" * 100_000,
        b'{"root": {"path": "x"},}',
    ],
)
def test_bad_json_is_one_typed_error(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(BundleError):
        _ = write(tmp_path, text).spec


@pytest.mark.parametrize("text", ["{", '{"a":}', "[1,", '{"a" 1}', '"x'])
def test_bad_json_without_the_json_module(text: str) -> None:
    """In the wrapper `json` is not imported, and the C scanner then fails in a way of its own."""
    package = Path(__file__).parents[2]
    code = f"import sys; sys.path.append({str(package)!r})\nfrom shim.runtime import jsontext\n"
    code += f"try: jsontext.decode({text.encode()!r})\nexcept ValueError as error: print('caught', error)"
    done = subprocess.run([sys.executable, "-ISc", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("caught"), done.stderr


@pytest.mark.parametrize(
    "spec",
    [
        {"root": {}},
        {"root": {"path": ""}},
        {"root": {"path": 3}},
        {"root": {"path": "a\0b"}},
        {"root": []},
        {},
    ],
)
def test_no_usable_root(tmp_path: Path, spec: dict[str, object]) -> None:
    with pytest.raises(BundleError):
        _ = write(tmp_path, json.dumps(spec)).rootfs


def test_root_is_relative_to_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "b", json.dumps({"root": {"path": "../r/./fs"}}))
    monkeypatch.chdir(tmp_path / "b")
    assert Bundle("").rootfs == str(tmp_path / "r" / "fs")
    assert Bundle(".").directory == str(tmp_path / "b")
    write(tmp_path / "b", json.dumps({"root": {"path": "/abs"}}))
    assert Bundle("").rootfs == "/abs"


@pytest.mark.parametrize(
    ("linux", "shifted"),
    [
        ({}, False),
        (None, False),
        ({"namespaces": [{"type": "mount"}]}, False),
        ({"namespaces": [{"type": "user"}]}, True),
        ({"uidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}]}, True),
        ({"uidMappings": []}, False),
    ],
)
def test_user_namespaces_are_seen(tmp_path: Path, linux: object, shifted: bool) -> None:
    assert write(tmp_path, json.dumps({"linux": linux})).has_user_namespace is shifted


def test_hooks_are_added_and_dropped(tmp_path: Path) -> None:
    bundle = write(tmp_path, json.dumps({"hooks": {"poststop": [{"path": "/theirs"}]}}))
    bundle.add_poststop({"path": "/ours", "args": ["ours", "clip-poststop"]})
    assert len(bundle.spec["hooks"]["poststop"]) == 2
    bundle.drop_poststop("clip-poststop")
    assert bundle.spec["hooks"]["poststop"] == [{"path": "/theirs"}]


def test_environment_takes_the_last(tmp_path: Path) -> None:
    bundle = write(tmp_path, json.dumps({"process": {"env": ["A=1", 5, "AB=x", "A=2=3"]}}))
    assert bundle.environment("A") == "2=3"
    assert bundle.environment("B") is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_round_trip(value: object) -> None:
    text = jsontext.encode(value)
    assert text.isascii()
    assert json.loads(text) == value
    assert jsontext.encode(jsontext.decode(text.encode())) == text
    assert jsontext.encode(jsontext.decode(json.dumps(value, indent=2).encode())) == text


def test_numbers_keep_their_text() -> None:
    value = jsontext.decode(b" [1.0, -0.0, 1E5, 1e-7, 12345678901234567890, -1] \n")
    assert all(isinstance(item, Number) for item in value[:4])
    assert jsontext.encode(value) == "[1.0,-0.0,1E5,1e-7,12345678901234567890,-1]"


def test_byte_order_mark() -> None:
    assert jsontext.decode(b"\xef\xbb\xbf{}") == {}
