"""The house rules that tools can check: ruff, mypy, sizes, and who may import whom (shim/ARCHITECTURE.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 400
NO_PACKAGES = ("packaging", "systemd", "hooks")  # names of installed projects: an __init__.py here would hide those

# The table of shim/ARCHITECTURE.md, line by line. A place is a module or a package; the longest match counts.
ROWS: tuple[tuple[str, ...], ...] = (
    ("shim", "shim.errors", "shim.counters", "shim.journal"),
    ("shim.index.model", "shim.index.sparse", "shim.mount.syscalls", "shim.mount.mountinfo", "shim.mount.overlay"),
    ("shim.settings", "shim.log"),
    ("shim.runtime",),
    ("shim.registry",),
    ("shim.layers",),
    ("shim.index",),  # codec, spanfile and what they are made of
    ("shim.erofs",),
    ("shim.goclip",),
    ("shim.fuse",),
    ("shim.mount",),  # mounting trees: EROFS, loop devices, leases, probing
    ("shim.index.merge", "shim.index.build"),
    ("shim.cache",),
    ("shim.stores",),
    ("shim.archive",),
    ("shim.thin",),
    ("shim.tree",),
    ("shim.daemon",),
    ("shim.install",),
    ("shim.doctor",),
    ("shim.runtime_path",),
    ("shim.attach",),
    ("shim.api",),
    ("shim.cli", "shim.__main__"),
)
ROW_OF = {place: row for row, places in enumerate(ROWS) for place in places}
STDLIB_ONLY = (
    "shim.errors",
    "shim.index.model",
    "shim.mount.syscalls",
    "shim.mount.mountinfo",
    "shim.mount.overlay",
    "shim.runtime",
)


def run(*command: str) -> str:
    """The tool's output if it failed, else an empty string."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_ruff_check() -> None:
    assert run("ruff", "check", "--quiet", "shim", "tests") == ""


def test_ruff_format() -> None:
    assert run("ruff", "format", "--quiet", "--diff", "shim", "tests") == ""


def test_mypy_strict() -> None:
    assert run("mypy") == ""


def modules() -> dict[str, Path]:
    """Module name → file, of the product."""
    found = {}
    for path in sorted((ROOT / "shim").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def python_files() -> list[Path]:
    return [*MODULES.values(), *sorted((ROOT / "tests").rglob("*.py"))]


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_module_size(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def imports(path: Path, *, top_level: bool) -> Iterator[str]:
    """Modules of this project that a file imports; with top_level, only what is imported when it is."""
    tree = ast.parse(path.read_text(), str(path))
    late = set()
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if typing_only or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            late |= {id(child) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if top_level and id(node) in late:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                yield full if full in MODULES else module


def row(module: str) -> int:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        place = ".".join(parts[:length])
        if place in ROW_OF:
            return ROW_OF[place]
    raise AssertionError(f"{module} is in no row of shim/ARCHITECTURE.md")


def folder(module: str) -> str:
    return ".".join(module.split(".")[:2]) if module.count(".") > 1 or module in MODULES_WITH_INIT else module


MODULES_WITH_INIT = {name for name, path in MODULES.items() if path.name == "__init__.py"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_from_below(module: str) -> None:
    """Rows above its own in the table (lower numbers here), and its own folder."""
    wrong = [
        other
        for other in imports(MODULES[module], top_level=False)
        if other.split(".")[0] == "shim"
        and other != "shim"
        and folder(other) != folder(module)
        and row(other) >= row(module)
        and not (module == "shim.__main__" and folder(other) == "shim.cli")
    ]
    assert wrong == []


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(STDLIB_ONLY)])
def test_standard_library_only(module: str) -> None:
    """What the wrapper imports at every container start."""
    allowed = sys.stdlib_module_names | {"shim"}
    assert [name for name in imports(MODULES[module], top_level=True) if name.split(".")[0] not in allowed] == []


def test_no_import_cycle() -> None:
    """Among the imports that happen when a module is imported."""
    graph = {
        name: {other for other in imports(path, top_level=True) if other in MODULES} for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " → ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for other in sorted(graph[module] - {module}):
                visit(other, (*trail, module))
            done.add(module)

    for name in graph:
        visit(name, ())


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    """Only packages at the top of the import path can be hidden; inside `shim` a name is safe but misleads readers."""
    names = {path.stem for path in (ROOT / "shim").glob("*.py")} | {p.name for p in ROOT.iterdir() if p.is_dir()}
    assert names & sys.stdlib_module_names - {"__main__", "__init__"} == set()


@pytest.mark.parametrize("name", NO_PACKAGES)
def test_folder_is_no_package(name: str) -> None:
    assert list((ROOT / name).rglob("__init__.py")) == []


def test_packages_are_listed() -> None:
    """setuptools' discovery is off, so that these folders are never installed: every package of ours is named."""
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(MODULES_WITH_INIT)


def test_the_package_has_all_that_is_needed() -> None:
    """Every dependency is bundled by packaging/build.py (PURE, COMPILED), or a package of the distribution that the deb
    and the rpm need."""
    import json
    import re
    import tomllib

    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=!~ \[;]", line)[0].lower() for line in needed}
    script = "import sys, json; sys.path.insert(0, 'packaging'); import build as b; "
    script += "print(json.dumps([[*b.PURE, *b.COMPILED], b._DEB_DEPENDS, b._RPM_DEPENDS]))"
    said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    bundled, deb, rpm = json.loads(said)
    for name in sorted(names - set(bundled) - {"prometheus-client"}):  # Recommends: only for `metrics.listen`
        assert f"python3-{'yaml' if name == 'pyyaml' else name}" in deb
        assert f"python3-{name}" in rpm
