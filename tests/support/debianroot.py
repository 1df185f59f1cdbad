"""A clean Debian root that programs run in as on a machine of their own: to install packages in, or booted by systemd.

Not a virtual machine: the kernel is the host's, and so is the network. It has namespaces of its own (a chroot would not
do: `runc exec` would leave it), and a cgroup (v2), which is removed at the end with all that ran in it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import ModuleType

from tests.support.host import ROOT, disk_directory, wait_for

MINIMUM = "ca-certificates,busybox-static,procps"
BOOTED = (
    f"{MINIMUM},systemd,systemd-sysv,dbus,python3,python3-structlog,python3-tomlkit,python3-tqdm,python3-yaml,"
    "python3-zstandard,python3-prometheus-client,runc,crun,fuse3,containerd"
)
SYSTEMD = "/lib/systemd/systemd --log-target=journal"
NEXT = "0.1.1"  # a version of the package that tests upgrade to
_DEVICES = "null zero full random urandom tty fuse loop-control"
_ENTER = r"""
root=$0
mount --bind $root $root; mount --make-rprivate $root
mount -t proc proc $root/proc
mount --bind /sys $root/sys; mount -t tmpfs tmpfs $root/sys/fs/cgroup; mount -t cgroup2 cgroup2 $root/sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs $root/run; mount -t tmpfs tmpfs $root/tmp
mount -t tmpfs -o mode=755 tmpfs $root/dev; mkdir $root/dev/pts $root/dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts $root/dev/pts
for device in DEVICES; do touch $root/dev/$device; mount --bind /dev/$device $root/dev/$device; done
ln -s pts/ptmx $root/dev/ptmx; ln -s /proc/self/fd $root/dev/fd
cd $root; mkdir -p mnt/old; pivot_root . mnt/old; umount -l /mnt/old; rmdir /mnt/old
exec env -i container=clip-shim-test PATH=/usr/sbin:/usr/bin INIT
""".replace("DEVICES", _DEVICES)
_ENVIRON = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "DEBIAN_FRONTEND": "noninteractive"}


def builder() -> ModuleType:
    """packaging/build.py as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "packaging/build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["build"] = module
    spec.loader.exec_module(module)
    return module


def cgroup2() -> Path:
    """Where the host has the unified hierarchy."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " in line:
            return Path(line.split()[4])
    raise AssertionError("no cgroup2 is mounted")


class DebianRoot:
    """`start` it, then `run` programs in it as root. Close it."""

    def __init__(self, suite: str, packages: str = MINIMUM) -> None:
        self.suite = suite
        self.base = disk_directory()
        self.path = self.base / "root"
        command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", suite, str(self.path)]
        subprocess.run(command, check=True, timeout=900)
        self._cgroup = cgroup2() / f"clip-test-{uuid.uuid4().hex[:8]}"
        self._init: subprocess.Popen[bytes] | None = None
        self._pid = 0

    def offer(self, deb: Path) -> str:
        """Copy a package into it; its path there."""
        shutil.copy(deb, self.path / "root")
        return f"/root/{deb.name}"

    def start(self, init: str = "sleep infinity") -> None:
        """Start `init`, a command line, as PID 1. Returns when it runs."""
        self._cgroup.mkdir()
        join = f"echo $$ > {self._cgroup}/cgroup.procs; exec unshare -m -p -u -i -C --fork --kill-child "
        command = ["sh", "-ec", join + '--propagation private sh -ec "$1" "$2"', "boot", _ENTER.replace("INIT", init)]
        self._init = subprocess.Popen([*command, str(self.path)], stdin=subprocess.DEVNULL, start_new_session=True)
        name = init.split()[0].rpartition("/")[2]
        wait_for("PID 1 runs", lambda: self._find_pid(name))

    def _find_pid(self, name: str) -> bool:
        assert self._init is not None
        assert self._init.poll() is None
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text().split()
        if children and Path(f"/proc/{children[0]}/comm").read_text() == f"{name}\n":
            self._pid = int(children[0])
        return bool(self._pid)

    def run(
        self, *command: str, check: bool = True, timeout: float = 600, **env: str
    ) -> subprocess.CompletedProcess[str]:
        words = ["nsenter", "-t", str(self._pid), "-m", "-p", "-u", "-i", "-C", *command]
        done = subprocess.run(
            words, env={**_ENVIRON, **env}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def output(self, *command: str, **env: str) -> str:
        return self.run(*command, **env).stdout.strip()

    def unit(self, key: str, unit: str = "clip-shim.service") -> str:
        """A property of a unit, as `systemctl show` has it."""
        return self.output("systemctl", "show", "--value", "-p", key, unit)

    def journal(self, *matches: str) -> str:
        return self.run("journalctl", "--no-pager", "-o", "cat", *matches).stdout

    def close(self) -> None:
        if self._init is not None:
            self._init.kill()  # --kill-child: PID 1 goes, and with it all others
            self._init.wait()
        end = time.monotonic() + 10
        while self._cgroup.exists() and time.monotonic() < end:
            for path in sorted(self._cgroup.rglob("*/"), key=lambda p: -len(p.parts)):
                with contextlib.suppress(OSError):
                    path.rmdir()
            with contextlib.suppress(OSError):
                self._cgroup.rmdir()
                break
            time.sleep(0.05)
        shutil.rmtree(self.base)
        assert not self._cgroup.exists(), f"{self._cgroup} is still used"
