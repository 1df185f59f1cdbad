"""The one table of settings: YAML key, `CLIP_SHIM_*` variable, default and help all come from here.

Order: defaults < /etc/clip-shim/config.yaml < environment < flags. An unknown key is an error that names the nearest.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shim.errors import ConfigError

DEFAULT_CONFIG = Path("/etc/clip-shim/config.yaml")


_MAX_DIGITS = 15


def _size(value: object) -> int:
    match = re.fullmatch(r"([0-9]+)\s*([kmgt]?)(i?b)?", str(value).strip().lower())
    if not match or isinstance(value, bool) or len(match[1]) > _MAX_DIGITS:
        raise ValueError("a size such as 512MiB or 10G")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}[match[2]]


def _seconds(value: object) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d|)", str(value).strip().lower())
    if not match or len(match[1]) > _MAX_DIGITS:
        raise ValueError("a duration such as 500ms, 60s or 5m")
    return float(match[1]) * {"ms": 0.001, "s": 1, "": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


def _deadline(value: object) -> float:
    seconds = _seconds(value)
    if not 0.1 <= seconds <= 3600:
        raise ValueError("a duration from 100ms to 1h")
    return seconds


def _share(value: object) -> float:
    match = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]+)?)\s*%", str(value).strip())
    number = float(match[1]) if match else 0.0 if str(value).strip() in ("0", "0.0") else 100.0
    if number >= 100:
        raise ValueError("a share below 100 %, such as 20%, or 0")
    return number / 100


def _bool(value: object) -> bool:
    text = str(value).strip().lower()
    if text in ("true", "yes", "on", "1"):
        return True
    if text in ("false", "no", "off", "0"):
        return False
    raise ValueError("true or false")


def _threads(value: object) -> int:
    match = re.fullmatch(r"[0-9]{1,3}", str(value).strip())
    if not match or not 1 <= int(match[0]) <= 256:
        raise ValueError("a whole number from 1 to 256")
    return int(match[0])


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError("a text")
    return value


def _path(value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/") or not value.isprintable():
        raise ValueError("an absolute path")
    return value


def _directory(value: object) -> str:
    path = os.path.normpath(_path(value))
    if path.strip("/") == "":
        raise ValueError("an absolute path to a directory of our own")
    return path


def _paths(value: object) -> tuple[str, ...]:
    items = value.split(":") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise ValueError("a list of absolute paths")
    return tuple(_path(item) for item in items if item != "")


def _texts(value: object) -> tuple[str, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise ValueError("a list of texts")
    return tuple(_text(item) for item in items if item != "")


def _steps(value: object) -> tuple[str, ...]:
    steps = _texts(value)
    if not steps or len(set(steps)) != len(steps) or not set(steps) <= {"lazy", "archive", "eager"}:
        raise ValueError("a list of lazy, archive and eager, each at most once")
    return steps


def _choice(*allowed: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value not in allowed:
            raise ValueError("one of " + ", ".join(allowed))
        return str(value)

    return parse


def _table(value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, str):
        raise ValueError("a table in the configuration file")
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("a table")
    return dict(value)


def _listen(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(_LISTEN)
    path = value.removeprefix("unix:")
    if value == "" or (path != value and path.startswith("/") and path.isprintable()):
        return value
    match = re.fullmatch(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", value)
    if not match or int(match[1]) > 65535:
        raise ValueError(_LISTEN)
    return value


_LISTEN = "empty, unix:/path/of/a/socket, or host:port such as 127.0.0.1:9736"


@dataclass(frozen=True, slots=True)
class Setting:
    key: str  # dotted YAML path; the environment name is CLIP_SHIM_ + key with dots as underscores, upper case
    parse: Callable[[object], Any]
    default: Any  # as a person would write it in YAML
    help: str

    @property
    def env(self) -> str:
        return "CLIP_SHIM_" + self.key.replace(".", "_").upper()


SETTINGS: tuple[Setting, ...] = (
    Setting("state_dir", _directory, "/var/lib/clip-shim", "what survives a reboot: cache, trees, indexes, uppers"),
    Setting("run_dir", _directory, "/run/clip-shim", "what does not: sockets, mounts, state of running containers"),
    Setting(
        "runtimes",
        _texts,
        ["/usr/sbin/runc", "/usr/bin/runc", "/usr/local/sbin/runc", "/usr/bin/crun"],
        "low-level runtimes, the first that exists is used",
    ),
    Setting(
        "tree",
        _choice("auto", "erofs", "erofs-loop", "fuse"),
        "auto",
        "how a tree is mounted; auto takes the best that works here",
    ),
    Setting("read_deadline", _deadline, "60s", "how long a read may wait for the registry before it gets EIO"),
    Setting("mount_deadline", _deadline, "30s", "how long a create may wait for its tree"),
    Setting(
        "image_deadline",
        _deadline,
        "10m",
        "how long a create may wait while image://REF is indexed, or an image is fetched whole",
    ),
    Setting(
        "lazy_deadline", _deadline, "20s", "how long the step lazy of `fallback` may take when another one follows"
    ),
    Setting(
        "fallback",
        _steps,
        ["lazy", "archive", "eager"],
        "how a tree is made, tried in order: lazy; archive, a v1 archive of the image; eager, all layers fetched first",
    ),
    Setting("tree_linger", _seconds, "5m", "how long a tree stays mounted after its last user"),
    Setting("fetch.threads", _threads, 8, "how many ranges are fetched at once"),
    Setting("fetch.readahead", _size, "8MiB", "how far sequential reads are fetched ahead, uncompressed bytes"),
    Setting(
        "fetch.profile", _bool, True, "fetch ahead what an image's first start read; record it where none is known"
    ),
    Setting("background.enabled", _bool, True, "fetch the rest of what containers use when they are quiet"),
    Setting("background.after", _seconds, "60s", "quiet: for so long no read of a layer had to wait"),
    Setting("background.rate", _size, "20M", "bytes a second that this may take from a registry; 0: no limit"),
    Setting("background.max_image", _size, "10GiB", "not for images larger than this, compressed; 0: for all"),
    Setting("cache.max_bytes", _size, "0", "what layers, trees and indexes may take on disk together; 0: no limit"),
    Setting("cache.max_age", _seconds, "30d", "what nobody has used for so long is deleted; 0: never"),
    Setting("cache.free_low", _share, "20%", "free space below which the cleaner works (kubelet evicts pods at 15%)"),
    Setting("cache.free_high", _share, "25%", "and how much it then makes free"),
    Setting("reference.annotation", _bool, True, "accept the annotation io.clip.index"),
    Setting("reference.bundle", _bool, True, "accept index.clip in the bundle directory"),
    Setting("reference.marker", _bool, True, "accept /.clip/index.clip in the rootfs' lower layers"),
    Setting("reference.env", _bool, False, "accept CLIP_INDEX in process.env: names and digests only"),
    Setting(
        "trust.paths",
        _paths,
        ["/var/lib/clip-shim/indexes", "/etc/clip-shim/indexes"],
        "directories an annotation's path may lie under; they must be root's",
    ),
    Setting(
        "trust.registries",
        _texts,
        ["*"],
        "registries an index may lead to (host[:port][/repository], * matches any that is not loopback or link-local)",
    ),
    Setting(
        "trust.sources",
        _table,
        {},
        "rules by where a reference stands: {annotation|bundle|marker|env|mount: {registries: […], stores: […]}}",
    ),
    Setting(
        "trust.stores",
        _texts,
        [],
        "further s3://BUCKET/PREFIX that references may name, beside those of `stores`; * is any",
    ),
    Setting(
        "trust.cached",
        _choice("confirmed", "if-cached"),
        "confirmed",
        "whether an image gets layers of the cache when its registry has confirmed that it may read them, or unasked",
    ),
    Setting(
        "stores.lookup",
        _texts,
        [],
        "where an image's index is looked up after `state_dir`/indexes: s3://BUCKET/PREFIX/, oci (beside the image)",
    ),
    Setting("stores.write", _texts, [], "where the indexes that a node makes for image://REF are put as well"),
    Setting("stores.s3", _table, {}, "per bucket, or *: endpoint, region, path_style, profile, ca"),
    Setting("registries", _table, {}, "per registry: mirrors, ca, client certificate, plain http, headers"),
    Setting(
        "metrics.listen",
        _listen,
        "",
        "where Prometheus metrics are served: host:port or unix:/path; empty for nowhere",
    ),
    Setting(
        "report.seconds",
        _seconds,
        "30s",
        "how long the reads of a starting container are recorded for `clip-shim report`; 0 for not at all",
    ),
    Setting("log.level", _choice("debug", "info", "warning", "error"), "info", "least level that is logged"),
    Setting(
        "log.format",
        _choice("auto", "console", "json", "journal"),
        "auto",
        "auto is console on a terminal, journal (fields) under systemd, json elsewhere",
    ),
)
BY_KEY = {setting.key: setting for setting in SETTINGS}


@dataclass(frozen=True, slots=True)
class Settings:
    """Parsed settings. `settings["fetch.threads"]` gives the parsed value; `source` says where a key came from."""

    values: Mapping[str, Any]
    source: Mapping[str, str]

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    @property
    def state_dir(self) -> Path:
        return Path(self["state_dir"])

    @property
    def run_dir(self) -> Path:
        return Path(self["run_dir"])


def _flatten(data: Mapping[str, object], prefix: str, where: str) -> dict[str, object]:
    flat: dict[str, object] = {}
    groups = {key.rsplit(".", 1)[0] for key in BY_KEY if "." in key}
    for name, value in data.items():
        key = prefix + str(name)
        if key in BY_KEY:
            flat[key] = value
        elif key in groups and (value is None or isinstance(value, dict)):  # None: all its keys are comments
            flat |= _flatten(value or {}, key + ".", where)
        elif key in groups:
            raise ConfigError(f"{where}: `{key}` must be a table")
        else:
            near = difflib.get_close_matches(key, [*BY_KEY, *groups], n=1)
            hint = f"did you mean `{near[0]}`?" if near else None
            raise ConfigError(f"{where}: unknown key `{key}`", hint=hint)
    return flat


def load(
    path: Path | None = None, env: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None
) -> Settings:
    """Read all sources. A missing default file is fine, a missing file that was named is not.

    Raises ConfigError: one line that names the file or variable, the key and what it should be.
    """
    env = os.environ if env is None else env
    named = path or (Path(env["CLIP_SHIM_CONFIG"]) if "CLIP_SHIM_CONFIG" in env else None)
    raw: dict[str, tuple[object, str]] = {s.key: (s.default, "default") for s in SETTINGS}
    file = named or DEFAULT_CONFIG
    if named is not None or file.exists():
        raw |= {key: (value, str(file)) for key, value in _read_yaml(file).items()}
    raw |= {s.key: (env[s.env], s.env) for s in SETTINGS if s.env in env}
    raw |= {key: (value, "flag") for key, value in (flags or {}).items() if value is not None}
    values: dict[str, Any] = {}
    for key, (value, where) in raw.items():
        try:
            values[key] = BY_KEY[key].parse(value)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{where}: `{key}` is {value!r}, it must be {error}") from None
    return Settings(values, {key: where for key, (_, where) in raw.items()})


def _read_yaml(file: Path) -> dict[str, object]:
    import yaml  # late: the command line's quick verbs do not need it

    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{file} must hold a table of settings")
    return _flatten(data, "", str(file))
