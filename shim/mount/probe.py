"""Which way of mounting a tree works here: found out by mounting a tiny one and reading it, not by version numbers."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from shim.erofs.format import BLOCK
from shim.erofs.writer import write_image
from shim.errors import MountError
from shim.index.model import Extent, Node, Tree
from shim.mount.erofs import PathLike, detached_erofs
from shim.mount.loop import detached_erofs_loop

_DATA = bytes(range(256)) * 3
_AT = 3 * BLOCK  # where the file begins in its device
_Mount = Callable[[PathLike, Sequence[PathLike]], int]
_TIERS: tuple[tuple[str, _Mount], ...] = (("erofs", detached_erofs), ("erofs-loop", detached_erofs_loop))


def probe_tier(work_dir: str | os.PathLike[str]) -> tuple[str, str]:
    """(tier, reason): "erofs", "erofs-loop" or "fuse", the best that works with images below `work_dir`.

    The reason says why each better tier does not work. Everything happens in a temporary directory and on mounts that
    are never attached, so nothing is left even if the process is killed. For a helper process: mounting may block.
    MountError if `work_dir` cannot be written.
    """
    try:
        directory = Path(tempfile.mkdtemp(prefix=".probe-", dir=work_dir))
    except OSError as error:
        raise MountError(f"cannot write to {work_dir}: {error.strerror}") from error
    try:
        image, device = _write(directory)
        reasons = []
        for tier, mount in _TIERS:
            try:
                _try(mount, image, device)
            except (MountError, OSError) as error:
                reasons.append(f"{tier}: {error}")
            else:
                return tier, "; ".join([*reasons, f"{tier}: a test image was mounted and read"])
        return "fuse", "; ".join(reasons)
    except OSError as error:
        raise MountError(f"cannot write to {work_dir}: {error.strerror}") from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _write(directory: Path) -> tuple[Path, Path]:
    """A tree of one file, and its device."""
    image, device = directory / "image.erofs", directory / "device"
    device.write_bytes(bytes(_AT) + _DATA.ljust(4 * BLOCK, b"\0"))
    file = Node(stat.S_IFREG | 0o644, size=len(_DATA), extents=(Extent(0, 0, _AT, len(_DATA)),))
    with open(image, "wb") as out:
        write_image(Tree(Node(stat.S_IFDIR | 0o755, children={b"probe": file})), [device.stat().st_size], out)
    return image, device


def _try(mount: _Mount, image: Path, device: Path) -> None:
    fd = mount(image, [device])
    try:
        probe = os.open("probe", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=fd)
        try:
            shown = os.read(probe, 2 * len(_DATA))
        finally:
            os.close(probe)
    finally:
        os.close(fd)
    if shown != _DATA:
        raise MountError("a test image was mounted, but shows wrong bytes")
