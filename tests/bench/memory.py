"""What the daemon holds in memory, its helpers counted with it."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import threading
from pathlib import Path

from tests.bench.common import Row
from tests.bench.starts import memory_of
from tests.support import images, ocitar, smallimage
from tests.support.host import Host, stop
from tests.support.images import Blob
from tests.support.registry import Registry

ENTRIES = 25_000
LAYERS = 8
LAYER_BYTES = 48 << 20
_LIMIT_ONE, _LIMIT_FILLING = 80, 200  # MB


def measure(host: Host, registry: Registry) -> list[Row]:
    """Proportional set size of server, supervisor and job server: one image of 25,000 entries; eight layers filling."""
    many = _push(
        host, registry, "many", [[ocitar.Entry(b"d%03d/f%05d" % (n % 250, n), data=b"x") for n in range(ENTRIES)]]
    )
    wide = _push(
        host,
        registry,
        "wide",
        [[ocitar.Entry(b"big%d" % n, data=smallimage.noise(n, LAYER_BYTES))] for n in range(LAYERS)],
    )
    daemon = host.start_daemon()
    target = host.base / "memory"
    target.mkdir()
    try:
        host.clip("mount", many, target)
        subprocess.run(["find", target, "-size", "+1G"], check=True, stdout=subprocess.DEVNULL)
        one = memory_of(daemon.pid)
        host.clip("umount", target)
        host.clip("mount", wide, target)
        peak = _while_filling(daemon.pid, target)
        host.clip("umount", target)
    finally:
        stop(daemon)
    return [
        Row(f"daemon with an image of {ENTRIES:,} entries mounted", f"{one / 1e6:.0f} MB", f"≤ {_LIMIT_ONE} MB",
            one <= _LIMIT_ONE * 1e6),
        Row(f"daemon while {LAYERS} layers of {LAYER_BYTES >> 20} MiB fill at once", f"{peak / 1e6:.0f} MB",
            f"≤ {_LIMIT_FILLING} MB", peak <= _LIMIT_FILLING * 1e6),
    ]  # fmt: skip


def _while_filling(pid: int, target: Path) -> int:
    """The largest memory seen while every file of `target` is read at once."""
    readers = [subprocess.Popen(["cat", path], stdout=subprocess.DEVNULL) for path in sorted(target.iterdir())]
    peak = 0
    done = threading.Event()
    while not done.wait(0.05):
        peak = max(peak, memory_of(pid))
        if all(reader.poll() is not None for reader in readers):
            done.set()
    assert all(reader.returncode == 0 for reader in readers)
    return peak


def _push(host: Host, registry: Registry, name: str, layers: list[list[ocitar.Entry]]) -> Path:
    blobs = []
    for number, entries in enumerate(layers):
        tar = ocitar.tar(entries)
        packed = gzip.compress(tar, 1, mtime=0)
        path = host.base / f"{name}-{number}"
        path.write_bytes(packed)
        blobs.append(
            Blob(path, "sha256:" + hashlib.sha256(packed).hexdigest(), "sha256:" + hashlib.sha256(tar).hexdigest(),
                 len(packed), "application/vnd.oci.image.layer.v1.tar+gzip")
        )  # fmt: skip
    layout = host.base / f"layout-{name}"
    images.write_layout(layout, blobs, {"Cmd": ["/x"]})
    image = images.read_layout(name, layout)
    return host.index(images.push(image, registry.host), name)
