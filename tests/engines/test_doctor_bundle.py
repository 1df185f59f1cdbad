"""`doctor --bundle`: a bundle that starts, and each thing that keeps one from it, named before runc is asked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import bundle
from tests.support.doctor import doctor
from tests.support.host import Host
from tests.support.proxy import Proxy

Indexed = Callable[[str], Path]


@pytest.fixture(scope="module")
def host(registry_address: str) -> Iterator[Host]:
    with Host() as made:
        made.trust_registry(registry_address)
        made.start_daemon()
        yield made


def looked_at(host: Host, made: Path) -> list[tuple[str, str]]:
    """(status, found), in order."""
    return [(item["status"], item["found"]) for item in doctor(host, more=("--bundle", made))["bundle"]]


def edit(made: Path, **sections: Any) -> None:
    spec = json.loads((made / "config.json").read_text())
    for key, value in sections.items():
        spec[key] = {**spec[key], **value} if isinstance(spec.get(key), dict) else value
    (made / "config.json").write_text(json.dumps(spec))


def test_a_bundle_that_starts(host: Host, indexed: Indexed, tmp_path: Path) -> None:
    made = bundle.make(tmp_path / "good", ["sh", "-c", "true"], index=indexed("small"))
    before = (made / "config.json").read_bytes()
    found = looked_at(host, made)
    assert {status for status, _ in found} == {"ok"}
    texts = " | ".join(text for _, text in found)
    for part in ("annotation: ", "mounted by erofs", "layers at", "/proc, /dev and /sys", "links are whole", "/bin/sh"):
        assert part in texts
    assert (made / "config.json").read_bytes() == before
    assert host.run(*host.oci, "run", "--bundle", made, "good").returncode == 0


def test_without_a_reference(host: Host, tmp_path: Path) -> None:
    made = bundle.make(tmp_path / "plain", ["true"])
    assert looked_at(host, made)[-1] == ("skipped", "there is no reference: runc gets the container untouched")


@pytest.mark.parametrize(
    ("args", "sections", "text"),
    [
        (["/no/such"], {}, "/no/such is not in the root"),
        (["no-such"], {}, "no-such in PATH=.* is not in the root"),
        (["/data/one"], {}, r"/data/one cannot be executed \(mode 0640\)"),
        ([], {}, "process.args names no program"),
        (["sh"], {"mounts": [{"destination": "/x", "source": "/no/such", "options": ["bind"]}]}, "/no/such, to be"),
        (["sh"], {"linux": {"uidMappings": [{"containerID": 0}]}}, "has a user namespace"),
        (["sh"], {"annotations": {"io.clip.index": "/etc/passwd"}}, "lies below no directory of `trust.paths`"),
        (["sh"], {"annotations": {"io.clip.index": "x.clip"}}, "names no place of an index"),
        (["sh"], {"annotations": {"io.clip.index": "$INDEXES/none.clip"}}, "cannot be opened"),
        (["sh"], {"annotations": {"io.clip.index": "$INDEXES/damaged.clip"}}, r"IndexFormatError"),
        (["sh"], {"annotations": {"io.clip.index": "image://10.255.255.1.invalid/x:y"}}, "RegistryError"),
        (["sh"], {"root": {"path": 7}}, "`root.path` must name a directory"),
    ],
)
def test_what_is_wrong_is_named(
    host: Host, indexed: Indexed, tmp_path: Path, args: list[str], sections: dict[str, Any], text: str
) -> None:
    (host.indexes / "damaged.clip").write_bytes(indexed("small").read_bytes()[:-1])
    made = bundle.make(tmp_path / "bad", args, index=indexed("small"))
    edit(made, **json.loads(json.dumps(sections).replace("$INDEXES", str(host.indexes))))
    failures = [found for status, found in looked_at(host, made) if status == "failed"]
    assert len(failures) == 1
    assert re.search(text, failures[0])


def test_a_program_whose_interpreter_is_missing(host: Host, indexed: Indexed, tmp_path: Path) -> None:
    """In the engine's own layer, over the tree: what runc would call "no such file or directory"."""
    made = bundle.make(tmp_path / "script", ["/start"], index=indexed("small"))
    (made / "rootfs/start").write_text("#!/usr/bin/perl -w\n")
    (made / "rootfs/start").chmod(0o755)
    assert looked_at(host, made)[-1] == ("failed", "/start needs /usr/bin/perl, which is not there")
    (made / "rootfs/start").write_text("#!/bin/sh\n")
    assert looked_at(host, made)[-1] == ("ok", "/start → /bin/sh")


def test_a_layer_that_hides_proc(host: Host, indexed: Indexed, tmp_path: Path) -> None:
    made = bundle.make(tmp_path / "hidden", ["sh"], index=indexed("small"))
    (made / "rootfs/proc").write_text("no directory")
    assert ("failed", "/proc is no directory") in looked_at(host, made)


def test_a_registry_that_is_away(host: Host, pushed: Callable[[str], str], tmp_path: Path) -> None:
    reference = pushed("small")
    with Proxy(reference.split("/")[0]) as proxy:
        host.trust_registry(proxy.address)
        index = host.index(f"{proxy.address}/{reference.split('/', 1)[1]}", "away")
        made = bundle.make(tmp_path / "away", ["sh"], index=index)
    with Host(settings={"CLIP_SHIM_MOUNT_DEADLINE": "2s"}) as other:  # one that has nothing cached
        other.trust_registry(proxy.address)
        (other.indexes / "away.clip").write_bytes(index.read_bytes())
        edit(made, annotations={"io.clip.index": str(other.indexes / "away.clip")})
        other.start_daemon()
        failures = [found for status, found in looked_at(other, made) if status == "failed"]
    assert len(failures) == 1
    assert "connection refused" in failures[0]


def test_without_a_bundle(host: Host, tmp_path: Path) -> None:
    [(status, found)] = looked_at(host, tmp_path / "none")
    assert status == "failed"
    assert found.endswith("config.json: No such file or directory")
