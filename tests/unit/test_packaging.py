"""What the packages hold that is made from the product's tables, and what is told to those who operate it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shim import settings
from shim.cli.main import VERBS
from shim.install.engines import ENGINES

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "packaging/monitoring"


def generated(what: str, module: str = "generate") -> str:
    script = f"import sys; sys.path.insert(0, 'packaging'); import {module}; print({what}, end='')"
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_the_default_configuration_changes_nothing(tmp_path: Path) -> None:
    """All commented out: what a later version finds better reaches everybody who did not choose."""
    path = tmp_path / "config.yaml"
    path.write_text(generated("generate.config()"))
    assert set(settings.load(path, env={}).source.values()) == {"default"}
    uncommented = re.sub(r"(?m)^( *)#([a-z0-9_]+:)", r"\1\2", path.read_text())
    path.write_text(uncommented)
    loaded = settings.load(path, env={})
    assert set(loaded.source) == {key for key, where in loaded.source.items() if where == str(path)}
    assert loaded.values == settings.load(env={"CLIP_SHIM_CONFIG": "/dev/null"}).values


def test_the_man_pages_tell_of_everything() -> None:
    commands, keys = generated("'\\0'.join(generate.man_pages().values())").split("\0")
    for verb in VERBS:
        assert re.search(rf"^\.SS {verb}\b", commands, re.MULTILINE)
    for setting in settings.SETTINGS:
        assert setting.key in keys
        assert setting.env in keys.replace("\\-", "-")
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-z"], input=commands + keys, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_completions_are_valid() -> None:
    script = generated("generate.completion('bash')")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    ask = f"{script}\nCOMP_WORDS=(clip-shim sta); COMP_CWORD=1; _shtab_clip_shim; echo ${{COMPREPLY[*]}}"
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True)
    assert done.stdout.split() == ["status"]


@pytest.mark.parametrize("name", ["postinstall", "preremove", "postremove"])
def test_maintainer_scripts_are_valid(name: str) -> None:
    path = ROOT / "packaging/scripts" / name
    assert subprocess.run(["sh", "-n", path]).returncode == 0
    assert path.stat().st_mode & 0o111


@pytest.mark.parametrize("engine", sorted(ENGINES.keys() - {"podman-hooks"}))
def test_a_removal_names_the_files_that_install_wrote(engine: str, tmp_path: Path) -> None:
    config = tmp_path / str(ENGINES[engine].config).lstrip("/")
    config.parent.mkdir(parents=True)
    config.write_text("/usr/lib/clip-shim/libexec/clip-shim-runtime")
    script = (ROOT / "packaging/scripts/preremove").read_text()
    for place in ("/etc/", "/run/systemd", "/usr/lib/"):
        script = script.replace(place, f"{tmp_path}{place}")
    done = subprocess.run(
        ["sh", "-s", "remove"], input=script, capture_output=True, text=True, env={"CLIP_SHIM_FORCE": "1"}
    )
    assert done.returncode == 0
    assert f"{config} still names it" in done.stderr


def test_alert_rules() -> None:
    """promtool has the last word (`make package-test`)."""
    (group,) = yaml.safe_load((MONITORING / "prometheus-rules.yml").read_text())["groups"]
    for rule in group["rules"]:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert set(rule["annotations"]) == {"summary", "description"}
    operations = (ROOT / "systemd/README.md").read_text()
    for metric in re.findall(r"clip_shim_[a-z_]+", json.dumps(group)):
        assert metric.removesuffix("_bucket") in operations


def test_the_dashboard_is_one() -> None:
    board = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(places)) == len(places)
    assert all(target["expr"] and panel["title"] for panel in board["panels"] for target in panel["targets"])
