"""`clip-shim report` in a real browser. Not a tier of `make test`: Chromium is large (`make browser-test`)."""

from __future__ import annotations

import html
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shim.cli.report import page
from tests.support import bundle
from tests.support.host import Host

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=5000",
)


def browse(path: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = ["chromium", *FLAGS, f"--user-data-dir={profile}", *flags, f"file://{path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    assert console == []  # a script error, or something that the page's policy refused
    return done


def texts(document: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"(?s)<(script|style).*?</\1>", "", document)))


@pytest.fixture(scope="module")
def record(pushed: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("report")
    with Host() as host:
        host.start_daemon()
        index = host.index(pushed("small"), "small")
        made = bundle.make(directory / "b1", ["sh", "-c", "sha256sum /data/*.bin /data/*.txt"], index=index)
        host.run(*host.oci, "run", "--bundle", made, "b1")
        answer: dict[str, Any] = json.loads(host.clip("report", "b1", "--json").stdout)
        return answer


def test_what_it_shows(record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(record))
    document = browse(path, tmp_path / "profile", "--dump-dom").stdout
    assert f'data-ready="{len(record["events"])}"' in document
    assert document.count('class="read"') == len(record["events"]) > 3
    shown = texts(document)
    for text in (record["image"], "b1", "/data/noise.bin", "resolve", "verify", "Slowest reads", f"{record['reads']}"):
        assert text in shown


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fills_the_window(record: dict[str, Any], tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(record))
    picture = tmp_path / "picture.png"
    dark = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    browse(path, tmp_path / "profile", f"--screenshot={picture}", "--window-size=1280,1600", *dark)
    assert picture.stat().st_size > 60_000  # a blank page of this size has 9 kB


def test_hostile_names_stay_text(record: dict[str, Any], tmp_path: Path) -> None:
    evil = "/</script><script>document.title='taken'</script><img src=x onerror=document.title='taken'>"
    path = tmp_path / "evil.html"
    hostile = {**record, "image": evil, "container": evil, "files": [[evil, size] for _, size in record["files"]]}
    path.write_text(page(hostile))
    document = browse(path, tmp_path / "profile", "--dump-dom").stdout
    assert "<title>clip-shim: what a start read</title>" in document
    assert f'data-ready="{len(record["events"])}"' in document
    assert evil in texts(document.replace("&lt;", "\0").replace("&gt;", "\1")).replace("\0", "<").replace("\1", ">")


def test_a_start_that_read_nothing(record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "empty.html"
    empty = {**record, "events": [], "file_of": [], "files": [], "timings_ms": {}, "reads": 0, "layer_bytes": [0]}
    path.write_text(page(empty))
    assert "Nothing was read" in texts(browse(path, tmp_path / "profile", "--dump-dom").stdout)
