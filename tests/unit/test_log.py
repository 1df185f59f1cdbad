"""Log lines as people, files and the journal get them."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from shim import journal, log
from shim.counters import SECONDS, Histogram


def written(code: str, **more: str) -> str:
    """stderr of a process that logs, which is no terminal."""
    script = f"from shim import log\n{code}"
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **more}
    ).stderr


def test_json_with_the_fields_of_the_context() -> None:
    code = "with log.context(container='c1', image=None):\n    log.info('hello', layer='sha256:ab')\nlog.info('bye')"
    first, second = map(json.loads, written(code).splitlines())
    assert (first["event"], first["container"], first["layer"], first["level"]) == ("hello", "c1", "sha256:ab", "info")
    assert "image" not in first
    assert "container" not in second


def test_console_when_asked_for() -> None:
    assert "hello" in written("log.configure('info', 'console'); log.info('hello', a=1)")


def parse(data: bytes) -> dict[str, str]:
    """The native journal protocol."""
    found = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack_from("<Q", data)
            value, data = data[8 : 8 + length], data[9 + length :]
        found[name.decode()] = value.decode()
    return found


@pytest.fixture
def receiver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    path = f"/tmp/clip-journal-{os.getpid()}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.settimeout(10)
    if os.path.exists(path):
        os.unlink(path)
    sock.bind(path)
    os.rename(path, tmp_path / "journal")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal, "SOCKET", "journal")
    return sock


def test_journal_fields(receiver: socket.socket) -> None:
    log.configure("info", "journal")
    try:
        with log.context(container="c1"):
            log.warning("two\nlines", layer="sha256:ab", hint=None, bad="\udc80")
            fields = parse(receiver.recv(65536))
            try:
                raise ValueError("why")
            except ValueError:
                log.exception("failed")
            failed = parse(receiver.recv(65536))
        assert fields["PRIORITY"] == "4"
        assert fields["CLIP_CONTAINER"] == "c1"
        assert fields["CLIP_LAYER"] == "sha256:ab"
        assert fields["MESSAGE"].startswith("two\nlines container=c1 layer=sha256:ab")
        assert fields["SYSLOG_IDENTIFIER"] == "clip-shim"
        assert "CLIP_HINT" not in fields
        assert fields["CLIP_BAD"] == "\\udc80"
        assert failed["PRIORITY"] == "3"
        assert "ValueError: why" in failed["MESSAGE"]
        log.info("long", text="x" * 100_000)
        assert len(receiver.recv(1 << 20)) < 60_000
    finally:
        log.configure("info", "auto")


def test_a_journal_that_is_gone_costs_no_line(
    receiver: socket.socket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "journal").unlink()
    log.configure("info", "journal")
    try:
        log.info("still here", a=1)
        assert capsys.readouterr().err == "still here a=1\n"
    finally:
        log.configure("info", "auto")


def test_the_journal_is_taken_when_stderr_leads_there(tmp_path: Path) -> None:
    code = "import os; s = os.fstat(2); os.environ['JOURNAL_STREAM'] = f'{s.st_dev}:{s.st_ino}'; print(log._form())"
    done = subprocess.run([sys.executable, "-c", f"from shim import log\n{code}"], capture_output=True, text=True)
    assert done.stdout == "journal\n"
    done = subprocess.run(
        [sys.executable, "-c", "from shim import log\nprint(log._form())"],
        capture_output=True,
        text=True,
        env={**os.environ, "JOURNAL_STREAM": "1:2"},
    )
    assert done.stdout == "json\n"


def test_histogram() -> None:
    histogram = Histogram()
    for seconds in (0.0, 0.001, 0.0011, 59, 61):
        histogram.add(seconds)
    buckets = dict(histogram.buckets())
    assert buckets[0.001] == 2
    assert buckets[0.0025] == 3
    assert buckets[60.0] == 4
    assert buckets[float("inf")] == histogram.count == 5
    assert len(buckets) == len(SECONDS) + 1
    assert histogram.sum == pytest.approx(120.0021)
