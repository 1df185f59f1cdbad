"""containerd's CRI plugin: a runtime handler in config.toml or a drop-in (containerd docs/cri/config.md, PLUGINS.md).

Only what comes through the CRI (Kubernetes) uses these tables; `ctr` and nerdctl name the runtime on their own.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from shim.errors import InstallError
from shim.install import running
from shim.install.plan import Plan, Runtime, change, check_free, read
from shim.install.toml import Table, TomlFile

TITLE = "containerd"
CONFIG = Path("/etc/containerd/config.toml")
PROGRAM = "containerd"
SHIM = "io.containerd.runc.v2"
ANNOTATIONS = ["io.clip.*"]
_RELOAD = "systemctl restart containerd   (running containers go on)"
_CRI = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime", 4: "io.containerd.cri.v1.runtime"}
_DROP_IN = "50-clip-shim.toml"
_MERGES = (2, 1)  # from this version on drop-ins are merged; before, one replaces a plugin's whole table
_FILLS = (2, 0)  # from this version on a table `runtimes` adds to containerd's own; before, it takes their place
_KEPT = "containerd's default, which a table without it would take away (clip-shim)"
_STATE = "/run/containerd"
_SECONDS = 20.0


def install(config: Path, runtime: Runtime, *, force: bool) -> Plan:
    """Raises InstallError: the file is not valid or too old, or the name is taken."""
    before = read(config)
    version = installed_version()
    main = TomlFile(config, before if before is not None else _new(version))
    number = _number(main, before is None)
    notes = []
    disabled = main.get("disabled_plugins")
    if isinstance(disabled, list) and any(name in disabled for name in ("cri", _CRI[2], _CRI[number])):
        notes.append(f"`disabled_plugins` in {config} switches the CRI plugin off, and with it every runtime handler")
    target, file, old = config, main, before
    drop_in = _drop_in(config, main, version)
    if drop_in is not None and runtime.name not in main.table(*_path(number)):
        target, old = drop_in, read(drop_in)
        file = TomlFile(target, old if old is not None else f"version = {number}\n".encode())
        _number(file, new=False)
    entry = file.table(*_path(number)).get(runtime.name)
    path = _binary(entry)
    if entry is not None and not force:
        check_free(target, runtime, path)
    if entry is None or path != runtime.path or entry.get("pod_annotations") != ANNOTATIONS:
        if target == config and (version is None or version < _FILLS):
            _keep_default(file, number, config if before is not None else None)
        file.set([*_path(number), runtime.name], _entry(main, number, config, runtime))
        after = file.encode()
    else:
        after = old or b""
    usage = f"runtimeClassName: {runtime.name}   (packaging/kubernetes); ctr run --runc-binary {runtime.path} …"
    check = _checker(number, runtime) if target == config else None
    return Plan(change(target, old, after, check), _RELOAD, usage, notes)


def uninstall(config: Path, runtime: Runtime, *, force: bool) -> Plan:
    """Raises InstallError: the file is not valid, or the entry is not ours."""
    changes = []
    before = read(config)
    if before is None:
        return Plan([], "", "")
    main = TomlFile(config, before)
    number = _number(main, new=False)
    places: list[tuple[Path, TomlFile, bytes]] = [(config, main, before)]
    imported = [(path, read(path)) for path in _imported(config, main)]
    places += [(path, TomlFile(path, data), data) for path, data in imported if data is not None]
    for path, file, old in places:
        version = _number(file, new=False) if path != config and "version" in file.plain else number
        entry = file.table(*_path(version)).get(runtime.name)
        if entry is None:
            continue
        if not force:
            check_free(path, runtime, _binary(entry))
        if file.get("plugins", _CRI[version], "containerd", "default_runtime_name") == runtime.name:
            raise InstallError(
                f"`default_runtime_name` in {path} is {runtime.name}: pods without a class would not start any more",
                hint="set it to runc first",
            )
        for name in (runtime.name, "runc"):
            keys = [*_path(version), name]
            if name == runtime.name or (file.get(*keys) is not None and _KEPT in file.comment(*keys)):
                file.remove(keys)
        after: bytes | None = file.encode()
        if path.name == _DROP_IN and set(file.plain) <= {"version", "plugins"} and "[" not in (after or b"").decode():
            after = None  # all of it was ours
        changes += change(path, old, after, _checker(version, None) if path == config else None)
    return Plan(changes, _RELOAD if changes else "", "")


def configured(config: Path) -> dict[str, str]:
    """Name → BinaryName of the handlers in the file and its imports. Raises InstallError."""
    data = read(config)
    if data is None:
        return {}
    main = TomlFile(config, data)
    found: dict[str, str] = {}
    default = _number(main, new=False)
    for file in [main, *(TomlFile(path, read(path) or b"") for path in _imported(config, main))]:
        number = _number(file, new=False) if "version" in file.plain else default
        found |= {name: _binary(entry) or "" for name, entry in file.table(*_path(number)).items()}
    return found


def files(config: Path) -> list[Path]:
    """The configuration and what it imports, as far as it can be read."""
    data = read(config)
    return [] if data is None else [config, *_imported(config, TomlFile(config, data))]


def users(config: Path, runtime: Runtime) -> list[str]:
    """The containers that run by the runtime now: the shim leaves its options in each bundle."""
    data = read(config)
    state = str(TomlFile(config, data).get("state") or _STATE) if data is not None else _STATE
    found = []
    for bundle in Path(state).glob("io.containerd.runtime.v2.task/*/*"):
        for name in ("runtime", "options.json"):
            try:
                text = (bundle / name).read_text(errors="replace")[:65536]
            except OSError:
                continue
            if runtime.path in text:
                found.append(f"{bundle.parent.name}/{bundle.name}")
                break
    return found


def installed_version(program: str = PROGRAM) -> tuple[int, int] | None:
    """(major, minor) of the containerd that runs, or of that on PATH.

    One that runs in another mount namespace may be a container's, and its program is not one for us to run.
    """
    paths = [process.executable for process in running.find(PROGRAM) if process.root == Path("/")]
    path = next((path for path in paths if _is_roots(path)), None) or _which(program)
    if path is None:
        return None
    match = re.search(r"\bv?(\d+)\.(\d+)\.\d+", running.output([path, "--version"], _SECONDS) or "")
    return (int(match[1]), int(match[2])) if match else None


def _is_roots(path: str) -> bool:
    try:
        return os.stat(path).st_uid in (0, os.geteuid())
    except OSError:
        return False


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/bin:/usr/local/sbin")


def _new(version: tuple[int, int] | None) -> bytes:
    """The start of a configuration where there is none. Both know version 2; only 2.x knows 3."""
    return b"version = 3\n" if version is not None and version >= (2, 0) else b"version = 2\n"


def _number(file: TomlFile, new: bool) -> int:
    """The configuration's version. InstallError for one whose tables are not known."""
    number = file.plain.get("version", 2 if new else 1)
    if number == 1:
        raise InstallError(
            f"{file.path} is a configuration of version 1 (it has no `version`), which is not changed here",
            hint="make it version 2: put `version = 2` first and write plugin names in full, for instance "
            f'[plugins."{_CRI[2]}"] for [plugins.cri], and "{_CRI[2]}" in `disabled_plugins`; '
            "or start from `containerd config default`",
        )
    if type(number) is not int or number not in _CRI:
        raise InstallError(f"{file.path} is a configuration of version {number!r}; 2, 3 and 4 are known")
    return number


def _path(number: int) -> tuple[str, ...]:
    return ("plugins", _CRI[number], "containerd", "runtimes")


def _binary(entry: Any) -> str | None:
    options = entry.get("options") if isinstance(entry, dict) else None
    found = options.get("BinaryName") if isinstance(options, dict) else None
    return found if isinstance(found, str) else None


def _imported(config: Path, main: TomlFile) -> list[Path]:
    """The files that `imports` names, that are there."""
    found: list[Path] = []
    imports = main.get("imports")
    for item in imports if isinstance(imports, list) else []:
        pattern = config.parent / str(item)
        if "*" in pattern.name:
            found += sorted(pattern.parent.glob(pattern.name))
        elif pattern.exists():
            found.append(pattern)
    return found[:256]


def _drop_in(config: Path, main: TomlFile, version: tuple[int, int] | None) -> Path | None:
    """Where a drop-in of ours would be read and merged; None if nowhere."""
    imports = main.get("imports")
    if version is None or version < _MERGES or not isinstance(imports, list):
        return None
    for item in imports:
        pattern = config.parent / str(item)
        if fnmatch.fnmatchcase(_DROP_IN, pattern.name):
            return pattern.parent / _DROP_IN
    return None


def _entry(main: TomlFile, number: int, config: Path, runtime: Runtime) -> Table:
    """Our handler: the options of the default one (SystemdCgroup above all), but our binary."""
    default = _default(main, number, config)
    options = default.get("options")
    kept = {key: value for key, value in options.items() if value} if isinstance(options, dict) else {}
    kept["BinaryName"] = runtime.path
    return {"runtime_type": SHIM, "pod_annotations": list(ANNOTATIONS), "options": kept}


def _default(main: TomlFile, number: int, config: Path) -> Table:
    """The default runtime's table, as the file has it, or as containerd fills it in."""
    name = str(main.get("plugins", _CRI[number], "containerd", "default_runtime_name") or "runc")
    found = main.table(*_path(number)).get(name)
    if found is None:
        program = _which(PROGRAM)
        words = ["--config", str(config), "config", "dump"] if config.exists() else ["config", "default"]
        text = running.output([program, *words], _SECONDS) if program else None
        try:
            dumped = TomlFile(config, (text or "").encode())
            found = dumped.table(*_path(_number(dumped, new=True))).get(name)
        except InstallError:
            found = None
    return found if isinstance(found, dict) else {}


def _keep_default(file: TomlFile, number: int, config: Path | None) -> None:
    """A table `runtimes` in the file takes the place of containerd 1.x's own, which has runc: name that as well."""
    if file.table(*_path(number)):
        return
    name = str(file.get("plugins", _CRI[number], "containerd", "default_runtime_name") or "runc")
    default = _default(file, number, config or file.path)
    entry: Table = {"runtime_type": str(default.get("runtime_type") or SHIM)}
    options = default.get("options")
    if isinstance(options, dict) and any(options.values()):
        entry["options"] = {key: value for key, value in options.items() if value}
    file.set([*_path(number), name], entry, _KEPT)


def _checker(number: int, runtime: Runtime | None) -> Any:
    """Ask containerd itself whether it takes the file, and whether the handler is in what it makes of it."""

    def check(path: Path) -> None:
        program = _which(PROGRAM)
        version = installed_version()
        if program is None or (number > 2 and (version is None or version < (2, 0))):
            return
        try:
            done = subprocess.run(
                [program, "--config", str(path), "config", "dump"],
                capture_output=True, text=True, errors="replace", timeout=20, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return
        if done.returncode:
            said = " ".join(done.stderr.split())[-500:]
            raise InstallError(f"containerd does not take the configuration: {said}", hint="mend the file first")
        dumped = TomlFile(path, done.stdout.encode())
        handlers = dumped.table(*_path(_number(dumped, new=True)))
        if runtime is not None and _binary(handlers.get(runtime.name)) != runtime.path:
            raise InstallError(
                f"containerd reads the file, but finds no runtime {runtime.name} in it",
                hint="see `containerd config dump`: an import may replace the CRI plugin's table",
            )

    return check
