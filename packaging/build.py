"""Builds the deb and the rpm: `make packages`, or `.venv/bin/python packaging/build.py OUTPUT [deb|rpm]…`.

The package has a private library directory, laid out as a virtual environment over the system's Python, whichever
version that is:

    /usr/lib/clip-shim/pyvenv.cfg, bin/python3 → /usr/bin/python3
    /usr/lib/clip-shim/lib/python3/site-packages/   shim, and what a supported distribution lacks or has too old
    /usr/lib/clip-shim/lib/python3.11 … → python3
    /usr/lib/clip-shim/libexec/clip-shim/clip-shim-runtime   what engines run
    /var/lib/clip-shim/runtime.json   its compiled settings, made when the package is installed
    /usr/bin/clip-shim

Everything else that Python needs comes from the distribution. Compiled modules of all supported versions lie side by
side. Man pages, completions, the default configuration and the reference are made from the same tables as `--help`.
"""

from __future__ import annotations

import gzip
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "packaging"))

import generate  # noqa: E402

from shim import __version__  # noqa: E402
from shim.runtime.launcher import launcher_text  # noqa: E402

VERSIONS = ("3.11", "3.12", "3.13", "3.14")
COMPILED = ("isal", "fastcrc", "zlib-ng")  # a wheel for each version of Python
# What Debian 12 has of requests and urllib3 is too old, and its boto3 cannot live with newer ones.
PURE = (
    "mfusepy", "requests", "urllib3", "idna", "certifi", "charset-normalizer", "boto3", "botocore", "s3transfer",
    "jmespath", "python-dateutil", "six", "tomlkit",
)  # fmt: skip
SERVICES = ("s3", "sts", "sso", "sso-oidc", "signin")  # of the four hundred that botocore describes
HOME = Path("/usr/lib/clip-shim")
SITE = HOME / "lib/python3/site-packages"
LIBEXEC = HOME / "libexec/clip-shim"
SETTINGS = Path("/var/lib/clip-shim/runtime.json")
_SUMMARY = "OCI runtime that starts any image in about a second"
_PLATFORMS = {"x86_64": "amd64", "aarch64": "arm64"}
_DEB_DEPENDS = [
    "python3 (>= 3.11)", "python3-structlog", "python3-tomlkit", "python3-tqdm", "python3-yaml", "python3-zstandard",
    "runc | crun", "fuse3", "ca-certificates", "libc6 (>= 2.31)",
]  # fmt: skip
_RPM_DEPENDS = [
    "python3 >= 3.11", "python3-structlog", "python3-tomlkit", "python3-tqdm", "python3-pyyaml", "python3-zstandard",
    "(runc or crun)", "fuse3-libs", "ca-certificates",
]  # fmt: skip


def put(stage: Path, path: Path | str, text: str | bytes, mode: int = 0o644) -> None:
    target = stage / str(path).lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(text.encode() if isinstance(text, str) else text)
    target.chmod(mode)


def link(stage: Path, path: Path, target: str) -> None:
    place = stage / str(path).lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)


def wheels(into: Path) -> list[Path]:
    """The bundled packages' wheels for every version of Python, from the index that pip is configured with."""
    into.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    pip += ["--only-binary=:all:", "-d", str(into)]
    arch = platform.machine()
    tags = [word for tag in ("manylinux2014", "manylinux_2_28") for word in ("--platform", f"{tag}_{arch}")]
    for version in VERSIONS:
        subprocess.run([*pip, "--python-version", version, *tags, *COMPILED], check=True)
    subprocess.run([*pip, "--python-version", VERSIONS[0], "--platform", "any", *PURE], check=True)
    return sorted(into.glob("*.whl"))


def stage_python(stage: Path, cache: Path) -> None:
    """The library directory."""
    site = stage / str(SITE).lstrip("/")
    site.mkdir(parents=True)
    for path in sorted((ROOT / "shim").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            put(stage, SITE / path.relative_to(ROOT), path.read_bytes())
    for wheel in wheels(cache):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    for path in (site / "botocore/data").iterdir():
        if path.is_dir() and path.name not in SERVICES:
            shutil.rmtree(path)
    for library in site.rglob("*.so"):
        subprocess.run(["strip", "--strip-unneeded", str(library)], check=True)
        library.chmod(0o644)
    for junk in (*site.rglob("__pycache__"), *site.rglob("*.pyi"), *site.rglob("py.typed"), *site.rglob("RECORD")):
        shutil.rmtree(junk) if junk.is_dir() else junk.unlink()
    for version in VERSIONS:
        link(stage, HOME / f"lib/python{version}", "python3")
    put(stage, HOME / "pyvenv.cfg", "home = /usr/bin\ninclude-system-site-packages = true\n")
    link(stage, HOME / "bin/python3", "../../../bin/python3")
    put(stage, "/usr/bin/clip-shim", f'#!/bin/sh\nexec {HOME}/bin/python3 -I -m shim "$@"\n', 0o755)
    put(stage, LIBEXEC / "clip-shim-runtime", launcher_text("/usr/bin/python3", SITE / "shim", SETTINGS), 0o755)
    put(stage, LIBEXEC / "settings-at", f"{SETTINGS}\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for place, names in project["tool"]["setuptools"].get("data-files", {}).items():
        for name in names:
            put(stage, HOME / place / Path(name).name, (ROOT / name).read_bytes(), (ROOT / name).stat().st_mode & 0o755)
    for name in ("clip-precreate", "clip-poststop"):
        put(stage, LIBEXEC / name, (ROOT / "hooks" / name).read_bytes(), 0o755)


def stage_rest(stage: Path) -> None:
    """Units, man pages, completions, configuration, documentation."""
    for unit in sorted((ROOT / "systemd").iterdir()):
        if unit.suffix in (".service", ".socket", ".timer"):
            put(stage, f"/usr/lib/systemd/system/{unit.name}", unit.read_bytes())
    put(stage, "/usr/lib/tmpfiles.d/clip-shim.conf", "d /run/clip-shim 0700 root root -\n")
    put(stage, "/etc/clip-shim/config.yaml", generate.config())
    for name, text in generate.man_pages().items():
        put(stage, f"/usr/share/man/man{name[-1]}/{name}.gz", gzip.compress(text.encode(), mtime=0))
    put(stage, "/usr/share/bash-completion/completions/clip-shim", generate.completion("bash"))
    put(stage, "/usr/share/zsh/vendor-completions/_clip-shim", generate.completion("zsh"))
    doc = Path("/usr/share/doc/clip-shim")
    put(stage, doc / "copyright", _copyright())
    override = "# zlib-ng is another library than zlib, and Debian has no Python binding of it\n"
    override += "clip-shim: embedded-library zlib [usr/lib/clip-shim/*/zlib_ng/*]\n"
    put(stage, "/usr/share/lintian/overrides/clip-shim", override)
    put(stage, doc / "README.md", (ROOT / "README.md").read_bytes())
    put(stage, doc / "CONFIGURATION.md", generate.reference())
    put(stage, doc / "OPERATIONS.md", (ROOT / "systemd/README.md").read_bytes())
    put(stage, doc / "changelog.gz", gzip.compress((ROOT / "CHANGELOG.md").read_bytes(), mtime=0))
    for kind in ("monitoring", "kubernetes"):
        for path in sorted((ROOT / "packaging" / kind).rglob("*")):
            if path.is_file():
                put(stage, f"/usr/share/clip-shim/{path.relative_to(ROOT / 'packaging')}", path.read_bytes())


def _copyright() -> str:
    return """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: clip-shim

Files: *
Copyright: 2026 the clip-shim authors
License: Apache-2.0

Files: usr/lib/clip-shim/lib/python3/site-packages/isal*
Copyright: 2020-2026 the python-isal and ISA-L authors, see isal-*.dist-info
License: PSF-2.0 and BSD-3-Clause

Files: usr/lib/clip-shim/lib/python3/site-packages/mfusepy*
Copyright: 2012-2026 the fusepy and mfusepy authors
License: ISC

Files: usr/lib/clip-shim/lib/python3/site-packages/requests*
 usr/lib/clip-shim/lib/python3/site-packages/boto*
 usr/lib/clip-shim/lib/python3/site-packages/s3transfer*
Copyright: 2011-2026 Kenneth Reitz, Amazon.com and the projects' authors
License: Apache-2.0

Files: usr/lib/clip-shim/lib/python3/site-packages/*
Copyright: 2003-2026 the authors that each *.dist-info names
License: bundled

License: Apache-2.0
 On Debian systems the full text is in /usr/share/common-licenses/Apache-2.0.

License: PSF-2.0 and BSD-3-Clause
 See the LICENSE files in isal-*.dist-info.

License: bundled
 MIT, BSD or MPL-2.0: see METADATA and the license files in each *.dist-info.

License: ISC
 See the LICENSE file in mfusepy-*.dist-info.
"""


def contents(stage: Path) -> list[dict[str, object]]:
    """nfpm's list: every file and link of the stage, configuration marked as such."""
    rows: list[dict[str, object]] = []
    for path in sorted(stage.rglob("*")):
        name = "/" + str(path.relative_to(stage))
        if path.is_symlink():
            rows.append({"src": os.readlink(path), "dst": name, "type": "symlink"})
        elif path.is_file():
            info = {"mode": path.stat().st_mode & 0o777, "owner": "root", "group": "root"}
            kind = {"type": "config|noreplace"} if name.startswith("/etc/") else {}
            rows.append({"src": str(path), "dst": name, "file_info": info, **kind})
    return rows


def build(output: Path, formats: list[str], version: str = __version__) -> list[Path]:
    """Build packages into `output`; returns their paths. version: tests upgrade to another."""
    work = output / "work"
    shutil.rmtree(work, ignore_errors=True)
    stage = work / "root"
    stage.mkdir(parents=True)
    stage_python(stage, output / "wheels")
    stage_rest(stage)
    scripts = {name: str(ROOT / f"packaging/scripts/{name}") for name in ("postinstall", "preremove", "postremove")}
    changelog = work / "changelog.yaml"
    changelog.write_text(yaml.safe_dump([_release(version)]))
    config = {
        "name": "clip-shim",
        "arch": _PLATFORMS[platform.machine()],
        "platform": "linux",
        "version": version,
        "release": "1",
        "section": "admin",
        "priority": "optional",
        "maintainer": "clip-shim maintainers <maintainers@clip-shim.invalid>",
        "description": f"{_SUMMARY}\n"
        "clip-shim wraps runc. Containers whose bundle references an index start at\nonce from a lazily loaded tree; "
        "bytes come from the registry when something\nreads them. All other containers are handed to runc untouched.",
        "homepage": "https://clip-shim.invalid/",
        "license": "Apache-2.0",
        "changelog": str(changelog),
        "contents": contents(stage),
        "scripts": scripts,
        "overrides": {
            "deb": {"depends": _DEB_DEPENDS, "recommends": ["python3-prometheus-client"]},
            "rpm": {"depends": _RPM_DEPENDS, "recommends": ["python3-prometheus_client"]},
        },
        "rpm": {
            "group": "System Environment/Daemons",
            "summary": "OCI runtime that starts any image in about a second",
        },
        "deb": {"compression": "xz", "fields": {"Rules-Requires-Root": "no"}},
    }
    (work / "nfpm.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    made = []
    nfpm = str(Path(sys.executable).parent / "nfpm")
    for packager in formats:
        command = [nfpm, "package", "-f", str(work / "nfpm.yaml"), "-p", packager, "-t", str(output)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        made += list(output.glob(f"*{version}-*.{packager}"))
    return made


def _release(version: str) -> dict[str, object]:
    notes = re.findall(r"(?ms)^- (.*?)(?=^- |\Z)", (ROOT / "CHANGELOG.md").read_text().split("\n## ", 2)[1])
    date = subprocess.run(
        ["git", "-C", str(ROOT), "log", "-1", "--format=%cI"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "semver": version,
        "date": date or "2026-01-01T00:00:00Z",
        "packager": "clip-shim maintainers <maintainers@clip-shim.invalid>",
        "deb": {"urgency": "medium", "distributions": ["unstable"]},
        "changes": [{"note": " ".join(note.split())} for note in notes],
    }


if __name__ == "__main__":
    destination = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build").absolute()
    for package in build(destination, sys.argv[2:] or ["deb", "rpm"]):
        sys.stdout.write(f"{package}\n")
