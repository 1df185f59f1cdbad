"""`install` and `uninstall` on files: merged, never replaced; refused where that is not safe; undone to the byte."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest

from shim.cli.main import main
from shim.install import containerd, docker
from shim.install.toml import TomlFile

PATH = "/opt/clip/libexec/clip-shim-runtime"
V2 = 'version = 2\n\n# site\n[plugins."io.containerd.grpc.v1.cri".cni]\n  bin_dir = "/usr/lib/cni" # Debian\n'
HANDLERS = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories of our own, and no engine that could be asked."""
    (tmp_path / "config.yaml").write_text("{}\n")
    monkeypatch.setenv("CLIP_SHIM_CONFIG", str(tmp_path / "config.yaml"))
    monkeypatch.setenv("CLIP_SHIM_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(containerd, "installed_version", lambda: (1, 7))
    monkeypatch.setattr(containerd, "_which", lambda *_: None)
    monkeypatch.setattr(docker, "SOCKET", str(tmp_path / "no.sock"))


def call(verb: str, engine: str, file: Path, *more: str) -> int:
    return main([verb, engine, "--config", str(file), "--runtime-path", PATH, *more])


def handlers(text: str, version: int) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = tomllib.loads(text)["plugins"][HANDLERS[version]]["containerd"]["runtimes"]
    return found


ENGINES = ("docker", "containerd", "podman", "crio")
BEFORE = {
    "docker": json.dumps({"features": {"buildkit": True}, "runtimes": {"kata": {"path": "/x"}}}, indent=2) + "\n",
    "containerd": V2,
    "podman": '# site\n[engine]\nruntime = "crun"  # not runc\n\n[engine.runtimes]\nmine = ["/usr/bin/mine"]\n',
    "crio": '# site settings\n[crio.runtime]\ndefault_runtime = "crun"\n',
}


@pytest.mark.parametrize("engine", ENGINES)
def test_install_merges_and_uninstall_undoes(engine: str, tmp_path: Path) -> None:
    file = tmp_path / "etc" / "file"
    file.parent.mkdir()
    file.write_text(BEFORE[engine])
    file.chmod(0o640)
    assert call("install", engine, file) == 0
    installed = file.read_text()
    assert PATH in installed
    for line in BEFORE[engine].splitlines():
        assert line.rstrip(",}") in installed  # comments and order are as they were
    assert file.stat().st_mode & 0o777 == 0o640
    assert (file.parent / "file.clip-shim.bak").read_text() == BEFORE[engine]
    assert (file.parent / "file.clip-shim.bak").stat().st_mode & 0o777 == 0o640
    assert call("uninstall", engine, file) == 0
    assert file.read_text() == BEFORE[engine]
    assert sorted(path.name for path in file.parent.iterdir()) == ["file", "file.clip-shim.bak"]


@pytest.mark.parametrize("engine", ENGINES)
def test_twice_is_once(engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "file"
    assert call("install", engine, file) == 0
    once, when = file.read_bytes(), file.stat().st_mtime_ns
    capsys.readouterr()
    assert call("install", engine, file) == 0
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (once, when)
    said = capsys.readouterr().out
    assert "already" in said
    assert "reload" not in said.replace("to be reloaded", "")
    assert not (file.parent / "file.clip-shim.bak").exists()


@pytest.mark.parametrize("engine", ENGINES)
def test_new_path_is_brought_up_to_date(engine: str, tmp_path: Path) -> None:
    """An upgrade that moved the launcher."""
    file = tmp_path / "file"
    assert main(["install", engine, "--config", str(file), "--runtime-path", "/old/clip-shim-runtime"]) == 0
    assert call("install", engine, file) == 0
    assert "/old/" not in file.read_text()
    assert PATH in file.read_text()


@pytest.mark.parametrize("engine", ENGINES)
def test_dry_run_shows_a_diff_and_changes_nothing(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text(BEFORE[engine])
    assert call("install", engine, file, "--dry-run") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"--- a{file}\n+++ b{file}\n@@")
    assert any(line.startswith("+") and PATH in line for line in out.splitlines())
    removed = [line for line in out.splitlines() if line.startswith("-") and not line.startswith("---")]
    assert removed == []
    assert file.read_text() == BEFORE[engine]
    assert list(tmp_path.glob("*.bak")) == []


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("verb", ["install", "uninstall"])
def test_what_is_not_valid_is_refused(
    verb: str, engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    text = '{"runtimes": {' if engine == "docker" else 'version = 2\n{{ template "base" . }}\n'
    file.write_text(text)
    assert call(verb, engine, file) == 1
    assert f"{file} is not valid" in capsys.readouterr().err
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "does not hold a JSON object"),
        ('{"runtimes": []}', "must be an object of objects"),
        ('{"debug": true, "debug": false}', "stands twice"),
        ('{"default-runtime": "clip", "runtimes": {"clip": {"path": "/x/clip-shim-runtime"}}}', "`default-runtime`"),
        ('{"runtimes": {"clip": {"path": "/usr/bin/other"}}}', "is another one: /usr/bin/other"),
    ],
)
def test_docker_refusals(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "daemon.json"
    file.write_text(text)
    verb = "uninstall" if "default" in message else "install"
    assert call(verb, "docker", file) == 1
    assert message in capsys.readouterr().err
    assert file.read_text() == text


def test_docker_keeps_the_files_form(tmp_path: Path) -> None:
    """Indentation, a byte order mark, the order of keys; other keys of an entry of ours."""
    file = tmp_path / "daemon.json"
    entry = {"path": "/old/clip-shim-runtime", "runtimeArgs": ["--debug"]}
    file.write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"z": 1, "runtimes": {"clip": entry}, "a": "é"}, indent="\t").encode()
    )
    assert call("install", "docker", file) == 0
    data = file.read_bytes()
    assert data.startswith(b'\xef\xbb\xbf{\n\t"z": 1')
    assert json.loads(data[3:]) == {"z": 1, "runtimes": {"clip": {**entry, "path": PATH}}, "a": "é"}


def test_name_of_the_runtime(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "daemon.json"
    assert call("install", "docker", file, "--runtime-name", "lazy") == 0
    assert list(json.loads(file.read_text())["runtimes"]) == ["lazy"]
    for name in ("runc", "Clip", "a/b", ""):
        assert call("install", "docker", file, "--runtime-name", name) == 1
    assert "cannot be the name" in capsys.readouterr().err


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "daemon.json").symlink_to("real.json")
    assert call("install", "docker", tmp_path / "daemon.json") == 0
    assert os.readlink(tmp_path / "daemon.json") == "real.json"
    assert PATH in (tmp_path / "real.json").read_text()


def test_containerd_1_keeps_its_default_runtime(tmp_path: Path) -> None:
    """In 1.x a table `runtimes` takes the place of the built-in one: pods without a class would not start any more."""
    file = tmp_path / "config.toml"
    file.write_text(V2)
    assert call("install", "containerd", file) == 0
    found = handlers(file.read_text(), 2)
    assert found["runc"] == {"runtime_type": "io.containerd.runc.v2"}
    assert found["clip"] == {
        "runtime_type": "io.containerd.runc.v2",
        "pod_annotations": ["io.clip.*"],
        "options": {"BinaryName": PATH},
    }


def test_containerd_copies_the_default_runtimes_options(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    table = f'plugins."{HANDLERS[3]}".containerd'
    file.write_text(
        f'version = 3\n[{table}]\ndefault_runtime_name = "mine"\n[{table}.runtimes.mine.options]\n'
        'SystemdCgroup = true\nBinaryName = "/usr/bin/mine"\nRoot = ""\n'
    )
    assert call("install", "containerd", file) == 0
    found = handlers(file.read_text(), 3)
    assert found["clip"]["options"] == {"SystemdCgroup": True, "BinaryName": PATH}
    assert set(found) == {"mine", "clip"}


@pytest.mark.parametrize("version", [(1, 7), (2, 0), (2, 1), None])
def test_containerd_drop_in_only_where_they_merge(
    version: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containerd, "installed_version", lambda: version)
    file = tmp_path / "config.toml"
    text = f'version = 3\nimports = ["{tmp_path}/conf.d/*.toml"]\n'
    file.write_text(text)
    drop_in = tmp_path / "conf.d" / "50-clip-shim.toml"
    assert call("install", "containerd", file) == 0
    assert drop_in.exists() == (version == (2, 1))
    assert (file.read_text() == text) == (version == (2, 1))
    assert containerd.configured(file)["clip"] == PATH
    if drop_in.exists():
        assert tomllib.loads(drop_in.read_text())["version"] == 3  # a higher one than the file's is refused
        assert call("install", "containerd", file) == 0
        assert call("uninstall", "containerd", file) == 0
        assert not drop_in.exists()
    assert file.read_text() == text or version != (2, 1)


def test_containerd_version_1_is_refused_with_the_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Docker's own packages ship such a file."""
    file = tmp_path / "config.toml"
    file.write_text('disabled_plugins = ["cri"]\n')
    assert call("install", "containerd", file) == 1
    err = capsys.readouterr().err
    assert "version 1" in err
    assert "hint: make it version 2: put `version = 2` first" in err


def test_containerd_without_its_cri_plugin_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.toml"
    file.write_text('version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n')
    assert call("install", "containerd", file) == 0
    assert "switches the CRI plugin off" in capsys.readouterr().err


def test_podman_keeps_who_supports_json(tmp_path: Path) -> None:
    """A list replaces an earlier one, so ours has all that was in it."""
    file = tmp_path / "containers.conf"
    file.write_text('[engine]\nruntime_supports_json = ["crun", "mine"]\n')
    assert call("install", "podman", file) == 0
    engine = tomllib.loads(file.read_text())["engine"]
    assert engine == {"runtime_supports_json": ["crun", "mine", "clip"], "runtimes": {"clip": [PATH]}}


CRIO = '[crio.runtime]\ndefault_runtime = "runc"\n[crio.runtime.runtimes.clip]\nruntime_path = "/usr/bin/other"\n'
PODMAN = '[engine]\nruntime = "runc"\n[engine.runtimes]\nclip = ["/usr/bin/other"]\n'


@pytest.mark.parametrize(
    ("engine", "other", "default"), [("crio", CRIO, "default_runtime"), ("podman", PODMAN, "runtime")]
)
def test_what_is_somebody_elses_or_the_default_stays(
    engine: str, other: str, default: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "site.conf"
    file.write_text(other)
    for verb in ("install", "uninstall"):
        assert call(verb, engine, file) == 1
        assert f"the runtime clip in {file} is another one: /usr/bin/other" in capsys.readouterr().err
        assert file.read_text() == other
    assert call("install", engine, file, "--force") == 0
    ours = file.read_text()
    assert PATH in ours
    file.write_text(ours.replace('"runc"', '"clip"', 1))
    assert call("uninstall", engine, file) == 1
    assert f"`{default}` in {file} is clip" in capsys.readouterr().err
    assert PATH in file.read_text()
    file.write_text(ours)
    assert call("uninstall", engine, file) == 0
    assert PATH not in file.read_text()


@pytest.mark.parametrize("engine", ["podman", "crio"])
def test_a_drop_in_of_ours_is_removed_whole(engine: str, tmp_path: Path) -> None:
    file = tmp_path / "x.conf.d" / "50-clip-shim.conf"
    assert call("install", engine, file) == 0
    assert call("uninstall", engine, file) == 0
    assert list(file.parent.iterdir()) == []
    assert call("uninstall", engine, file) == 0


def test_backup_lies_outside_of_drop_in_directories(tmp_path: Path) -> None:
    """CRI-O reads every file that lies in one."""
    file = tmp_path / "crio.conf.d" / "10-site.conf"
    file.parent.mkdir()
    file.write_text(BEFORE["crio"])
    assert call("install", "crio", file) == 0
    assert [path.name for path in file.parent.iterdir()] == ["10-site.conf"]
    assert (tmp_path / "10-site.conf.clip-shim.bak").read_text() == BEFORE["crio"]


def test_uninstall_is_refused_while_containers_need_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Docker does not answer, so the records are asked; other engines' do not count."""
    file = tmp_path / "daemon.json"
    assert call("install", "docker", file) == 0
    for root, name in (("/run/docker/runtime-runc/moby", "box"), ("/run/containerd/runc/k8s.io", "pod")):
        place = tmp_path / "run" / "containers" / name / name
        place.mkdir(parents=True)
        (place / "state.json").write_text(json.dumps({"version": 1, "root": root, "container": name}))
    before = file.read_bytes()
    assert call("uninstall", "docker", file) == 1
    assert "1 containers of Docker need the runtime clip: box" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert call("uninstall", "docker", file, "--force") == 0
    assert "note: containers still need the runtime: box" in capsys.readouterr().err
    assert file.read_text() == "{}\n"


def test_changed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "daemon.json"
    file.write_text("{}")
    real = docker.change

    def late(*args: object, **more: object) -> object:
        file.write_text('{"debug": true}')
        return real(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(docker, "change", late)
    assert call("install", "docker", file) == 1
    assert "was changed meanwhile" in capsys.readouterr().err
    assert file.read_text() == '{"debug": true}'


def test_toml_that_cannot_be_changed_safely_is_left_alone(tmp_path: Path) -> None:
    """Whatever the library makes of an odd file: what is written says just what was meant, or nothing is written."""
    texts = [
        "a.b = 1\na.c = 2\n[x]\n[a2]\n[x.y]\nz=1\n",
        '[engine]\nruntimes = {one = ["/x"]}\n',
        "[engine.runtimes]\none = ['/x']\n[other]\n[engine.more]\n",
        'engine.runtimes.one = ["/x"]\n',
    ]
    for text in texts:
        file = TomlFile(tmp_path / "f", text.encode())
        file.set(["engine", "runtimes", "clip"], [PATH])
        wanted = tomllib.loads(text)
        wanted.setdefault("engine", {}).setdefault("runtimes", {})["clip"] = [PATH]
        assert tomllib.loads(file.encode().decode()) == wanted
