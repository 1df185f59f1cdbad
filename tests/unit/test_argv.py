"""The parser of runc-style command lines, against what engines really send and what the two grammars allow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.runtime.argv import parse, style_of
from shim.runtime.fastpath import HANDLED, find_verb

B = "/run/containerd/io.containerd.runtime.v2.task/k8s.io/c1"
SHIM = ["--root", "/run/containerd/runc/k8s.io", "--log", f"{B}/log.json", "--log-format", "json"]
PODMAN = ["--log-format=json", "--log", "/run/c1/oci-log"]

# (command line, verb that is handled or None, bundle, ID): what engines send (containerd 1.6-2.3, podman, CRI-O)
LINES: list[tuple[list[str], str | None, str, str]] = [
    ([*SHIM, "create", "--bundle", B, "--pid-file", f"{B}/init.pid", "c1"], "create", B, "c1"),
    ([*SHIM, "--systemd-cgroup", "create", "--bundle", B, "--pid-file", "p", "--no-pivot", "c1"], "create", B, "c1"),
    (
        [*SHIM, "create", "--bundle", B, "--pid-file", "p", "--console-socket", "/tmp/pty/p.sock", "c1"],
        "create",
        B,
        "c1",
    ),
    ([*SHIM, "--criu", "/x/criu", "create", "--bundle", B, "--no-new-keyring", "c1"], "create", B, "c1"),
    ([*SHIM, "start", "c1"], None, "", ""),
    ([*SHIM, "pause", "c1"], None, "", ""),
    ([*SHIM, "resume", "c1"], None, "", ""),
    ([*SHIM, "exec", "--process", "/tmp/runc-process1", "--detach", "--pid-file", f"{B}/e.pid", "c1"], None, "", ""),
    ([*SHIM, "kill", "--all", "c1", "15"], None, "", ""),
    ([*SHIM, "kill", "c1", "9"], None, "", ""),
    ([*SHIM, "ps", "--format", "json", "c1"], None, "", ""),
    ([*SHIM, "update", "--resources=-", "c1"], None, "", ""),
    ([*SHIM, "checkpoint", "--image-path", "I", "--work-path", "W", "--tcp-established", "c1"], None, "", ""),
    (
        [*SHIM, "restore", "--image-path", "I", "--work-path", "W", "--detach", "-no-subreaper", "--bundle", B, "c1"],
        "restore",
        B,
        "c1",
    ),
    ([*SHIM, "delete", "c1"], None, "", ""),
    ([*SHIM, "delete", "--force", "c1"], None, "", ""),
    (["features"], None, "", ""),
    (["--version"], None, "", ""),
    (
        ["--systemd-cgroup", *PODMAN, "create", "--bundle", "/b", "--pid-file", "/p", "--preserve-fds", "2", "c1"],
        "create",
        "/b",
        "c1",
    ),
    (
        [*PODMAN, "--cgroup-manager", "disabled", "create", "--bundle", "/b", "--pid-file", "p", "c1"],
        "create",
        "/b",
        "c1",
    ),
    (["start", "c1"], None, "", ""),
    (["kill", "c1", "TERM"], None, "", ""),
    (["delete", "--force", "c1"], None, "", ""),
    (["--root=/run/runc", "create", "--bundle", "/b", "--pid-file", "/p", "c1"], "create", "/b", "c1"),
    (["--root", "/run/runc", "--systemd-cgroup", "state", "c1"], None, "", ""),
    (["--root", "/run/runc", "update", "--resources", "-", "c1"], None, "", ""),
    (["--root", "/run/runc", "exec", "--process", "F", "c1"], None, "", ""),
    (["--log", "/l", "run", "--bundle", "/b", "--keep", "c1"], "run", "/b", "c1"),
]

# names that look like verbs, odd but legal spellings, and lines that are to be left alone
EDGES: list[tuple[list[str], str | None, str, str]] = [
    (["delete", "create"], None, "", ""),
    (["create", "--bundle", "create", "create"], "create", "create", "create"),
    (["--log", "create", "start", "run"], None, "", ""),
    (["--log=create", "--root", "run", "state", "create"], None, "", ""),
    (["create", "-b", "create", "delete"], "create", "create", "delete"),
    (["create", "--bundle=create", "x"], "create", "create", "x"),
    (["create", "-bundle", "/b", "x"], "create", "/b", "x"),
    (["create", "-b=/b", "x"], "create", "/b", "x"),
    (["create", "x"], "create", "", "x"),
    (["create", "x", "--bundle", "/b"], "create", "/b", "x"),
    (["create", "--bundle", "/a", "--bundle", "/b", "x"], "create", "/b", "x"),
    (["create", "--bundle", "/with space/ünï\n", "x"], "create", "/with space/ünï\n", "x"),
    (["create", "--bundle", "/b", "--", "x"], "create", "/b", "x"),
    (["create", "--bundle", "/b", "--no-pivot=true", "x"], "create", "/b", "x"),
    (["create", "--bundle", "/b", "--no-pivot", "x"], "create", "/b", "x"),
    (["--", "create", "--bundle", "/b", "x"], "create", "/b", "x"),
    (["-root", "/r", "create", "-b", "/b", "x"], "create", "/b", "x"),
    (["--debug", "run", "-d", "-b", "/b", "x"], "run", "/b", "x"),
    (["create", "--bundle", "/b", "a", "b"], "create", "/b", ""),  # the runtime refuses two IDs
    (["create", "--bundle", "/b"], "create", "/b", ""),
    (["create", "--bundle"], "create", "", ""),
    (["create", "--pidfd-socket", "/s", "-b", "/b", "x"], "create", "/b", "x"),
    # flags of a later runtime: the bundle is still found, and the ID comes last
    (["create", "--later", "v", "--bundle", "/b", "x"], "create", "/b", "x"),
    (["create", "--bundle", "/b", "--later", "x"], "create", "/b", "x"),
    (["create", "--later=v", "--bundle", "/b", "x"], "create", "/b", "x"),
    # not ours
    (["--unknown", "create", "x"], None, "", ""),
    (["--unknown=1", "create", "x"], None, "", ""),
    (["--log"], None, "", ""),
    (["create", "--help"], None, "", ""),
    (["create", "-h"], None, "", ""),
    (["-v"], None, "", ""),
    (["--help"], None, "", ""),
    (["help", "create"], None, "", ""),
    (["spec", "--bundle", "/b"], None, "", ""),
    ([""], None, "", ""),
    (["-"], None, "", ""),
    (["--"], None, "", ""),
    ([], None, "", ""),
]


@pytest.mark.parametrize(("line", "verb", "bundle", "container"), LINES + EDGES)
def test_runc(line: list[str], verb: str | None, bundle: str, container: str) -> None:
    found = parse(line)
    assert (found.verb, found.bundle, found.container) == (verb, bundle, container)
    assert found.config == "config.json"


@pytest.mark.parametrize(
    ("line", "verb", "bundle", "config", "container"),
    [
        (["create", "-b/b", "x"], "create", "/b", "config.json", "x"),
        (["create", "-b", "/b", "-f", "other.json", "x"], "create", "/b", "other.json", "x"),
        (["create", "-fother.json", "--bund=/b", "x"], "create", "/b", "other.json", "x"),
        (["create", "--config=/etc/c.json", "x"], "create", "", "/etc/c.json", "x"),
        (["run", "-db/b", "x"], "run", "/b", "config.json", "x"),
        (["create", "--no-new", "--bundle", "/b", "x"], "create", "/b", "config.json", "x"),
        (["create", "--no-", "--bundle", "/b", "x"], "create", "", "config.json", "x"),  # not unique: crun refuses
        (["create", "x", "--bundle", "/b"], "create", "", "config.json", ""),  # the first operand ends the options
        (["create", "--", "-x"], "create", "", "config.json", "-x"),
        (["create", "-?"], None, "", "config.json", ""),
        (["--cgroup-manager=cgroupfs", "--log=file:/l", "create", "-b", "/b", "x"], "create", "/b", "config.json", "x"),
    ],
)
def test_crun(line: list[str], verb: str | None, bundle: str, config: str, container: str) -> None:
    found = parse(line, "crun")
    assert (found.verb, found.bundle, found.config, found.container) == (verb, bundle, config, container)


def test_globals() -> None:
    found = parse(["--log", "/l", "--log-format=json", "-root", "/r", "--rootless", "auto", "create", "x"])
    assert (found.log, found.log_format, found.root, found.verb) == ("/l", "json", "/r", "create")


def test_log_is_known_for_lines_that_are_passed_on() -> None:
    assert parse(["--log", "/l", "--log-format", "json", "start", "x"]).log == "/l"


@pytest.mark.parametrize(
    ("path", "style"),
    [("/usr/bin/crun", "crun"), ("/usr/bin/crun-vm", "crun"), ("/usr/sbin/runc", "runc"), ("/x/youki", "runc")],
)
def test_style(path: str, style: str) -> None:
    assert style_of(path) == style


WORDS = st.sampled_from(
    [
        "create",
        "run",
        "--bundle",
        "-b",
        "-b/x",
        "--log",
        "--log=",
        "--",
        "-",
        "",
        "x",
        "--root",
        "-f",
        "--=",
        "-=",
        "--no",
    ]
)


@given(st.lists(st.one_of(WORDS, st.text(max_size=6)), max_size=12), st.sampled_from(["runc", "crun"]))
def test_any_line_is_understood_or_left_alone(line: list[str], style: str) -> None:
    found = parse(line, style)
    at = find_verb(line, {})
    if found.verb is not None:
        assert found.verb in HANDLED
        assert line[at] == found.verb
        assert found.container == "" or found.container in line
