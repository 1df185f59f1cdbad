"""A quick look at the deb: that it builds, and that what engines run works from it. The rest: `make package-test`."""

from __future__ import annotations

import subprocess
from pathlib import Path

from shim import __version__
from tests.support.debianroot import builder

ROOT = Path(__file__).resolve().parents[2]
HOME = "usr/lib/clip-shim"


def test_the_deb_is_built_and_its_launcher_runs(disk_path: Path) -> None:
    (deb,) = builder().build(disk_path / "built", ["deb"])
    assert deb.name == f"clip-shim_{__version__}-1_amd64.deb" or deb.name.endswith("_arm64.deb")
    root = disk_path / "root"
    subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
    site = root / HOME / "lib/python3/site-packages"
    for path in (ROOT / "shim").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert (site / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    for name in ("clip-shim.service", "clip-shim.socket", "clip-shim-cache-clean.timer"):
        assert (root / "usr/lib/systemd/system" / name).is_file()
    for name in ("clip-precreate", "clip-poststop"):
        assert (root / HOME / "libexec/clip-shim" / name).stat().st_mode & 0o777 == 0o755
    # /usr of the package over this machine's, in a mount namespace that ends with the command
    upper, work = root / "usr", disk_path / "work"
    work.mkdir()
    over = f"mount -t overlay overlay -o lowerdir=/usr,upperdir={upper},workdir={work} /usr && exec "
    launcher = f"/{HOME}/libexec/clip-shim/clip-shim-runtime"
    done = subprocess.run(["unshare", "-m", "sh", "-c", over + f"{launcher} --version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("runc version")
    isolated = f"/{HOME}/bin/python3 -I -c 'import sys, shim.cli.main, fastcrc, isal.igzip_lib; print(sys.prefix)'"
    done = subprocess.run(["unshare", "-m", "sh", "-c", over + isolated], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"/{HOME}\n", "")
