"""Credential files, helpers and challenges: what is read from them, and what makes no sense."""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.registry import helper
from shim.registry.challenge import Challenge, parse_challenges
from shim.registry.credentials import CredentialStore
from shim.registry.endpoint import redact
from tests.support.registry import World


def write_docker_config(home: Path, config: object) -> Path:
    path = home / ".docker" / "config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo 'credentials not found in native keychain'; exit 1", ""),
        ("echo s3cret; exit 3", "exit code 3"),
        ("echo '[\"s3cret\"]'", "not what the protocol says"),
        ('echo \'{"Username": 1, "Secret": "s3cret"}\'', "not what the protocol says"),
        ("/bin/sleep 60 & wait", "did not answer within"),
        ("/usr/bin/yes s3cret", "did not answer within"),
        ("/usr/bin/head -c 100000 /dev/zero", "too long"),
    ],
)
def test_a_helper_that_fails(tmp_path: Path, script: str, problem: str) -> None:
    program = tmp_path / "docker-credential-bad"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    began = time.monotonic()
    user, secret, why = helper.run_helper("bad", "r.io", {"HOME": "/root"}, path=str(tmp_path), timeout=0.5)
    assert time.monotonic() - began < 5
    assert (user, secret) == ("", "")
    assert problem in why if problem else why == ""
    assert "s3cret" not in why


def test_a_helper_is_killed_with_its_children(tmp_path: Path) -> None:
    program = tmp_path / "docker-credential-slow"
    program.write_text(f"#!/bin/sh\n/bin/sleep 60 & echo $! >{tmp_path}/pid; wait\n")
    program.chmod(0o755)
    assert helper.run_helper("slow", "r.io", {}, path=str(tmp_path), timeout=0.5)[2]
    child = Path("/proc") / (tmp_path / "pid").read_text().strip() / "stat"
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["../../bin/sh", "", "a/b", "a b", "x" * 100, "missing"])
def test_helper_names(tmp_path: Path, name: str) -> None:
    assert helper.run_helper(name, "r.io", {}, path=str(tmp_path))[2]


@pytest.mark.parametrize(
    ("auths", "host", "repository", "user"),
    [
        ({"r.io": "a", "r.io/team": "b", "r.io/team/app": "c"}, "r.io", "team/app", "c"),
        ({"r.io": "a", "r.io/team": "b"}, "r.io", "team/app", "b"),
        ({"r.io": "a", "r.io/team": "b"}, "r.io", "teams/app", "a"),
        ({"https://r.io/v2/": "a"}, "r.io", "x", "a"),
        ({"http://r.io/some/path": "a"}, "r.io", "x", "a"),
        ({"r.io/v1/": "a"}, "r.io", "x", "a"),
        ({"R.io": "a"}, "r.io", "x", "a"),
        ({"r.io": "a"}, "r.io:5000", "x", None),
        ({"r.io:5000": "a"}, "r.io", "x", None),
        ({"evil.r.io": "a", "r.i": "b"}, "r.io", "x", None),
        ({"https://index.docker.io/v1/": "a"}, "docker.io", "library/x", "a"),
        ({"docker.io": "a"}, "docker.io", "library/x", "a"),
        ({"docker.io/team": "a"}, "docker.io", "team/x", "a"),
        ({"registry-1.docker.io": "a"}, "docker.io", "x/y", "a"),
    ],
)
def test_which_entry_is_used(
    tmp_path: Path, auths: dict[str, str], host: str, repository: str, user: str | None
) -> None:
    entries = {key: {"auth": base64.b64encode(f"{name}:pw".encode()).decode()} for key, name in auths.items()}
    write_docker_config(tmp_path, {"auths": entries})
    found = CredentialStore({"HOME": str(tmp_path)}).lookup(host, repository)
    assert (found.username if found else None) == user


def test_files_and_their_order(tmp_path: Path) -> None:
    def auth(user: str) -> dict[str, object]:
        return {"auths": {"r.io": {"auth": base64.b64encode(f"{user}:pw".encode()).decode()}}}

    files = {
        "named": tmp_path / "named.json",
        "docker": tmp_path / "dc" / "config.json",
        "runtime": tmp_path / "run" / "containers" / "auth.json",
        "config": tmp_path / ".config" / "containers" / "auth.json",
    }
    env = {
        "HOME": str(tmp_path),
        "DOCKER_CONFIG": str(tmp_path / "dc"),
        "XDG_RUNTIME_DIR": str(tmp_path / "run"),
        "REGISTRY_AUTH_FILE": str(files["named"]),
    }
    for name, path in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(auth(name)))
    order = []
    for name in ("named", "docker", "runtime", "config"):
        found = CredentialStore(env).lookup("r.io", "x")
        order.append(found.username if found else None)
        files[name].unlink()
        if name == "named":
            assert CredentialStore(env).lookup("r.io", "x") is not None
            del env["REGISTRY_AUTH_FILE"]
    assert order == ["named", "docker", "runtime", "config"]
    assert CredentialStore(env).lookup("r.io", "x") is None


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "\xff",
        '{"auths": []}',
        '{"auths": {"r.io": 5}}',
        '{"auths": {"r.io": {"auth": 5}}}',
        '{"auths": {"r.io": {"auth": "%%%"}}}',
        '{"auths": {"r.io": {"auth": "//79/A=="}}}',
        '{"credHelpers": 1, "credsStore": {}}',
        '{"credHelpers": {"r.io": 7}}',
        "[" * 100000,
        '{"a": "' + "x" * 2_000_000 + '"}',
    ],
)
def test_a_config_that_makes_no_sense(tmp_path: Path, text: str) -> None:
    write_docker_config(tmp_path, text)
    assert CredentialStore({"HOME": str(tmp_path)}, hooks=World()).lookup("r.io", "x") is None


def test_root_is_home_when_there_is_none() -> None:
    assert "/root/.docker/config.json" in list(CredentialStore({})._paths())


@pytest.mark.parametrize(
    ("header", "challenges"),
    [
        ("", []),
        (None, []),
        ('Basic realm="x"', [("basic", {"realm": "x"})]),
        ("Negotiate", [("negotiate", {})]),
        (
            'Bearer realm="https://a/t?x=1,2",service="s",scope="repository:a:pull,push"',
            [("bearer", {"realm": "https://a/t?x=1,2", "service": "s", "scope": "repository:a:pull,push"})],
        ),
        (
            'Basic realm="a", Bearer realm="b" , scope="c d"',
            [("basic", {"realm": "a"}), ("bearer", {"realm": "b", "scope": "c d"})],
        ),
        ('BEARER REALM = "a\\"b\\\\", service=tok', [("bearer", {"realm": 'a"b\\', "service": "tok"})]),
        ("Digest abc==, Basic realm=x", [("digest", {}), ("basic", {"realm": "x"})]),
        ('Bearer realm="unterminated', [("bearer", {})]),
        (', ,Basic realm="x",', [("basic", {"realm": "x"})]),
        ('realm="x"', []),
    ],
)
def test_challenges(header: str | None, challenges: list[tuple[str, dict[str, str]]]) -> None:
    found = [c for c in parse_challenges(header) if c.params or c.scheme in ("negotiate", "digest", "bearer", "basic")]
    assert found == [Challenge(scheme, params) for scheme, params in challenges]


@given(st.text(alphabet='Bearbs c="\\,;=\t\x00é', max_size=200))
def test_challenges_never_raise(header: str) -> None:
    parse_challenges(header)


def test_challenges_are_read_in_linear_time() -> None:
    for hostile in ('Bearer a="' + "\\" * 100000, "a " * 100000, "," * 100000, 'a="b",' * 20000, "=" * 100000):
        began = time.process_time()
        assert len(parse_challenges(hostile)) <= 16
        assert time.process_time() - began < 0.5


def test_details_keep_what_helps() -> None:
    kept = f"manifest unknown: sha256:{'a' * 64} of some/repository/with-a/rather-long/name-in-it at r.example.com"
    assert redact(kept) == kept
    for secret in ("Bearer abcdefgh1234", "x" * 50, "https://s3/b?X-Amz-Signature=1", "Basic dTpwdzEyMzQ="):
        assert secret not in redact(f"failed with {secret}, sorry")
    assert "\n" not in redact("a\nb\x1b[31m")
    assert len(redact("a b " * 5000)) <= 200


def test_helper_output_does_not_reach_our_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = tmp_path / "docker-credential-loud"
    program.write_text("#!/bin/sh\necho s3cret >&2; exit 1\n")
    program.chmod(0o755)
    helper.run_helper("loud", "r.io", dict(os.environ), path=str(tmp_path))
    assert "s3cret" not in capfd.readouterr().err
