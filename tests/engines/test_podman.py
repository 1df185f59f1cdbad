"""podman with the runtime `clip`: annotation and thin image, exec, cp, stop and start, restart, `--rm`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import expected, images
from tests.support.engines import Podman
from tests.support.host import Host


@pytest.fixture(scope="module")
def podman(host: Host) -> Iterator[Podman]:
    with Podman(host) as engine:
        yield engine


@pytest.fixture
def small(podman: Podman, thin: Callable[[str], str], host: Host) -> Iterator[str]:
    """The thin image; afterwards no container is left, and no overlay of ours."""
    yield podman.pull(thin("small"))
    podman.call("rm", "-f", "-t", "0", "--all")
    assert host.clip_overlays() == []


def test_engine_itself_works(podman: Podman, pushed: Callable[[str], str]) -> None:
    """The same call on plain runc: if this fails, the cause is not clip-shim."""
    assert (
        podman.run("--rm", podman.pull(pushed("small")), "cat", "/data/one", runtime="plain").stdout
        == "changed in a higher layer"
    )


def test_thin_image(podman: Podman, small: str) -> None:
    digest = images.file_digest(expected.tree(images.image("small")) / "data/noise.bin")
    done = podman.run("--rm", small, "sh", "-c", "sha256sum /data/noise.bin; pwd; echo $SMALL")
    assert done.stdout.split() == [digest, "/data/noise.bin", "/data", "yes"]


def test_annotation(podman: Podman, small: str, pushed: Callable[[str], str], indexed: Callable[[str], Path]) -> None:
    annotation = f"io.clip.index={indexed('small')}"
    done = podman.run(
        "--rm",
        "--annotation",
        annotation,
        podman.pull(pushed("blank")),
        "/bin/sh",
        "-c",
        "cat /data/one; ls /only-in-blank",
    )
    assert done.stdout == "changed in a higher layer/only-in-blank\n"


def test_exec_cp_and_stop_start_keep_writes(podman: Podman, small: str, tmp_path: Path) -> None:
    podman.run("-d", "--name=box", small, "sleep", "1000")
    (tmp_path / "in").write_text("from the host")
    podman.call("cp", tmp_path / "in", "box:/data/in")
    podman.call("exec", "box", "sh", "-c", "cat /data/in >/data/copy; rm /data/page")
    podman.call("cp", "box:/data/text.txt", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (expected.tree(images.image("small")) / "data/text.txt").read_bytes()
    podman.call("stop", "-t", "0", "box")
    podman.call("--runtime", "clip", "start", "box")
    assert podman.output("exec", "box", "cat", "/data/copy") == "from the host"
    assert podman.call("exec", "box", "ls", "/data/page", check=False).returncode == 1


def test_restart_leaks_no_mount(podman: Podman, host: Host, small: str) -> None:
    podman.run("-d", "--name=box", small, "sleep", "1000")
    before = sorted(host.mounts())
    for _ in range(5):
        podman.call("restart", "-t", "0", "box")
    assert sorted(host.mounts()) == before
    assert podman.output("exec", "box", "cat", "/data/one") == "changed in a higher layer"


def test_ordinary_image_is_untouched(podman: Podman, host: Host, pushed: Callable[[str], str], small: str) -> None:
    podman.run("-d", "--name=box", podman.pull(pushed("small")), "sleep", "1000")
    assert host.clip_overlays() == []


def test_failed_create_says_why_and_leaves_nothing(podman: Podman, small: str) -> None:
    failed = podman.run("--rm", small, "/no/such/program", check=False)
    assert failed.returncode == 127
    assert "/no/such/program" in failed.stderr
