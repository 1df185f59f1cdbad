"""image://REF: looked up in the stores, made once if none has it, also when many ask at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.support.daemonclient import Client, log_lines
from tests.support.host import Host
from tests.support.registry import Registry


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with Registry() as registry:
        images.push(images.image("small"), registry.host)
        yield registry


@pytest.fixture(scope="module")
def host(registry: Registry) -> Iterator[Host]:
    with Host() as made:
        made.trust_registry(registry.host)
        made.start_daemon()
        yield made


def ask(host: Host, value: str, source: str = "mount") -> dict[str, Any]:
    """The daemon's last word: what may come before it says how long to wait."""
    with Client(host) as client:
        answer = client.ask({"op": "acquire", "source": source, "value": value})
        while "wait" in answer:
            answer = client.receive()
        return answer


def test_twenty_at_once_make_the_index_once(host: Host, registry: Registry) -> None:
    value = f"image://{registry.host}/small:latest"
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: ask(host, value), range(20)))
    assert {answer.get("ok") for answer in answers} == {True}, answers
    assert len({answer["index"] for answer in answers}) == 1
    assert len(log_lines(host, "indexed")) == 1
    kept = list((host.state_dir / "indexes").rglob("sha256-*.clip"))
    assert len(kept) == 1
    assert Path(answers[0]["tree"], "bin").is_dir()
    assert ask(host, value)["index"] == answers[0]["index"]
    assert len(log_lines(host, "indexed")) == 1


def test_the_command_waits_as_long_as_it_is_told(host: Host, registry: Registry) -> None:
    target = host.base / "mnt"
    target.mkdir()
    host.clip("mount", f"image://{registry.host}/small:latest", target)
    assert (target / "bin").is_dir()
    host.clip("umount", target)


def test_what_cannot_be_made_is_told_to_all(host: Host, registry: Registry) -> None:
    answers = [ask(host, f"image://{registry.host}/{name}") for name in ("absent:latest", "small:absent", "Bad Name")]
    assert [answer["kind"] for answer in answers] == ["NotFoundError", "NotFoundError", "ImageReferenceError"]
    answer = ask(host, "image://169.254.169.254/small:latest")
    assert answer["kind"] == "TrustError"
