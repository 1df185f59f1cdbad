"""Docker with the runtime `clip`, on thin images: what people do with containers works and leaves nothing mounted."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import expected, images
from tests.support.compare import compare, report
from tests.support.engines import Docker
from tests.support.host import Host, wait_for

Reference = Callable[[str], str]


@pytest.fixture(scope="module")
def docker(host: Host) -> Iterator[Docker]:
    with Docker(host) as engine:
        yield engine


@pytest.fixture
def small(thin: Reference, docker: Docker, host: Host) -> Iterator[str]:
    """The thin image; afterwards no container is left, and no overlay of ours."""
    yield docker.pull(thin("small"))
    if containers := docker.output("ps", "-aq").split():
        docker.call("rm", "-f", *containers)
    assert host.clip_overlays() == []


def of_trees(host: Host) -> list[tuple[str, str, str]]:
    """All mounts but the network namespaces' files, whose names change with every start."""
    return sorted(mount for mount in host.mounts() if mount[0] != "nsfs")


def test_engine_itself_works(docker: Docker, pushed: Reference) -> None:
    """The same calls on plain runc: if this fails, the cause is not clip-shim."""
    assert (
        docker.run("--rm", docker.pull(pushed("small")), "cat", "/data/one", runtime="plain").stdout
        == "changed in a higher layer"
    )


def test_thin_image_is_small_and_runs(docker: Docker, small: str) -> None:
    size = json.loads(docker.output("image", "inspect", small))[0]["Size"]
    whole = images.image("small")
    assert size < whole.size / 2
    noise = docker.run("--rm", small, "sh", "-c", "sha256sum /data/noise.bin; pwd; echo $SMALL; id -u").stdout
    digest = images.file_digest(expected.tree(whole) / "data/noise.bin")
    assert noise.split() == [digest, "/data/noise.bin", "/data", "yes", "0"]


def test_root_is_our_overlay_with_the_engines_upper(docker: Docker, host: Host, small: str) -> None:
    docker.run("-d", "--name=box", small, "sleep", "1000")
    merged = str(docker.merged("box"))
    assert host.clip_overlays() == [merged]
    assert [fstype for fstype, point, _ in host.mounts() if point == merged] == ["overlay"]
    docker.call("rm", "-f", "box")
    assert host.clip_overlays() == []


def test_exec_and_exit_codes(docker: Docker, small: str) -> None:
    docker.run("-d", "--name=box", small, "sleep", "1000")
    assert docker.output("exec", "box", "cat", "/data/one") == "changed in a higher layer"
    assert docker.output("exec", "-u", "user", "box", "id", "-un") == "user"
    assert docker.call("exec", "box", "sh", "-c", "exit 7", check=False).returncode == 7
    assert docker.run("--rm", small, "sh", "-c", "exit 9", check=False).returncode == 9


def test_cp_in_and_out(docker: Docker, host: Host, small: str, tmp_path: Path) -> None:
    docker.run("-d", "--name=box", small, "sleep", "1000")
    (tmp_path / "in").write_text("from the host")
    docker.call("cp", tmp_path / "in", "box:/data/in")
    docker.call("cp", tmp_path / "in", "box:/data/one")  # over a file of the image
    assert docker.output("exec", "box", "cat", "/data/in", "/data/one") == "from the hostfrom the host"
    docker.call("cp", "box:/data/text.txt", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (expected.tree(images.image("small")) / "data/text.txt").read_bytes()
    docker.call("exec", "box", "rm", "/data/one", "/data/in")
    assert docker.call("exec", "box", "cat", "/data/one", check=False).returncode == 1


def test_stop_start_keeps_writes(docker: Docker, small: str) -> None:
    docker.run("-d", "--name=box", small, "sleep", "1000")
    docker.call(
        "exec", "box", "sh", "-c", "echo kept >/data/new; rm /data/page; echo changed >/data/block; rm -r /data/many"
    )
    docker.call("stop", "-t", "0", "box")
    docker.call("start", "box")
    seen = docker.output("exec", "box", "sh", "-c", "cat /data/new /data/block; ls /data; sha256sum </data/noise.bin")
    lines = seen.split("\n")
    assert lines[:2] == ["kept", "changed"]
    assert "page" not in lines
    assert "many" not in lines
    assert images.file_digest(expected.tree(images.image("small")) / "data/noise.bin") in lines[-1]
    # Docker compares the upper with its own layers: what only the tree holds is "added" when changed
    assert set(docker.output("diff", "box").split("\n")) >= {"A /data/new", "A /data/block"}


def test_commit_keeps_changes_and_deletions(docker: Docker, small: str) -> None:
    docker.run("--name=box", small, "sh", "-c", "echo kept >/data/new; rm /data/page")
    docker.call("commit", "box", "changed")
    assert docker.run("--rm", "changed", "cat", "/data/new", "/data/one").stdout == "kept\nchanged in a higher layer"
    assert docker.run("--rm", "changed", "ls", "/data/page", check=False).returncode == 1


def test_restart_twenty_times_leaks_no_mount(docker: Docker, host: Host, small: str) -> None:
    docker.run("-d", "--name=box", small, "sh", "-c", "echo x >>/data/starts; exec sleep 1000")
    wait_for("the container has written", lambda: docker.output("exec", "box", "cat", "/data/starts") == "x")
    before = of_trees(host)
    for _ in range(20):
        docker.call("restart", "-t", "0", "box")
    assert of_trees(host) == before
    wait_for(
        "every start is counted", lambda: docker.output("exec", "box", "cat", "/data/starts").split() == ["x"] * 21
    )


def test_ordinary_image_is_untouched(docker: Docker, host: Host, pushed: Reference, small: str) -> None:
    docker.run("-d", "--name=box", docker.pull(pushed("small")), "sleep", "1000")
    assert host.clip_overlays() == []
    assert docker.output("exec", "box", "cat", "/data/one") == "changed in a higher layer"


def test_init(docker: Docker, small: str) -> None:
    assert docker.run("--rm", "--init", small, "sh", "-c", "tr '\\0' ' ' </proc/1/cmdline").stdout.startswith(
        "/sbin/docker-init"
    )


def test_failed_create_says_why_and_leaves_nothing(docker: Docker, host: Host, small: str) -> None:
    failed = docker.run("--name=box", small, "/no/such/program", check=False)
    assert failed.returncode == 127
    assert "/no/such/program" in failed.stderr
    docker.call("rm", "box")
    assert host.clip_overlays() == []


def test_twenty_at_once(docker: Docker, host: Host, small: str) -> None:
    def one(n: int) -> str:
        return docker.run("--rm", small, "sh", "-c", f"cat /data/many/{n:03} | sha256sum", timeout=240).stdout.split()[
            0
        ]

    tree = expected.tree(images.image("small"))
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(one, range(20))) == [images.file_digest(tree / f"data/many/{n:03}") for n in range(20)]
    assert len(host.status()["images"]) == 1
    assert host.clip_overlays() == []


def test_read_only_and_volume(docker: Docker, small: str) -> None:
    read_only = docker.run("--rm", "--read-only", small, "sh", "-c", "touch /data/x || cat /data/one")
    assert read_only.stdout == "changed in a higher layer"
    volume = docker.run("--rm", "-v", "/mnt", small, "sh", "-c", "echo v >/mnt/v; cat /mnt/v /data/one")
    assert volume.stdout == "v\nchanged in a higher layer"


def test_export_of_a_running_container(docker: Docker, small: str, tmp_path: Path) -> None:
    docker.run("-d", "--name=box", small, "sleep", "1000")
    docker.call("export", "-o", tmp_path / "root.tar", "box")
    with tarfile.open(tmp_path / "root.tar") as tar:
        data = tar.extractfile("data/text.txt")
        assert data is not None
        assert data.read() == (expected.tree(images.image("small")) / "data/text.txt").read_bytes()


def test_container_sees_the_image_as_docker_unpacks_it(docker: Docker, host: Host, small: str) -> None:
    docker.run("-d", "--name=box", small, "sleep", "1000")
    tree = expected.tree(images.image("small"))
    found = compare(tree, host.seen(docker.merged("box")), unset=expected.unset(images.image("small")))
    ours = {
        b".clip",
        b".clip/index.clip",
        b".dockerenv",
        b"etc",
        b"etc/hosts",
        b"etc/hostname",
        b"etc/resolv.conf",
        b"etc/mtab",
        b"",
    }
    rest = [d for d in found if d.path not in ours and not d.path.startswith((b"dev/", b"dev"))]
    assert not rest, report(rest)
