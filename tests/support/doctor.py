"""`clip-shim doctor --json` on a host, as a mapping."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.host import CLIP_SHIM, ROOT, Host

Results = dict[str, list[dict[str, Any]]]


def doctor(
    host: Host,
    *names: str,
    more: tuple[str | Path, ...] = (),
    before: str = "true",
    prefix: str = "",
    env: Mapping[str, str] | None = None,
) -> Results:
    """Check name → its results. names: the checks, all for none; before: shell commands run first, in a mount namespace
    of their own; prefix: a command that runs the doctor."""
    words = [part for name in names for part in ("--check", name)] + [str(word) for word in more]
    script = f'{before.replace("$BASE", str(host.base))} && exec {prefix} "$@"'
    inner = ["unshare", "-m", "sh", "-c", script, "sh", str(CLIP_SHIM), "doctor", "--json", *words]
    if before == "true" and not prefix:
        inner = inner[6:]
    done = host.run(*inner, check=False, env=env, cwd=ROOT)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)["checks"]
    assert all(list(item) == ["check", "status", "found", "expected", "fix"] for item in found)
    worst = {item["status"] for item in found}
    assert done.returncode == (2 if "failed" in worst else 1 if "warning" in worst else 0)
    assert all(item["fix"] for item in found if item["status"] in ("warning", "failed")), "no mend is named"
    by_name: Results = {}
    for item in found:
        by_name.setdefault(item["check"], []).append(item)
    return by_name


def one(results: Results, name: str) -> tuple[str, str]:
    """(status, what was found) of a check with a single result."""
    assert len(results[name]) == 1, results[name]
    return results[name][0]["status"], results[name][0]["found"]


def run(host: Host, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return host.clip("doctor", *words, check=False)
