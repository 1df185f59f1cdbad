"""containerd by `ctr run --runc-binary`, with the annotation `io.clip.index` and with thin images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import expected, images
from tests.support.engines import Containerd
from tests.support.host import Host, wait_for


@pytest.fixture(scope="module")
def containerd(host: Host) -> Iterator[Containerd]:
    with Containerd(host) as engine:
        yield engine


@pytest.fixture
def annotation(indexed: Callable[[str], Path], host: Host) -> Iterator[str]:
    yield f"io.clip.index={indexed('small')}"
    assert host.clip_overlays() == []


def test_engine_itself_works(containerd: Containerd, pushed: Callable[[str], str]) -> None:
    """The same call on plain runc: if this fails, the cause is not clip-shim."""
    done = containerd.run(
        "--rm", containerd.pull(pushed("small")), "plain", "cat", "/data/one", runtime=containerd.plain
    )
    assert done.stdout == "changed in a higher layer"


def test_annotation_puts_the_tree_under_the_engines_root(
    containerd: Containerd, pushed: Callable[[str], str], annotation: str
) -> None:
    command = "cat /data/one; ls -d /only-in-blank; sha256sum /data/text.txt"
    done = containerd.run(
        "--rm", "--annotation", annotation, containerd.pull(pushed("blank")), "c1", "/bin/sh", "-c", command
    )
    digest = images.file_digest(expected.tree(images.image("small")) / "data/text.txt")
    assert done.stdout == f"changed in a higher layer/only-in-blank\n{digest}  /data/text.txt\n"


def test_thin_image(containerd: Containerd, thin: Callable[[str], str], host: Host) -> None:
    assert (
        containerd.run("--rm", containerd.pull(thin("small")), "c2", "cat", "/data/one").stdout
        == "changed in a higher layer"
    )
    assert host.clip_overlays() == []


def test_ordinary_image_is_untouched(containerd: Containerd, pushed: Callable[[str], str], host: Host) -> None:
    containerd.run("-d", containerd.pull(pushed("small")), "c3", "sleep", "1000")
    assert host.clip_overlays() == []
    containerd.call("tasks", "kill", "-s", "KILL", "c3")
    wait_for("the task has ended", lambda: containerd.state("c3") == "STOPPED")
    containerd.call("tasks", "delete", "c3", check=False)
    containerd.call("containers", "delete", "c3")


def test_exec_kill_delete(containerd: Containerd, pushed: Callable[[str], str], annotation: str, host: Host) -> None:
    containerd.run("-d", "--annotation", annotation, containerd.pull(pushed("blank")), "c4", "/bin/sleep", "1000")
    assert len(host.clip_overlays()) == 1
    # ctr loses what a process writes that ends before ctr has opened the fifo: this one stays for a moment
    done = containerd.call("tasks", "exec", "--exec-id", "e1", "c4", "/bin/sh", "-c", "cat /data/one; sleep 0.3")
    assert done.stdout == "changed in a higher layer"
    containerd.call("tasks", "kill", "-s", "KILL", "c4")
    wait_for("the task has ended", lambda: containerd.state("c4") == "STOPPED")
    containerd.call("tasks", "delete", "c4", check=False)
    containerd.call("containers", "delete", "c4")


def test_failed_create_leaves_nothing(
    containerd: Containerd, pushed: Callable[[str], str], annotation: str, host: Host
) -> None:
    failed = containerd.run(
        "--rm", "--annotation", annotation, containerd.pull(pushed("blank")), "c5", "/no/such", check=False
    )
    assert failed.returncode != 0
    assert "/no/such" in failed.stderr
    containerd.call("containers", "delete", "c5", check=False)


@pytest.mark.parametrize("value", ["/etc/passwd", "relative.clip", "/no/such/index.clip"])
def test_bad_annotation_fails_the_create(
    containerd: Containerd, pushed: Callable[[str], str], annotation: str, value: str
) -> None:
    """The engine shows our message; nothing is mounted and no container runs."""
    annotated = f"io.clip.index={value}"
    failed = containerd.run(
        "--rm", "--annotation", annotated, containerd.pull(pushed("small")), "c6", "echo", "ran", check=False
    )
    assert failed.returncode != 0
    assert "ran" not in failed.stdout
    assert value in failed.stderr
    containerd.call("containers", "delete", "c6", check=False)


def test_twenty_at_once(containerd: Containerd, pushed: Callable[[str], str], annotation: str) -> None:
    def one(n: int) -> str:
        command = f"sha256sum </data/many/{n:03}"
        name = f"many{n}"
        done = containerd.run(
            "--rm", "--annotation", annotation, containerd.pull(pushed("blank")), name, "/bin/sh", "-c", command
        )
        return done.stdout.split()[0]

    tree = expected.tree(images.image("small"))
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(one, range(20))) == [images.file_digest(tree / f"data/many/{n:03}") for n in range(20)]
