"""Docker with the runtime `clip`, on thin images: what people do with containers works and leaves nothing mounted."""

from __future__ import annotations

import json
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
    docker.run("-d", "--name=c", small, "sleep", "1000")
    merged = str(docker.merged("c"))
    assert host.clip_overlays() == [merged]
    assert [fstype for fstype, point, _ in host.mounts() if point == merged] == ["overlay"]
    docker.call("rm", "-f", "c")
    assert host.clip_overlays() == []


def test_exec_and_exit_codes(docker: Docker, small: str) -> None:
    docker.run("-d", "--name=c", small, "sleep", "1000")
    assert docker.output("exec", "c", "cat", "/data/one") == "changed in a higher layer"
    assert docker.output("exec", "-u", "user", "c", "id", "-un") == "user"
    assert docker.call("exec", "c", "sh", "-c", "exit 7", check=False).returncode == 7
    assert docker.run("--rm", small, "sh", "-c", "exit 9", check=False).returncode == 9


def test_cp_in_and_out(docker: Docker, host: Host, small: str, tmp_path: Path) -> None:
    docker.run("-d", "--name=c", small, "sleep", "1000")
    (tmp_path / "in").write_text("from the host")
    docker.call("cp", tmp_path / "in", "c:/data/in")
    docker.call("cp", tmp_path / "in", "c:/data/one")  # over a file of the image
    assert docker.output("exec", "c", "cat", "/data/in", "/data/one") == "from the hostfrom the host"
    docker.call("cp", "c:/data/text.txt", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (expected.tree(images.image("small")) / "data/text.txt").read_bytes()
    docker.call("exec", "c", "rm", "/data/one", "/data/in")
    assert docker.call("exec", "c", "cat", "/data/one", check=False).returncode == 1


def test_stop_start_keeps_writes(docker: Docker, small: str) -> None:
    docker.run("-d", "--name=c", small, "sleep", "1000")
    docker.call(
        "exec", "c", "sh", "-c", "echo kept >/data/new; rm /data/page; echo changed >/data/block; rm -r /data/many"
    )
    docker.call("stop", "-t", "0", "c")
    docker.call("start", "c")
    seen = docker.output("exec", "c", "sh", "-c", "cat /data/new /data/block; ls /data; sha256sum </data/noise.bin")
    lines = seen.split("\n")
    assert lines[:2] == ["kept", "changed"]
    assert "page" not in lines
    assert "many" not in lines
    assert images.file_digest(expected.tree(images.image("small")) / "data/noise.bin") in lines[-1]
    assert set(docker.output("diff", "c").split("\n")) >= {
        "A /data/new",
        "D /data/page",
        "C /data/block",
        "D /data/many",
    }


def test_restart_twenty_times_leaks_no_mount(docker: Docker, host: Host, small: str) -> None:
    docker.run("-d", "--name=c", small, "sh", "-c", "echo x >>/data/starts; exec sleep 1000")
    wait_for("the container has written", lambda: docker.output("exec", "c", "cat", "/data/starts") == "x")
    before = sorted(host.mounts())
    for _ in range(20):
        docker.call("restart", "-t", "0", "c")
    assert sorted(host.mounts()) == before
    wait_for("every start is counted", lambda: docker.output("exec", "c", "cat", "/data/starts").split() == ["x"] * 21)


def test_ordinary_image_is_untouched(docker: Docker, host: Host, pushed: Reference, small: str) -> None:
    docker.run("-d", "--name=c", docker.pull(pushed("small")), "sleep", "1000")
    assert host.clip_overlays() == []
    assert docker.output("exec", "c", "cat", "/data/one") == "changed in a higher layer"


def test_init(docker: Docker, small: str) -> None:
    assert docker.run("--rm", "--init", small, "sh", "-c", "tr '\\0' ' ' </proc/1/cmdline").stdout.startswith(
        "/sbin/docker-init"
    )


def test_failed_create_says_why_and_leaves_nothing(docker: Docker, host: Host, small: str) -> None:
    failed = docker.run("--name=c", small, "/no/such/program", check=False)
    assert failed.returncode == 127
    assert "/no/such/program" in failed.stderr
    docker.call("rm", "c")
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


def test_read_only_volume_and_export(docker: Docker, small: str, tmp_path: Path) -> None:
    assert docker.run("--rm", "--read-only", small, "sh", "-c", "touch /data/x || cat /data/one").stdout.endswith(
        "higher layer"
    )
    docker.run("--name=c", "-v", "/data", small, "sh", "-c", "echo v >/data/v; ls /data")
    docker.call("export", "-o", tmp_path / "root.tar", "c")
    assert (tmp_path / "root.tar").stat().st_size > 1_000_000


def test_container_sees_the_image_as_docker_unpacks_it(docker: Docker, host: Host, small: str) -> None:
    docker.run("-d", "--name=c", small, "sleep", "1000")
    tree = expected.tree(images.image("small"))
    found = compare(tree, host.seen(docker.merged("c")), unset=expected.unset(images.image("small")))
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
