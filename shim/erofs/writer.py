"""Write a Tree as an EROFS metadata image: everything a container can see of it but the bytes of its files.

Two passes over the tree, no recursion. The first gives each inode its place (its number is its offset / 32), the second
writes. Order in the image, so that `find` reads it from front to back: superblock, device table, root inode; then for
each directory in preorder its entries (if too many to lie behind its inode) and its children's inodes; then long
symlink targets and file data that no device holds at a multiple of 512. All other data stays in the layers (chunks.py).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import BinaryIO

from shim.erofs import xattrs
from shim.erofs.chunks import ReadLayer, chunk_bits
from shim.erofs.format import (
    BLOCK,
    BLOCK_BITS,
    CHUNK_INDEX,
    CHUNK_INDEXES,
    DIRENT,
    FILE_TYPES,
    FORMAT_CHUNK,
    FORMAT_INLINE,
    FORMAT_PLAIN,
    INODE,
    INODE_INDEX,
    MAX_ADDR,
    SUPER_OFFSET,
    device_table,
    superblock,
)
from shim.erofs.layout import MAX_TAIL, Directory, Layout, show_path
from shim.errors import IndexFormatError
from shim.index.model import Node, Tree

DEFAULT_MAX_INLINE = 256 << 20
MAX_DEVICES = 4096
_MAX_SIZE = (MAX_ADDR + 1) << BLOCK_BITS
_REG, _DIR, _LNK, _CHR, _BLK = 0o10, 0o04, 0o12, 0o02, 0o06


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What was written. size: bytes of the image; inline_bytes: file data copied into it; dropped_xattrs: attributes
    that Linux has no name space for; device_blocks: 512-byte blocks of each device, in the order of the mount."""

    size: int
    inodes: int
    entries: int
    inline_bytes: int
    dropped_xattrs: int
    device_blocks: tuple[int, ...]
    uuid: bytes


def write_image(
    tree: Tree,
    device_sizes: Sequence[int],
    out: BinaryIO,
    read_layer: ReadLayer | None = None,
    *,
    max_inline: int = DEFAULT_MAX_INLINE,
) -> ImageInfo:
    """Write `tree` to `out` (seekable, empty) as an EROFS image whose device n + 1 is layer n's uncompressed tar.

    device_sizes: bytes of each layer; read_layer(layer, offset, length) gives bytes of one, exactly that many, and is
    needed only for data that does not lie at a multiple of 512 (sparse members), of which at most `max_inline` bytes
    are copied. The same tree gives the same bytes. IndexFormatError names the file that cannot be represented.
    """
    sizes = tuple(device_sizes)
    if len(sizes) > MAX_DEVICES:
        raise IndexFormatError(f"{len(sizes)} layers are more than a tree can have ({MAX_DEVICES})")
    for number, size in enumerate(sizes):
        if not 0 <= size <= _MAX_SIZE:
            raise IndexFormatError(f"layer {number} has {size} bytes: more than 2 TiB cannot be mounted")
    layout = Layout(tree, sizes, max_inline)
    return _Writer(layout, sizes, out, read_layer).write()


class _Writer:
    """Second pass: the bytes, in order. The superblock comes last: an image that was not finished cannot be mounted."""

    def __init__(self, layout: Layout, sizes: tuple[int, ...], out: BinaryIO, read_layer: ReadLayer | None) -> None:
        self.layout = layout
        self.sizes = sizes
        self.out = out
        self.read_layer = read_layer
        self.hash = sha256()
        self.position = layout.start
        self.parts: list[bytes] = []
        self.number = 1  # i_ino, only for stat(2) calls with 32-bit inode numbers

    def write(self) -> ImageInfo:
        layout = self.layout
        table = device_table(self.sizes)
        self.hash.update(table)
        self.out.seek(self.position)
        self._directory_inode(layout.root)
        for directory in layout.directories:
            if directory.size > MAX_TAIL:
                self._pad(directory.block << BLOCK_BITS)
                self._emit(self._dirents(directory).ljust(len(directory.counts) << BLOCK_BITS, b"\0"))
            self._children(directory)
            self._flush()
        self._pad(layout.data_start << BLOCK_BITS)
        self._flush()
        for piece in self._data():
            self.out.write(piece)
        uuid = self.hash.digest()[:16]
        inodes = len(layout.nids)
        self.out.seek(0)
        head = superblock(
            root_nid=layout.root.nid, inodes=inodes, blocks=layout.end, uuid=uuid, devices=len(self.sizes), table=table
        )
        self.out.write((bytes(SUPER_OFFSET) + head + table).ljust(layout.start, b"\0"))
        self.out.seek(0, 2)
        dropped = sum(dropped for _, dropped in layout.bodies.values())
        return ImageInfo(
            size=layout.end << BLOCK_BITS,
            inodes=inodes,
            entries=layout.entries,
            inline_bytes=layout.inline_bytes,
            dropped_xattrs=dropped,
            device_blocks=tuple((size + BLOCK - 1) >> BLOCK_BITS for size in self.sizes),
            uuid=uuid,
        )

    def _emit(self, data: bytes) -> None:
        self.parts.append(data)
        self.position += len(data)

    def _pad(self, position: int) -> None:
        if position > self.position:
            self._emit(bytes(position - self.position))

    def _flush(self) -> None:
        data = b"".join(self.parts)
        self.parts.clear()
        self.hash.update(data)
        self.out.write(data)

    def _children(self, directory: Directory) -> None:
        layout = self.layout
        nids, links, plans, bodies = layout.nids, layout.links, layout.plans, layout.bodies
        children = directory.children
        append, pack = self.parts.append, INODE_INDEX.pack
        position = self.position
        below = iter(directory.below)
        for name in directory.names:
            child = children.get(name)
            if child is None:
                continue
            key = id(child)
            start = nids[key] << 5
            if start < position:
                continue  # a further name of an inode that is written
            self.number += 1
            try:
                if child.mode >> 12 == _REG and child.size and not child.xattrs and key not in plans:
                    if start > position:
                        append(bytes(start - position))
                    seconds, nanoseconds = divmod(child.mtime, 1000000000)
                    _, layer, offset, size = child.extents[0]
                    bits = ((size - 1) >> BLOCK_BITS).bit_length()
                    append(
                        pack(
                            *(FORMAT_CHUNK, 0, child.mode, 0, size, CHUNK_INDEXES | bits, self.number),
                            *(child.uid, child.gid, seconds, nanoseconds, links.get(key, 1)),
                            *(0, layer + 1, offset >> BLOCK_BITS),
                        )
                    )
                    position = start + 72
                else:
                    self.position = position
                    self._pad(start)
                    if child.mode >> 12 == _DIR:
                        self._directory_inode(next(below))
                    else:
                        self._inode(child, bodies[child.xattrs][0], links.get(key, 1))
                    position = self.position
            except struct.error:
                raise IndexFormatError(f"{show_path(directory, name)}: owner, time or size is out of range") from None
        self.position = position

    def _pack_inode(self, node: Node, form: int, size: int, union: int, links: int, body: bytes) -> None:
        seconds, nanoseconds = divmod(node.mtime, 1000000000)
        self._emit(
            INODE.pack(
                *(form, xattrs.icount(len(body)), node.mode, 0, size, union, self.number),
                *(node.uid, node.gid, seconds, nanoseconds, links),
            )
            + body
        )

    def _inode(self, node: Node, body: bytes, links: int) -> None:
        """An inode of any kind but a directory, with all that lies behind it."""
        kind = node.mode >> 12
        if kind == _REG and node.size:
            made = self.layout.plans.get(id(node))
            if made is not None:
                bits, indexes = made.bits, bytes(made.indexes)
            else:
                _, layer, offset, size = node.extents[0]
                bits, indexes = chunk_bits(size), CHUNK_INDEX.pack(0, layer + 1, offset >> BLOCK_BITS)
            self._pack_inode(node, FORMAT_CHUNK, node.size, CHUNK_INDEXES | bits, links, body)
            self._pad((self.position + 7) & -8)
            self._emit(indexes)
        elif kind == _LNK:
            block = self.layout.long_targets.get(id(node))
            if block is None:
                self._pack_inode(node, FORMAT_INLINE, len(node.target), 0, links, body)
                self._emit(node.target)
            else:
                self._pack_inode(node, FORMAT_PLAIN, len(node.target), block, links, body)
        else:
            major, minor = node.rdev if kind in (_CHR, _BLK) else (0, 0)
            # include/linux/kdev_t.h: new_encode_dev
            device = minor & 0xFF | major << 8 | (minor & ~0xFF) << 12
            self._pack_inode(node, FORMAT_PLAIN, 0, device, links, body)

    def _directory_inode(self, directory: Directory) -> None:
        body = self.layout.bodies[directory.node.xattrs][0]
        self._pad(directory.nid << 5)
        links = 2 + len(directory.below)
        if directory.size > MAX_TAIL:
            self._pack_inode(directory.node, FORMAT_PLAIN, directory.size, directory.block, links, body)
        else:
            self._pack_inode(directory.node, FORMAT_INLINE, directory.size, 0, links, body)
            self._emit(self._dirents(directory))

    def _dirents(self, directory: Directory) -> bytes:
        """All entries, block by block: fixed parts first, then the names (Documentation/filesystems/erofs.rst)."""
        children, nids, types = directory.children, self.layout.nids, FILE_TYPES
        parent = directory.parent or directory
        special = {b".": directory.nid, b"..": parent.nid}
        blocks: list[bytes] = []
        start = 0
        for count in directory.counts:
            names = directory.names[start : start + count]
            start += count
            rows: list[int] = []
            offset = DIRENT.size * count
            for name in names:
                child = children.get(name)
                if child is None:
                    rows += (special[name], offset, 2, 0)
                else:
                    rows += (nids[id(child)], offset, types[child.mode >> 12], 0)
                offset += len(name)
            block = _dirent_rows(count).pack(*rows) + b"".join(names)
            blocks.append(block)
        return b"".join([*(block.ljust(BLOCK, b"\0") for block in blocks[:-1]), blocks[-1]])

    def _data(self) -> Iterator[bytes]:
        """The data area, in the order in which Layout placed it."""
        for directory, name, node in self.layout.data:
            made = self.layout.plans.get(id(node))
            if made is None:
                yield node.target + bytes(-len(node.target) % BLOCK)
            elif self.read_layer is None:
                raise IndexFormatError(f"{show_path(directory, name)}: sparse data, but no layer can be read")
            else:
                yield from made.read_copies(self.read_layer)


@cache
def _dirent_rows(count: int) -> struct.Struct:
    return struct.Struct("<" + "QHBB" * count)
