"""The settings table: sources, order, and what a wrong value is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shim import settings
from shim.cli.config import default_yaml
from shim.errors import ConfigError


def test_order_is_default_file_environment_flag(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("fetch: {threads: 3}\nread_deadline: 5m\nlog: {level: debug}\n")
    env = {"CLIP_SHIM_CONFIG": str(file), "CLIP_SHIM_FETCH_THREADS": "4", "CLIP_SHIM_LOG_LEVEL": "error"}
    loaded = settings.load(env=env, flags={"log.level": "warning"})
    assert loaded["read_deadline"] == 300
    assert loaded["fetch.threads"] == 4
    assert loaded["log.level"] == "warning"
    assert loaded["tree"] == "auto"
    assert loaded.source["fetch.threads"] == "CLIP_SHIM_FETCH_THREADS"
    assert loaded.source["read_deadline"] == str(file)
    assert loaded.source["tree"] == "default"


def test_default_file_reads_back_to_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(default_yaml())
    assert settings.load(file, env={}).values == settings.load(env={"CLIP_SHIM_CONFIG": str(_empty(tmp_path))}).values


def _empty(tmp_path: Path) -> Path:
    file = tmp_path / "empty.yaml"
    file.write_text("")
    return file


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("fetch: {thread: 3}", "unknown key `fetch.thread`", "did you mean `fetch.threads`?"),
        ("tre: auto", "unknown key `tre`", "did you mean `tree`?"),
        ("tree: zfs", "`tree` is 'zfs', it must be one of auto, erofs, erofs-loop, fuse", None),
        ("read_deadline: soon", "`read_deadline` is 'soon', it must be a duration such as 500ms, 60s or 5m", None),
        ("fetch: {readahead: -1}", "`fetch.readahead` is -1, it must be a size such as 512MiB or 10G", None),
        ("state_dir: here", "`state_dir` is 'here', it must be an absolute path", None),
        ("fetch: {readahead: true}", "it must be a size such as 512MiB or 10G", None),
        (f"fetch: {{readahead: {'9' * 400}}}", "it must be a size such as 512MiB or 10G", None),
        ("fetch: {threads: 0}", "`fetch.threads` is 0, it must be a whole number from 1 to 256", None),
        ("fetch: {threads: 100000000}", "it must be a whole number from 1 to 256", None),
        ("fetch: {threads: -1}", "it must be a whole number from 1 to 256", None),
        ("fetch: 3", "`fetch` must be a table", None),
        ("read_deadline: 0s", "it must be a duration from 100ms to 1h", None),
        ("mount_deadline: 2h", "it must be a duration from 100ms to 1h", None),
        (f"tree_linger: {'9' * 400}", "it must be a duration such as 500ms, 60s or 5m", None),
        ("state_dir: /", "`state_dir` is '/', it must be an absolute path to a directory of our own", None),
        ('state_dir: "/a\\0b"', "it must be an absolute path", None),
        ('run_dir: "/a\\nb"', "it must be an absolute path", None),
        ("trust: {paths: [relative]}", "it must be an absolute path", None),
        ("registries: [1]", "`registries` is [1], it must be a table", None),
        ("- 1", "must hold a table of settings", None),
        ("a: [", "is not valid YAML", None),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str, hint: str | None) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        settings.load(file, env={})
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    if hint:
        assert caught.value.hint == hint


def test_a_group_of_comments_alone_is_empty(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("fetch:\n#  threads: 3\nregistries:\n")
    assert settings.load(file, env={})["fetch.threads"] == 8


def test_a_table_cannot_come_from_the_environment(tmp_path: Path) -> None:
    """Rather than be silently without effect."""
    env = {"CLIP_SHIM_CONFIG": str(_empty(tmp_path)), "CLIP_SHIM_REGISTRIES": "{}"}
    with pytest.raises(ConfigError, match=r"CLIP_SHIM_REGISTRIES: .* must be a table in the configuration file"):
        settings.load(env=env)


def test_directories_are_normal(tmp_path: Path) -> None:
    """They are compared with what the kernel says of mounts."""
    env = {"CLIP_SHIM_CONFIG": str(_empty(tmp_path)), "CLIP_SHIM_RUN_DIR": "/run//x/../clip/"}
    assert settings.load(env=env)["run_dir"] == "/run/clip"


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.yaml: No such file"):
        settings.load(tmp_path / "none.yaml", env={})


def test_every_default_parses() -> None:
    for setting in settings.SETTINGS:
        setting.parse(setting.default)
        assert setting.help
        assert yaml.safe_load(default_yaml())


def test_the_reference_is_up_to_date() -> None:
    """packaging/CONFIGURATION.md is made from the table: after a change of a setting run `make docs`."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "packaging/generate.py", "reference"], cwd=root, capture_output=True, text=True
    )
    assert (root / "packaging/CONFIGURATION.md").read_text() == done.stdout, "run `make docs`"
