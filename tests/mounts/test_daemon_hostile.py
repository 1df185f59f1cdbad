"""What a hostile or broken index, and a hostile client, can do to the daemon: get an error, and change nothing."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from shim.index import codec
from shim.index.model import Index, Restart
from tests.support import images, smallimage
from tests.support.daemonclient import Client, acquire, log_lines, server_pid, trees
from tests.support.host import Host, wait_for
from tests.support.registry import Registry


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as registry:
        images.push(images.image("shared-a"), registry.host)
        yield registry


@pytest.fixture(scope="module")
def host(registry: Registry) -> Iterator[Host]:
    with Host(settings={"CLIP_SHIM_TREE_LINGER": "300ms", "CLIP_SHIM_READ_DEADLINE": "2s"}) as made:
        made.trust_registry(registry.host)
        made.index(f"{registry.host}/shared-a:latest", "a")
        made.start_daemon()
        yield made


@pytest.fixture
def unchanged(host: Host) -> Iterator[Host]:
    """The host; afterwards nothing was kept or mounted, no descriptor is open, and a good index still works."""
    pid = server_pid(host)
    assert acquire(host, host.indexes / "a.clip")["ok"]
    wait_for("the tree is unmounted", lambda: not trees(host) and not host.status()["layers"])
    kept = sorted(os.listdir(host.state_dir / "trees"))
    open_before = len(os.listdir(f"/proc/{pid}/fd"))
    yield host
    assert acquire(host, host.indexes / "a.clip")["ok"]
    wait_for("the tree is unmounted", lambda: not trees(host) and not host.status()["layers"])
    assert sorted(os.listdir(host.state_dir / "trees")) == kept
    assert server_pid(host) == pid
    wait_for("descriptors are closed", lambda: len(os.listdir(f"/proc/{pid}/fd")) <= open_before + 1)


def good(host: Host) -> bytes:
    return (host.indexes / "a.clip").read_bytes()


def refused(answer: dict[str, object], kind: str, *texts: str) -> None:
    assert answer["ok"] is False, answer
    assert answer["kind"] == kind, answer
    for text in texts:
        assert text in str(answer["error"]), answer
    assert answer["hint"]
    assert "Traceback" not in str(answer)


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 64]) + data[middle + 64 :]


BAD = {
    "empty": (lambda _: b"", "the file is empty"),
    "truncated": (lambda data: data[:-1000], "cut short"),
    "with a tail": (lambda data: data + b"x", "cut short or has bytes behind"),
    "damaged": (damaged, "damaged"),
    "random": (lambda _: os.urandom(100_000), "not a clip index"),
    "a Go clip file": (lambda _: b"\x89CLIP\r\n\x1a\n\x01" + bytes(1000), "Go clip file"),
    "a trailer alone": (lambda data: data[-16:], "damaged"),
    "head and trailer": (lambda data: data[:200] + data[-16:], "damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_index(unchanged: Host, case: str) -> None:
    make, text = BAD[case]
    path = unchanged.indexes / "bad.clip"
    path.write_bytes(make(good(unchanged)))
    refused(acquire(unchanged, path), "IndexFormatError", str(path), text)


@contextmanager
def descriptor(host: Host, kind: str) -> Iterator[int]:
    path = host.base / "odd"
    flags = os.O_RDWR | os.O_NONBLOCK
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
            flags = os.O_RDONLY | os.O_DIRECTORY
        case "socket pair" | "device":
            path = Path("/dev/zero")
        case "huge sparse file":
            path.touch()
            os.truncate(path, 1 << 40)
        case "sparse file":
            path.touch()
            os.truncate(path, 512 << 20)
        case "path only":
            path.write_bytes(good(host))
            flags = os.O_PATH
        case "write only":
            path.write_bytes(good(host))
            flags = os.O_WRONLY
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)
        if path.is_dir():
            path.rmdir()
        elif path.is_relative_to(host.base):
            path.unlink()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("fifo", "must be a regular file"),
        ("directory", "must be a regular file"),
        ("device", "must be a regular file"),
        ("huge sparse file", "at most 536870912 are allowed"),
        ("sparse file", "not a clip index"),
        ("path only", "cannot be read: Bad file descriptor"),
        ("write only", "cannot be read: Bad file descriptor"),
    ],
)
def test_odd_descriptor(unchanged: Host, kind: str, text: str) -> None:
    with descriptor(unchanged, kind) as fd:
        refused(acquire(unchanged, fd), "IndexFormatError", text)


def test_requests_that_make_no_sense(unchanged: Host) -> None:
    index = unchanged.indexes / "a.clip"
    with Client(unchanged) as client:
        refused(client.ask({"op": "acquire", "source": "mount", "value": "x/y"}), "DaemonError", "names no file")
        refused(client.acquire(index, source="somewhere"), "DaemonError", "unknown source", "somewhere")
        refused(client.acquire(index, source=["mount"]), "DaemonError", "unknown source")
        refused(client.ask({"op": "acquire", "source": "mount", "value": {"a": "\x1b[31m\n"}}), "DaemonError")
        answer = client.ask({"op": "acquire", "source": "mount", "value": "\x1b[31mred\nline"})
        assert "\x1b" not in answer["error"]
        assert "\n" not in answer["error"]
        assert client.acquire(index)["ok"], "the connection is still good"
    with Client(unchanged) as client, open(index, "rb") as file:
        request = {"op": "acquire", "source": "mount", "value": "many"}
        assert client.ask(request, [file.fileno()] * 4)["ok"]


def test_many_at_once_of_a_bad_index_are_looked_at_once_or_twice(unchanged: Host) -> None:
    path = unchanged.indexes / "bad.clip"
    path.write_bytes(damaged(good(unchanged)) + b"")
    before = len(log_lines(unchanged, "preparing a tree"))
    with ThreadPoolExecutor(12) as pool:
        for answer in pool.map(lambda _: acquire(unchanged, path), range(12)):
            refused(answer, "IndexFormatError", "damaged")
    assert len(log_lines(unchanged, "preparing a tree")) - before <= 4


def test_index_that_changes_while_it_is_read(unchanged: Host) -> None:
    """Whatever of it is seen: an error, or the tree of one of both; never a mixture."""
    path = unchanged.indexes / "moving.clip"
    one = good(unchanged)
    other = encoded(one, lambda index: index.tree.root.children.pop(b"common"))
    path.write_bytes(one)
    stop = threading.Event()

    def write() -> None:
        with open(path, "r+b") as file:
            while not stop.is_set():
                for data in (other, one):
                    file.seek(0)
                    file.write(data)
                    file.truncate()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        answers = [acquire(unchanged, path) for _ in range(12)]
    finally:
        stop.set()
        thread.join()
    wanted = {"sha256:" + hashlib.sha256(data).hexdigest() for data in (one, other)}
    for answer in answers:
        assert answer.get("index") in wanted or answer["kind"] == "IndexFormatError", answer
    for hex_ in {digest.removeprefix("sha256:") for digest in wanted}:
        kept = unchanged.state_dir / "trees" / hex_ / "index.clip"
        assert not kept.exists() or hashlib.sha256(kept.read_bytes()).hexdigest() == hex_
    path.write_bytes(other)
    answer = acquire(unchanged, path)
    assert answer["index"] == "sha256:" + hashlib.sha256(other).hexdigest(), "not what the file was before"
    import shutil

    shutil.rmtree(unchanged.state_dir / "trees" / answer["index"].removeprefix("sha256:"))


def encoded(data: bytes, change: object) -> bytes:
    """The index changed by a function, as a valid file."""
    index: Index = codec.decode(data)
    change(index)  # type: ignore[operator]
    index.tree.count_links()
    return codec.encode(index)


def false_digests(index: Index) -> None:
    for layer in index.layers:
        layer.spans.digests[:] = bytes(byte ^ 1 for byte in layer.spans.digests)


def elsewhere(index: Index) -> None:
    index.image = index.image.replace("/shared-a", "/no/such/repository")


def false_points(index: Index) -> None:
    """Restart points one bit off."""
    for layer in index.layers:
        for i in range(1, layer.spans.count):
            if layer.spans.kind(i) != Restart.CONTINUE:
                layer.spans.bits[i] = (layer.spans.bits[i] + 1) % 8


def test_another_spacing_of_the_same_layers_has_a_cache_of_its_own(host: Host) -> None:
    """Both are honest here, and both are right at the same time."""
    other = host.index(image_of(host), "spaced", "--checkpoint-mib", "1")
    with Client(host) as first, Client(host) as second:
        trees = [Path(first.acquire(other)["tree"]), Path(second.acquire(host.indexes / "a.clip")["tree"])]
        for number in range(20):
            for tree in trees:
                assert (tree / f"common/{number:02d}").read_bytes() == smallimage.noise(100 + number, 400_000)
        names = {layer["blob"] for layer in host.status()["layers"]}
        assert len(names) > len({name.partition("-")[0] for name in names})


def image_of(host: Host) -> str:
    return str(codec.decode(good(host)).image)


@pytest.mark.parametrize("change", [elsewhere, false_digests, false_points])
def test_a_false_index_of_the_same_layers_harms_nobody_else(host: Host, change: object) -> None:
    """Mounted first: with false span digests or false restart points it has its own blobs; with true ones and a false
    repository it is not mounted, since that repository has no such layer."""
    false = host.indexes / "false.clip"
    false.write_bytes(encoded(good(host), change))
    with Client(host) as bad, Client(host) as client:
        answer = bad.acquire(false)
        if change is elsewhere:
            refused(answer, "NotFoundError", "does not confirm", "no/such/repository")
        else:
            assert answer["ok"], answer
            fd = os.open(Path(answer["tree"]) / "common/19", os.O_RDONLY)
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(fd, 4096, 0)
            os.close(fd)
        tree = Path(client.acquire(host.indexes / "a.clip")["tree"])
        for number in range(20):
            data = (tree / f"common/{number:02d}").read_bytes()
            assert data == smallimage.noise(100 + number, 400_000)
    wait_for("the trees are unmounted", lambda: not trees(host))
