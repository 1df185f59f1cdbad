"""State on disk that is torn, stale or damaged: made again, never mounted as it is. And nothing grows over time."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support import images, smallimage
from tests.support.daemonclient import Client, acquire, server_pid, trees
from tests.support.host import Host, wait_for
from tests.support.registry import Registry


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as registry:
        for name in ("shared-a", "small"):
            images.push(images.image(name), registry.host)
        yield registry


@pytest.fixture(scope="module")
def host(registry: Registry) -> Iterator[Host]:
    with Host(settings={"CLIP_SHIM_TREE_LINGER": "200ms"}) as made:
        made.trust_registry(registry.host)
        made.index(f"{registry.host}/shared-a:latest", "a")
        made.index(f"{registry.host}/small:latest", "small")  # its EROFS image needs bytes of the layers
        made.start_daemon()
        yield made


def read_all(host: Host, name: str) -> Path:
    """Acquire, and compare what can be read; the directory of the tree's state, once nothing is mounted any more."""
    with Client(host) as client:
        answer = client.acquire(host.indexes / f"{name}.clip")
        assert answer["ok"], answer
        tree = Path(answer["tree"])
        if name == "a":
            for number in range(20):
                data = (tree / f"common/{number:02d}").read_bytes()
                assert data == smallimage.noise(100 + number, 400_000)
        else:
            assert (tree / "data/one").read_bytes() == b"changed in a higher layer"
            assert (tree / "data/noise.bin").read_bytes() == smallimage.noise(1, 3_000_001)
    wait_for("the tree is unmounted", lambda: not trees(host) and not host.status()["layers"])
    return host.state_dir / "trees" / tree.name


def edit_meta(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        meta = json.loads((directory / "meta.json").read_text())
        change(meta)
        (directory / "meta.json").write_text(json.dumps(meta))

    return edit


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def _zero(path: Path) -> None:
    """As after a power cut: the length is there, the data is not."""
    path.write_bytes(bytes(path.stat().st_size))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no meta": lambda d: (d / "meta.json").unlink(),
    "meta cut short": lambda d: os.truncate(d / "meta.json", 100),
    "meta of zeros": lambda d: _zero(d / "meta.json"),
    "meta no table": lambda d: (d / "meta.json").write_text("[]"),
    "meta of another version": edit_meta(lambda meta: meta.update(version=0)),
    "meta without layers": edit_meta(lambda meta: meta.pop("layers")),
    "meta with odd layers": edit_meta(lambda meta: meta.update(layers=[1, 2, 3])),
    "meta that names another blob": edit_meta(lambda m: m["layers"][0].update(blob="0" * 64 + "-" + "0" * 16)),  # type: ignore[index]
    "image cut short": lambda d: os.truncate(d / "image.erofs", 4096),
    "image of zeros": lambda d: _zero(d / "image.erofs"),
    "image damaged": lambda d: flip(d / "image.erofs", 2000),
    "image without seal": lambda d: os.truncate(d / "image.erofs", (d / "image.erofs").stat().st_size - 512),
    "image of another version": lambda d: flip(d / "image.erofs", (d / "image.erofs").stat().st_size - 512 + 8),
    "no image": lambda d: (d / "image.erofs").unlink(),
    "spans cut short": lambda d: os.truncate(d / "spans.0", 100),
    "spans damaged": lambda d: flip(d / "spans.0", 300),
    "no spans": lambda d: (d / "spans.0").unlink(),
    "spans of another layer": lambda d: (d / "spans.0").write_bytes((d / "spans.1").read_bytes()),
    "no index": lambda d: (d / "index.clip").unlink(),
    "index cut short, no meta": lambda d: (os.truncate(d / "index.clip", 500), (d / "meta.json").unlink()),
    "leavings of killed jobs": lambda d: [(d / n).write_bytes(b"x") for n in ("image.erofs.7.tmp", "meta.json.tmp")],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["a", "small"])
def test_damage(host: Host, name: str, damage: str) -> None:
    directory = read_all(host, name)
    DAMAGE[damage](directory)
    assert read_all(host, name) == directory
    assert (directory / "meta.json").exists()
    assert not host.run("grep", "-c", "Traceback", host.base / "log/daemon", check=False).stdout.strip("0\n")


def test_a_daemon_tidies_what_a_killed_one_left(registry: Registry) -> None:
    with Host() as host:
        host.trust_registry(registry.host)
        index = host.index(f"{registry.host}/shared-a:latest", "a")
        places = host.state_dir / "trees"
        unfinished = places / ("0" * 64)
        unfinished.mkdir(parents=True)
        (unfinished / "index.clip").write_bytes(b"torn")
        (places / ".incoming-140").write_bytes(b"torn")
        host.start_daemon()
        assert acquire(host, index)["ok"]
        assert [path.name for path in places.iterdir()] == [Path(trees(host)[0]).name]


def test_killed_while_it_prepares(registry: Registry) -> None:
    """SIGKILL of server and jobs at many moments of the first acquire; the next daemon always ends up right."""
    with Host(settings={"CLIP_SHIM_TREE_LINGER": "200ms"}) as host:
        host.trust_registry(registry.host)
        index = host.index(f"{registry.host}/small:latest", "small")
        host.start_daemon()
        for round_ in range(6):
            state = host.state_dir / "trees"
            for directory in state.iterdir():
                (directory / "meta.json").unlink(missing_ok=True)
            pid = server_pid(host)
            client = Client(host)
            client.start_acquire(index)
            before = {path.name for path in state.glob("*/*")}
            moment = (".tmp", "spans.0", "image.erofs", "meta.json", "index.clip", "")[round_]
            wait_for(
                f"{moment} appears",
                partial(_appeared, state, moment, before),
            )
            os.kill(pid, signal.SIGKILL)
            client.close()
            wait_for("another server", lambda pid=pid: _answers(host, pid))
            read_all(host, "small")


def _appeared(state: Path, moment: str, before: set[str]) -> bool:
    """Whether a file with `moment` in its name is there that was not before, or all are."""
    names = {path.name for path in state.glob("*/*")}
    return any(moment in name for name in names - before) or "meta.json" in names


def _answers(host: Host, old: int) -> bool:
    try:
        return server_pid(host) != old
    except OSError:
        return False
