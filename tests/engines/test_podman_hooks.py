"""podman with our hooks and a runtime that knows nothing of us: `--hooks-dir`, as `install podman-hooks` writes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.engines import Podman
from tests.support.host import ROOT, Host, wait_for

HOOKED = Path("/run/clip-shim-hooks")
ONE = "changed in a higher layer"


@pytest.fixture(scope="module")
def host(registry_address: str) -> Iterator[Host]:
    with Host("shared", settings={"CLIP_SHIM_TREE_LINGER": "1s"}) as made:
        made.trust_registry(registry_address)
        made.start_daemon()
        yield made


@pytest.fixture(scope="module")
def podman(host: Host) -> Iterator[Podman]:
    """The launcher is one that sets this host's environment: podman gives hooks none."""
    host.clip("install", "podman-hooks", "--config", host.base / "hooks.d", "--runtime-path", host.runtime)
    with Podman(host) as engine:
        yield engine


def run(podman: Podman, *arguments: str, check: bool = True) -> str:
    hooks = str(podman.host.base / "hooks.d")
    done = podman.call("--hooks-dir", hooks, "--runtime", "plain", "run", *arguments, check=check)
    return done.stdout + done.stderr


def nothing_left(host: Host) -> None:
    assert host.clip_overlays() == []
    assert not list(Path("/run").glob("clip-precreate-*"))


def test_thin_image(podman: Podman, thin: Callable[[str], str], host: Host) -> None:
    image = podman.pull(thin("small"))
    assert run(podman, "--rm", image, "cat", "/data/one") == ONE
    nothing_left(host)


def test_stop_and_start_keep_writes(podman: Podman, thin: Callable[[str], str], host: Host) -> None:
    run(podman, "-d", "--name=box", podman.pull(thin("small")), "sleep", "1000")
    name = podman.output("inspect", "-f", "{{.Id}}", "box")
    assert (HOOKED / name).is_dir()
    podman.call("exec", "box", "sh", "-c", "echo kept >/data/new")
    podman.call("stop", "-t", "0", "box")
    assert not (HOOKED / name).exists()
    assert host.clip_overlays() == []
    podman.call("--hooks-dir", host.base / "hooks.d", "start", "box")
    assert podman.output("exec", "box", "cat", "/data/new", "/data/one") == f"kept\n{ONE}"
    podman.call("--hooks-dir", host.base / "hooks.d", "restart", "-t", "0", "box")
    assert podman.output("exec", "box", "cat", "/data/new") == "kept"
    assert len(host.clip_overlays()) == 1
    podman.call("rm", "-f", "-t", "0", "box")
    nothing_left(host)


def test_ordinary_image_is_untouched(podman: Podman, pushed: Callable[[str], str], host: Host) -> None:
    run(podman, "-d", "--name=plain", podman.pull(pushed("small")), "sleep", "1000")
    assert host.clip_overlays() == []
    podman.call("rm", "-f", "-t", "0", "plain")


def test_failure_says_why_and_stops_the_start(podman: Podman, pushed: Callable[[str], str], host: Host) -> None:
    image = podman.pull(pushed("blank"))
    said = run(podman, "--rm", "--annotation", "io.clip.index=/etc/passwd", image, "/bin/sh", check=False)
    assert "setting up OCI Hooks" in said
    assert "/etc/passwd lies below no directory of `trust.paths`" in (HOOKED / "last-error").read_text()
    (HOOKED / "last-error").unlink()
    nothing_left(host)


def test_what_is_no_configuration(host: Host) -> None:
    for text in ("", "nonsense", "{}"):
        done = host.run(ROOT / "hooks/clip-precreate", "/bin/false", input=text, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("clip-precreate: ")
        assert host.run(ROOT / "hooks/clip-poststop", input=text).stdout == ""
    (HOOKED / "last-error").unlink()


def test_uninstall_is_refused_while_a_container_runs(podman: Podman, thin: Callable[[str], str], host: Host) -> None:
    run(podman, "-d", "--name=box", podman.pull(thin("small")), "sleep", "1000")
    words = ("uninstall", "podman-hooks", "--config", host.base / "hooks.d")
    refused = host.clip(*words, check=False)
    assert "containers of podman, by hooks need the runtime" in refused.stderr
    podman.call("rm", "-f", "-t", "0", "box")


@pytest.mark.parametrize("place", ["/usr/share/containers/oci/hooks.d", "/etc/containers/oci/hooks.d"])
def test_never_where_crio_looks(host: Host, place: str) -> None:
    refused = host.clip("install", "podman-hooks", "--config", place, "--dry-run", check=False)
    assert refused.returncode == 1
    assert "CRI-O" in refused.stderr


def test_files(host: Host, podman: Podman) -> None:
    """oci-hooks(5): one stage each, an absolute path, a bound on its time."""
    for stage in ("precreate", "poststop"):
        found = json.loads((host.base / "hooks.d" / f"clip-{stage}.json").read_text())
        assert found["version"] == "1.0.0"
        assert found["stages"] == [stage]
        assert Path(found["hook"]["path"]).is_absolute()
        assert found["hook"]["timeout"] > 0
    wait_for("what containers left is swept", lambda: host.clip("doctor", "--check", "stale-mounts").returncode == 0)
