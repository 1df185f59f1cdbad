"""OCI bundles for bare runc and crun: an empty rootfs directory and a config.json that runs anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CAPABILITIES = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_KILL",
    "CAP_SETUID",
    "CAP_SETGID",
    "CAP_SYS_CHROOT",
]


def config(args: Sequence[str], annotations: Mapping[str, str] | None = None, **root: object) -> dict[str, Any]:
    """A runtime-spec 1.0 config: private pid, mount, ipc and uts namespaces, the host's network, no terminal."""
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"]},
        {
            "destination": "/sys",
            "type": "none",
            "source": "/sys",
            "options": ["rbind", "nosuid", "noexec", "nodev", "ro"],
        },
    ]
    return {
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs", **root},
        "hostname": "test",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": list(args),
            "env": [PATH],
            "cwd": "/",
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), _CAPABILITIES),
        },
        "mounts": mounts,
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts")]},
        "annotations": dict(annotations or {}),
    }


def make(directory: Path, args: Sequence[str], *, index: Path | str | None = None, **root: object) -> Path:
    """A bundle at `directory` whose annotation names `index`."""
    (directory / "rootfs").mkdir(parents=True)
    annotations = {} if index is None else {"io.clip.index": str(index)}
    (directory / "config.json").write_text(json.dumps(config(args, annotations, **root), indent=1))
    return directory
