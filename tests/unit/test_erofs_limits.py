"""What EROFS images must look like for older kernels, and what a hostile tree can make their writer take."""

from __future__ import annotations

import io
import random
import stat
import tempfile
import tracemalloc

import pytest

from shim.erofs.writer import write_image
from shim.errors import IndexFormatError
from shim.index.model import Node, Tree
from tests.unit.test_erofs_writer import LNK, REG, build, folder


def test_symlinks_as_linux_before_6_12_wants_them() -> None:
    """fs/erofs/inode.c, erofs_fill_symlink: behind the end of the inode within its block, xattrs and target fit into
    that block; where the inode ends with the block, that end is 512."""
    rng = random.Random(8)
    labels = [b"l" * rng.randrange(1, 60) for _ in range(50)]
    children: dict[bytes, Node] = {}
    for i in range(3000):
        xattrs = ((b"security.selinux", rng.choice(labels) if i % 10 else b"x" * 600),) if i % 3 == 0 else ()
        children[b"%05d" % i] = Node(LNK | 0o777, target=b"t" * rng.randrange(1, 600), xattrs=xattrs)
    image, _ = build(folder(children))
    inline = 0
    for name, inode in image.walk().items():
        if stat.S_ISLNK(inode.mode) and inode.layout == 2:
            end = (inode.nid * 32 + 63) % 512 + 1
            behind = inode.data - inode.nid * 32 - 64
            assert end + behind + inode.size <= 512, name
            inline += 1
    assert inline > 2000


def test_long_xattrs_are_kept_once_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    long = ((b"user.a", b"v" * 60_000), (b"user.b", b"v" * 60_000))
    root = folder({b"%d" % i: Node(REG | 0o644, uid=i, xattrs=long) for i in range(600)})
    tracemalloc.start()
    try:
        with tempfile.TemporaryFile() as out:
            write_image(Tree(root), [], out)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(IndexFormatError, match=r"/\d+: .*xattrs take more than 1 MiB"):
        write_image(Tree(root), [], io.BytesIO(), max_inline=1 << 20)
