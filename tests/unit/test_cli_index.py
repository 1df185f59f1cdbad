"""`clip-shim index`, `inspect` and `verify` as people and scripts run them."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shim.cli.inspect import escape, list_tree
from shim.goclip import files
from shim.index import codec
from shim.index.merge import TreeMerger
from tests.support.ocitar import CHR, DIR, SYM, Entry, gzip_bytes, tar
from tests.support.proxy import Proxy
from tests.support.registry import Registry, sha256
from tests.support.smallimage import noise, text

LAYER = tar(
    [
        Entry(b"usr", DIR, 0o755),
        Entry(b"usr/tool", mode=0o4755, data=text(1, 400_000), xattrs={"security.capability": b"\1\2"}),
        Entry(b"bin", SYM, 0o777, target=b"usr"),
        Entry(b"null", CHR, 0o666, device=(1, 3)),
        Entry(b"a\nb\x1b[2J\xff\\", uid=5, gid=6, mtime=1_600_000_000_000_000_007),
    ]
)
KEYS = ["image", "digest", "platform", "layers", "entries", "image_bytes", "index_bytes", "seek_points"]


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as running:
        running.push_image("team/app", "1.0", [gzip_bytes(LAYER)])
        big = [gzip_bytes(tar([Entry(b"big%d" % n, data=noise(n, 12_000_000))]), 1) for n in range(4)]
        running.push_image("big", "v1", big)
        yield running


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    home = tmp_path / "home"
    home.mkdir()
    return {"PATH": os.environ["PATH"], "HOME": str(home), "CLIP_SHIM_STATE_DIR": str(tmp_path / "state")}


def command(*args: str | Path) -> list[str | Path]:
    return [sys.executable, "-m", "shim", *args]


def clip(env: dict[str, str], cwd: Path, *args: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(*args), cwd=cwd, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, (args, done.returncode, done.stdout, done.stderr)
    return done


def facts(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(done.stdout)
    return loaded


def test_index_inspect_verify(registry: Registry, env: dict[str, str], tmp_path: Path) -> None:
    ref = registry.ref("team/app", "1.0")
    done = clip(env, tmp_path, "index", ref)
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"app_1.0.clip: {ref} linux/amd64, 6 entries, 1 layers, ")
    found = facts(clip(env, tmp_path, "inspect", "app_1.0.clip", "--json"))
    size = (tmp_path / "app_1.0.clip").stat().st_size
    assert list(found) == KEYS
    assert found == {
        "image": ref,
        "digest": sha256(registry.get("/v2/team/app/manifests/1.0", "team/app")[1]),
        "platform": "linux/amd64",
        "layers": 1,
        "entries": 6,
        "image_bytes": len(gzip_bytes(LAYER)),
        "index_bytes": size,
        "seek_points": 1,
    }
    assert clip(env, tmp_path, "inspect", "app_1.0.clip").stdout.splitlines()[0] == f"image        {ref}"
    assert "equal to" in clip(env, tmp_path, "verify", "app_1.0.clip").stdout
    answer = facts(clip(env, tmp_path, "verify", "app_1.0.clip", "--json"))
    assert answer == {"image": ref, "digest": found["digest"], "ok": True, "differences": []}


def test_index_json_output_and_options(registry: Registry, env: dict[str, str], tmp_path: Path) -> None:
    ref = registry.ref("big", "v1")
    few, many = tmp_path / "few", tmp_path / "many"
    one = facts(clip(env, tmp_path, "index", ref, "-o", few, "--json", "--checkpoint-mib", "8"))
    two = facts(
        clip(env, tmp_path, "index", "--checkpoint-mib", "1", "--platform", "linux/amd64", ref, "-o", many, "--json")
    )
    assert list(one) == [*KEYS, "file", "seconds"]
    assert one["file"] == str(few)
    assert two["seek_points"] > one["seek_points"] >= 4
    assert codec.read_index(many).checkpoint_mib == 1
    digest = one["digest"]
    clip(env, tmp_path, "index", f"{registry.host}/big@{digest}")
    assert (tmp_path / f"big_{digest[7:19]}.clip").is_file()


def test_index_for_go_clip(registry: Registry, env: dict[str, str], tmp_path: Path) -> None:
    """Both readers find their own part, and the index is the one that a native file holds."""
    ref = registry.ref("team/app", "1.0")
    done = clip(env, tmp_path, "index", ref, "--format", "clip", "-o", "both.clip")
    assert "Go clip will not see 1 of the names" in done.stderr
    clip(env, tmp_path, "index", ref, "-o", "own.clip")
    both, own = (tmp_path / "both.clip").read_bytes(), (tmp_path / "own.clip").read_bytes()
    assert both.endswith(own)
    assert files.is_go(both)
    (tmp_path / "foreign.clip").write_bytes(both[: -len(own)])
    shown = facts(clip(env, tmp_path, "inspect", "both.clip", "--json"))
    foreign = facts(clip(env, tmp_path, "inspect", "foreign.clip", "--json"))
    assert list(foreign)[: len(KEYS)] == KEYS
    assert (foreign["image"], foreign["digest"]) == (shown["image"], shown["digest"])
    assert foreign["format"] == "clip v2 index"
    assert any("setuid" in line for line in foreign["lacks"])
    lines = clip(env, tmp_path, "inspect", "foreign.clip").stdout
    assert "lacks        restart points" in lines
    assert "hint: " in clip(env, tmp_path, "inspect", "foreign.clip", "--tree", code=2).stderr


def test_an_index_that_is_there_is_replaced_at_once(registry: Registry, env: dict[str, str], tmp_path: Path) -> None:
    target = tmp_path / "x.clip"
    target.write_text("old")
    clip(env, tmp_path, "index", registry.ref("team/app", "1.0"), "-o", target)
    assert codec.read_index(target).image == registry.ref("team/app", "1.0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "x.clip"]


def test_what_is_refused_writes_nothing(registry: Registry, env: dict[str, str], tmp_path: Path) -> None:
    ref = registry.ref("team/app", "1.0")
    (tmp_path / "dir").mkdir()
    (tmp_path / "layout").mkdir()
    os.mkfifo(tmp_path / "fifo")
    before = sorted(tmp_path.rglob("*"))
    for args, code, said in (
        ([ref, "-o", "dir"], 2, "is a directory"),
        ([ref, "-o", "fifo"], 2, "not a regular file"),
        ([ref, "-o", "no/such/x.clip"], 2, "there is no directory"),
        ([ref, "--push", "ftp://b/k"], 2, "no URL of a store"),
        ([ref, "--format", "other"], 2, "invalid choice"),
        ([ref, "--checkpoint-mib", "0"], 2, "1 to 64"),
        ([ref, "--checkpoint-mib", "65"], 2, "1 to 64"),
        ([ref, "--platform", "nonsense"], 2, "nonsense"),
        ([ref, "--platform", "linux/s390x"], 1, "linux/s390x"),
        (["./layout"], 2, "local path"),
        ([str(tmp_path / "layout")], 2, "local path"),
        (["oci:layout"], 2, "registry reference is needed"),
        (["docker-archive:x.tar"], 2, "registry reference is needed"),
        ([registry.ref("team/app", "none")], 1, "manifest"),
        (["127.0.0.1:1/x:y"], 1, "127.0.0.1:1"),
    ):
        done = clip(env, tmp_path, "index", *args, code=code)
        assert done.stdout == ""
        assert done.stderr.startswith("error: "), done.stderr
        assert said in done.stderr.splitlines()[0], done.stderr
        assert "\nhint: " in done.stderr
        assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_files_that_are_no_index_are_refused(env: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "junk").write_bytes(b"\x89CLIP" + bytes(100))
    (tmp_path / "empty").write_bytes(b"")
    for verb in ("inspect", "verify"):
        for name in ("junk", "empty", "none", "home"):
            done = clip(env, tmp_path, verb, name, code=1)
            assert done.stderr.startswith("error: ")
            assert "Traceback" not in done.stderr
    assert "do not go together" in clip(env, tmp_path, "inspect", "junk", "--tree", "--json", code=2).stderr


def test_verify_says_what_differs(registry: Registry, env: dict[str, str], tmp_path: Path) -> None:
    target = tmp_path / "x.clip"
    clip(env, tmp_path, "index", registry.ref("team/app", "1.0"), "-o", target)
    index = codec.read_index(target)
    dict(index.tree.walk())[b"/usr/tool"].mode = 0o100755
    codec.write_index(target, index)
    done = clip(env, tmp_path, "verify", target, code=1)
    assert done.stdout == f"{target}: /usr/tool: mode is -rwxr-xr-x in the index and -rwsr-xr-x in the registry\n"
    answer = facts(clip(env, tmp_path, "verify", target, "--json", code=1))
    assert (answer["ok"], len(answer["differences"])) == (False, 1)

    index = codec.read_index(target)
    index.digest = sha256(b"gone")
    codec.write_index(target, index)
    answer = facts(clip(env, tmp_path, "verify", target, "--json", code=1))
    assert not answer["ok"]
    assert "gone" in answer["differences"][0] or index.digest[:15] in answer["differences"][0]


def test_the_tree_is_listed_without_harm_to_a_terminal(registry: Registry, env: dict[str, str], tmp_path: Path) -> None:
    clip(env, tmp_path, "index", registry.ref("team/app", "1.0"))
    latin = env | {"LC_ALL": "C", "PYTHONIOENCODING": "latin-1"}
    for listing in (clip(e, tmp_path, "inspect", "--tree", "app_1.0.clip").stdout for e in (env, latin)):
        lines = listing.splitlines()
        assert [line.split()[5] for line in lines] == [
            "/", "/a\\nb\\x1b[2J\\xff\\\\", "/bin", "/null", "/usr", "/usr/tool"
        ]  # fmt: skip
        assert lines[1] == ("-rw-r--r--   1 5:6          0 2020-09-13T12:26:40.000000007 /a\\nb\\x1b[2J\\xff\\\\")
        assert lines[2].endswith("/bin -> usr")
        assert lines[3].startswith("crw-rw-rw-   1 0:0        1,3 ")
        assert lines[5].startswith("-rwsr-xr-x   1 0:0     400000 ")
        assert lines[5].endswith("/usr/tool [security.capability=0102]")


def test_escapes_are_unambiguous() -> None:
    assert escape("größe".encode()) == "größe"
    assert escape(b"\\xff") == "\\\\xff"
    assert escape(b"\xff\x7f\t") == "\\xff\\x7f\\t"
    assert [line[:18] for line in list_tree(TreeMerger().finish())] == ["drwxr-xr-x   2 0:0"]


def test_a_bar_on_a_terminal(registry: Registry, env: dict[str, str], tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    said: list[bytes] = []

    def read() -> None:
        while True:
            try:
                said.append(os.read(ours, 4096))
            except OSError:  # EIO: the other side is closed
                return

    reader = threading.Thread(target=read)
    process = subprocess.Popen(
        command("index", registry.ref("big", "v1")), cwd=tmp_path, env=env, stderr=theirs, stdout=subprocess.PIPE
    )
    os.close(theirs)
    reader.start()
    out = process.communicate(timeout=60)[0]
    reader.join(10)
    os.close(ours)
    assert process.returncode == 0
    assert b"indexing" in b"".join(said)
    assert b"%|" in b"".join(said)
    assert out.count(b"\n") == 1


def test_ctrl_c_leaves_nothing(registry: Registry, env: dict[str, str], tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    said = b""
    with Proxy(registry.host) as proxy:
        proxy.stall(after=24_000_000)  # half of it
        process = subprocess.Popen(
            command("index", f"{proxy.address}/big:v1"), cwd=tmp_path, env=env, stderr=theirs, stdout=subprocess.PIPE
        )
        os.close(theirs)
        while b"indexing" not in said:  # the bar: layers are being streamed
            said += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        out = process.communicate(timeout=20)[0]
    while True:
        try:
            said += os.read(ours, 4096)
        except OSError:
            break
    os.close(ours)
    assert (process.returncode, out) == (130, b"")
    assert b"interrupted" in said
    assert b"Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]
