"""The launcher in front of a runtime that writes down exactly what it was given."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shim.errors import ConfigError
from shim.runtime.launcher import find_runtimes, stamp, write_launcher
from shim.settings import load
from tests.unit.test_argv import EDGES, LINES

# A shell as it is started: Python would change what is looked at. /proc shows the bytes that execve was given.
MOCK = """#!/bin/sh
out=$MOCK_OUT
umask > "$out/umask"
pwd > "$out/cwd"
cat /proc/$$/cmdline > "$out/cmdline"
cat /proc/$$/environ > "$out/environ"
grep SigIgn /proc/$$/status > "$out/sigign"
for fd in /proc/$$/fd/*; do
    n=${fd##*/}
    [ "$n" -lt 10 ] && echo "$n $(readlink $fd)" >> "$out/fds"
done
[ -n "$MOCK_CAT" ] && cat
exit ${MOCK_EXIT:-0}
"""


class Mock:
    """A launcher before a mock runtime; `run` gives what arrived there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runtime = directory / "mock-runc"
        self.runtime.write_text(MOCK)
        self.runtime.chmod(0o755)
        self.out = directory / "out"
        self.out.mkdir()
        settings = load(env={}, flags={"runtimes": [str(self.runtime)], "run_dir": str(directory / "run")})
        self.launcher = write_launcher(
            directory / "bin" / "clip", settings, ["/bin/false"], config=directory / "c.yaml"
        )
        self.environ = {"PATH": "/bin:/usr/bin", "MOCK_OUT": str(self.out)}

    def run(self, words: list[str | bytes], **options: object) -> subprocess.CompletedProcess[bytes]:
        for file in self.out.iterdir():
            file.unlink()
        arguments: dict[str, object] = {"env": self.environ, "capture_output": True, "timeout": 20} | options
        return subprocess.run([str(self.launcher), *words], **arguments)  # type: ignore[call-overload,no-any-return]

    def words(self) -> list[bytes]:
        """The runtime's arguments (behind the shell's and the script's name)."""
        return (self.out / "cmdline").read_bytes()[:-1].split(b"\0")[2:]

    def variables(self) -> list[bytes]:
        return (self.out / "environ").read_bytes()[:-1].split(b"\0")

    def fds(self) -> dict[int, str]:
        lines = (self.out / "fds").read_text().splitlines()
        return {int(line.split(" ", 1)[0]): line.split(" ", 1)[1] for line in lines}


@pytest.fixture
def mock(tmp_path: Path) -> Mock:
    (tmp_path / "bin").mkdir()
    return Mock(tmp_path)


def test_every_command_line_arrives_as_it_was(mock: Mock) -> None:
    for line, *_ in LINES + EDGES:
        done = mock.run(list(line))
        assert done.returncode == 0, (line, done.stderr)
        assert (done.stdout, done.stderr) == (b"", b""), line
        assert mock.words() == [os.fsencode(word) for word in line], line
        assert mock.variables() == [os.fsencode(f"{k}={v}") for k, v in mock.environ.items()], line


@pytest.mark.parametrize("verb", [b"state", b"create"])
@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C"}, {"LC_CTYPE": "POSIX"}, {"LC_ALL": "de_DE.ISO-8859-1"}])
def test_bytes_that_are_no_text(mock: Mock, verb: bytes, locale: dict[str, str]) -> None:
    mock.environ |= {"RAW": os.fsdecode(b"\xff\xfe"), **locale}
    assert mock.run([verb, b"--bundle", b"/\xff\n \xc3", b"\xe4"]).returncode == 0
    assert mock.words() == [verb, b"--bundle", b"/\xff\n \xc3", b"\xe4"]
    assert mock.variables() == [os.fsencode(f"{k}={v}") for k, v in mock.environ.items()]


@pytest.mark.parametrize("given", [None, "C", "POSIX", "C.UTF-8", ""])
@pytest.mark.parametrize("verb", ["state", "create"])
def test_locale_coercion_is_undone(mock: Mock, given: str | None, verb: str) -> None:
    if given is not None:
        mock.environ["LC_CTYPE"] = given
    mock.run([verb, "x"])
    found = [item for item in mock.variables() if item.startswith(b"LC_CTYPE=")]
    assert found == ([] if given is None else [f"LC_CTYPE={given}".encode()])


@pytest.mark.parametrize("verb", ["state", "create"])
def test_no_environment_at_all(mock: Mock, verb: str) -> None:
    mock.runtime.write_text(f"#!/bin/sh\ntr '\\0' '\\n' < /proc/$$/environ > {mock.out}/environ\n")
    assert mock.run([verb, "x"], env={}).returncode == 0
    assert (mock.out / "environ").read_bytes() == b""


@pytest.mark.parametrize("verb", ["state", "create"])
def test_signals_umask_and_directory(mock: Mock, tmp_path: Path, verb: str) -> None:
    place = tmp_path / "some where"
    place.mkdir()

    def prepare() -> None:
        os.umask(0o137)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)

    mock.run([verb, "x"], cwd=place, preexec_fn=prepare)
    assert (mock.out / "umask").read_text().strip() in ("137", "0137")
    assert (mock.out / "cwd").read_text() == f"{place}\n"
    ignored = int((mock.out / "sigign").read_text().split()[1], 16)
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("SigIgn"))
    ours = int(line.split()[1], 16)  # whoever started the tests may ignore some: a shell's background job does
    restored = 1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1)
    assert ignored == (ours & ~restored) | 1 << (signal.SIGUSR2 - 1)


@pytest.mark.parametrize("verb", ["state", "create"])
def test_descriptors_are_kept(mock: Mock, verb: str) -> None:
    files = [os.open(mock.directory, os.O_RDONLY) for _ in range(3)]
    for number, fd in enumerate(files, start=100):
        os.dup2(fd, number)
    mock.environ |= {"LISTEN_FDS": "2", "LISTEN_PID": "1", "NOTIFY_SOCKET": "/run/n"}

    def move() -> None:
        for number in range(3):
            os.dup2(100 + number, 3 + number)

    mock.run([verb, "--preserve-fds", "1", "x"], preexec_fn=move, close_fds=False)
    for number, fd in enumerate(files, start=100):
        os.close(number)
        os.close(fd)
    found = mock.fds()
    assert [found[number] for number in (3, 4, 5)] == [str(mock.directory)] * 3
    assert b"NOTIFY_SOCKET=/run/n" in mock.variables()


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("verb", ["state", "create"])
def test_closed_standard_descriptors_stay_closed(mock: Mock, closed: tuple[int, ...], verb: str) -> None:
    def close() -> None:
        for fd in closed:
            os.close(fd)

    lines = [f"[ -e /proc/$$/fd/{fd} ] && : > {mock.out}/open{fd}" for fd in range(3)]
    mock.runtime.write_text("\n".join(["#!/bin/sh", *lines, f": > {mock.out}/done"]))
    done = subprocess.run([str(mock.launcher), verb, "x"], preexec_fn=close, env=mock.environ, check=False, timeout=20)
    assert done.returncode == 0
    assert {name for name in os.listdir(mock.out) if name != "done"} == {
        f"open{n}" for n in range(3) if n not in closed
    }


def test_standard_input_reaches_the_runtime(mock: Mock) -> None:
    mock.environ["MOCK_CAT"] = "1"
    done = mock.run(["update", "--resources=-", "x"], input=b'{"memory":{}}')
    assert done.stdout == b'{"memory":{}}'


def test_exit_code_is_the_runtimes(mock: Mock) -> None:
    mock.environ["MOCK_EXIT"] = "37"
    assert mock.run(["run", "x"]).returncode == 37
    assert mock.run(["exec", "x", "true"]).returncode == 37


def test_next_candidate_is_taken(mock: Mock) -> None:
    mock.environ["CLIP_SHIM_RUNTIMES"] = f"/does/not/exist,{mock.directory},{mock.runtime}"
    assert mock.run(["state", "x"]).returncode == 0
    assert mock.words() == [b"state", b"x"]


@pytest.mark.parametrize("verb", ["state", "create"])
def test_no_runtime_is_one_clear_error(mock: Mock, verb: str) -> None:
    mock.runtime.unlink()
    log = mock.directory / "log.json"
    done = mock.run(["--log", str(log), "--log-format", "json", verb, "x"])
    assert done.returncode == 1
    assert done.stdout == b""
    assert b"no low-level runtime can be executed: tried " + os.fsencode(mock.runtime) in done.stderr
    assert done.stderr.count(b"\n") == 1
    entry = json.loads(log.read_text())
    assert entry["level"] == "error"
    assert entry["msg"] + "\n" == done.stderr.decode()


def test_changed_configuration_is_compiled_again(mock: Mock) -> None:
    other = mock.directory / "other-runc"
    other.write_text(f"#!/bin/sh\necho other > {mock.out}/who\n")
    other.chmod(0o755)
    # what was given as a flag when the launcher was written wins, as it would for the daemon
    settings = mock.launcher.with_name("clip-shim-runtime.json")
    compiled = json.loads(settings.read_text())
    compiled["overrides"].pop("runtimes")
    settings.write_text(json.dumps(compiled))
    config = mock.directory / "c.yaml"
    config.write_text(f"runtimes: [{other}]\n")
    assert mock.run(["state", "x"]).returncode == 0
    assert (mock.out / "who").exists()
    fresh = json.loads(settings.read_text())
    assert fresh["config_stamp"] == stamp(config)
    assert fresh["runtimes"] == [str(other)]
    assert fresh["run_dir"] == str(mock.directory / "run")
    assert fresh["launcher"] == str(mock.launcher)
    # and again when it is gone
    config.unlink()
    mock.run(["state", "x"])
    assert json.loads(settings.read_text())["config_stamp"] is None


def test_wrong_configuration_does_not_stop_other_verbs(mock: Mock) -> None:
    (mock.directory / "c.yaml").write_text("run_dri: /x\n")
    assert mock.run(["kill", "x", "9"]).returncode == 0
    assert mock.words() == [b"kill", b"x", b"9"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 2}', '{"version": 1}'])
def test_damaged_settings(mock: Mock, content: str) -> None:
    mock.launcher.with_name("clip-shim-runtime.json").write_text(content)
    done = mock.run(["create", "x"])
    assert done.returncode == 1
    assert b"clip-shim-runtime.json cannot be read" in done.stderr
    # other verbs go to whatever runtime the machine has, which refuses this ID in its own words
    assert b"clip-shim" not in mock.run(["state", "no-such-container"]).stderr


def test_launcher_file(mock: Mock) -> None:
    text = mock.launcher.read_text()
    first = text.split("\n", 1)[0]
    assert first.startswith("#!/")
    assert first.split(" ", 1)[1].startswith("-IS")
    assert mock.launcher.stat().st_mode & 0o7777 == 0o755
    assert sorted(os.listdir(mock.launcher.parent)) == ["clip", "clip-shim-runtime.json"]


def test_launcher_never_names_itself_as_runtime(tmp_path: Path) -> None:
    link = tmp_path / "runc"
    link.symlink_to(tmp_path / "clip")
    (tmp_path / "clip").write_text("")
    assert find_runtimes([str(link), "/bin/true", "/bin/true"], tmp_path / "clip") == ["/bin/true"]
    assert find_runtimes(["true"], tmp_path / "clip")[0].endswith("/true")


def test_launcher_directory_must_exist(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"):
        write_launcher(tmp_path / "gone" / "clip", load(env={}), ["x"])


def modules_after(mock: Mock, code: str) -> set[str]:
    """What a bare interpreter has imported after `code`, beyond what it starts with."""
    bare = f"{sys.executable}"
    text = f"import sys; before = set(sys.modules)\n{code}\nprint(*sorted(set(sys.modules) - before))"
    done = subprocess.run([bare, "-ISc", text], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_passing_on_imports_nothing_of_weight(mock: Mock) -> None:
    package = Path(__file__).parents[2] / "shim" / "runtime" / "fastpath.py"
    found = modules_after(
        mock,
        f"exec(open({str(package)!r}).read())\nread_settings({str(mock.launcher.with_name('clip-shim-runtime.json'))!r})",
    )
    assert found <= {"_json", "__future__", "gc", "posix", "_signal"}


def test_create_without_a_reference_imports_little(mock: Mock) -> None:
    package = Path(__file__).parents[2]
    found = modules_after(mock, f"sys.path.append({str(package)!r})\nimport shim.runtime.main")
    heavy = {
        "json",
        "re",
        "socket",
        "subprocess",
        "typing",
        "dataclasses",
        "ctypes",
        "enum",
        "collections",
        "signal",
        "pathlib",
    }
    assert not found & heavy


def test_configerror_names_the_interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shim.runtime.launcher._NEEDED", (9, 9))
    monkeypatch.setattr(sys, "executable", "/opt/with space/python")
    with pytest.raises(ConfigError, match="cannot stand in a #! line"):
        write_launcher(tmp_path / "clip", load(env={}), ["x"])


def test_listening_socket_is_untouched(mock: Mock) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        fd = listener.fileno()
        os.set_inheritable(fd, True)
        mock.run(["state", "x"], pass_fds=[fd])
        if fd < 10:
            assert mock.fds()[fd].startswith("socket:")
