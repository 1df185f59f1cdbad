"""Write a tree as an EROFS metadata image: everything a container can see of it but the bytes of its files.

Two passes over the tree, no recursion. The first gives each inode its place (its number is its offset / 32), the second
writes. Order in the image, so that `find` reads it from front to back: superblock, device table, root inode; a table of
all plain files in preorder; then for each directory in preorder its entries (if too many to lie behind its inode) and
its other children's inodes; then long symlink targets and file data that no device holds at a multiple of 512. All
other data stays in the layers (chunks.py).

The table is nine tenths of an image, and places of one length: it is made column by column, which takes a fifth of the
time of one inode after the other. A container's start waits for it.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import BinaryIO

from shim.erofs import xattrs
from shim.erofs.chunks import ReadLayer
from shim.erofs.format import (
    BLOCK,
    BLOCK_BITS,
    CHUNK_INDEXES,
    DIRENT,
    FILE_TYPES,
    FORMAT_CHUNK,
    FORMAT_INLINE,
    FORMAT_PLAIN,
    INODE,
    INODE_COLUMNS,
    MAX_ADDR,
    PLAIN_STRIDE,
    SUPER_OFFSET,
    device_table,
    superblock,
)
from shim.erofs.layout import MAX_TAIL, Folder, Layout
from shim.errors import IndexFormatError
from shim.index.flat import FlatTree, flatten
from shim.index.model import Tree

DEFAULT_MAX_INLINE = 256 << 20
MAX_DEVICES = 4096
_MAX_SIZE = (MAX_ADDR + 1) << BLOCK_BITS
_NS = 10**9
_GATHERED = 4 << 20  # bytes, before they are written
_RANGE = "owner, time or size is out of range"
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
    tree: Tree | FlatTree,
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
    layout = Layout(flatten(tree) if isinstance(tree, Tree) else tree, sizes, max_inline)
    return _Writer(layout, out, read_layer).write()


class _Writer:
    """Second pass: the bytes, in order. The superblock comes last: an image that was not finished cannot be mounted."""

    def __init__(self, layout: Layout, out: BinaryIO, read_layer: ReadLayer | None) -> None:
        self.layout = layout
        self.tree = layout.tree
        self.out = out
        self.read_layer = read_layer
        self.hash = sha256()
        self.position = layout.start
        self.parts: list[bytes | bytearray] = []
        self.gathered = 0
        kinds = [FILE_TYPES[attributes.kind] for attributes in layout.tree.attributes]
        self.types = [kinds[number] for number in layout.tree.attribute_of]

    def write(self) -> ImageInfo:
        layout = self.layout
        table = device_table(layout.sizes)
        self.hash.update(table)
        self.out.seek(self.position)
        self._inode(0)
        self._pad(layout.table)
        self._emit(self._plain_files())
        self._flush()
        for folder, inodes in zip(layout.folders.values(), layout.others, strict=True):
            if folder.size > MAX_TAIL:
                self._pad(folder.block << BLOCK_BITS)
                self._emit(self._dirents(folder).ljust(len(folder.counts) << BLOCK_BITS, b"\0"))
            for inode in inodes:
                self._inode(inode)
        self._pad(layout.data_start << BLOCK_BITS)
        self._flush()
        for piece in self._data():
            self.out.write(piece)
        uuid = self.hash.digest()[:16]
        inodes_written = len(self.tree.links)
        head = superblock(
            root_nid=layout.nids[0],
            inodes=inodes_written,
            blocks=layout.end,
            uuid=uuid,
            devices=len(layout.sizes),
            table=table,
        )
        kinds = zip(self.tree.attributes, layout.bodies, strict=True)
        dropped = {attributes.xattrs: left_out for attributes, (_, left_out) in kinds}  # each set counts once
        self.out.seek(0)
        self.out.write((bytes(SUPER_OFFSET) + head + table).ljust(layout.start, b"\0"))
        self.out.seek(0, 2)
        return ImageInfo(
            size=layout.end << BLOCK_BITS,
            inodes=inodes_written,
            entries=len(self.tree.names) - 1,
            inline_bytes=layout.inline_bytes,
            dropped_xattrs=sum(dropped.values()),
            device_blocks=tuple((size + BLOCK - 1) >> BLOCK_BITS for size in layout.sizes),
            uuid=uuid,
        )

    def _emit(self, data: bytes | bytearray) -> None:
        self.parts.append(data)
        self.position += len(data)
        self.gathered += len(data)
        if self.gathered > _GATHERED:
            self._flush()

    def _pad(self, position: int) -> None:
        if position > self.position:
            self._emit(bytes(position - self.position))

    def _flush(self) -> None:
        data = b"".join(self.parts)
        self.parts.clear()
        self.gathered = 0
        self.hash.update(data)
        self.out.write(data)

    def _plain_files(self) -> bytearray:
        """The table: every file's inode, and behind it its chunk index if it is not empty."""
        tree, files = self.tree, self.layout.plain
        kinds = [tree.attributes[tree.attribute_of[inode]] for inode in files]
        times = [tree.mtime_of[inode] for inode in files]
        seconds, nanoseconds = [time // _NS for time in tree.mtimes], [time % _NS for time in tree.mtimes]
        sizes = [tree.sizes[inode] for inode in files]
        chunks = [CHUNK_INDEXES | ((size - 1) >> BLOCK_BITS).bit_length() if size else 0 for size in sizes]
        columns = {
            "i_format": [FORMAT_CHUNK if size else FORMAT_PLAIN for size in sizes],
            "i_mode": [kind.mode for kind in kinds],
            "i_size": sizes,
            "i_u": chunks,
            "i_ino": [inode + 1 for inode in files],
            "i_uid": [kind.uid for kind in kinds],
            "i_gid": [kind.gid for kind in kinds],
            "i_mtime": [seconds[time] for time in times],
            "i_mtime_nsec": [nanoseconds[time] for time in times],
            "i_nlink": [tree.links[inode] for inode in files],
            "device_id": [tree.layers[inode] + 1 for inode in files],
            "blkaddr": [tree.offsets[inode] >> BLOCK_BITS for inode in files],
        }
        table = bytearray(PLAIN_STRIDE * len(files))
        for name, values in columns.items():
            offset, code = INODE_COLUMNS[name]
            try:
                column = array(code, values)
            except OverflowError:
                inode = next(inode for inode, value in zip(files, values, strict=True) if not _fits(code, value))
                raise IndexFormatError(f"{self.layout.show(inode)}: {_RANGE}") from None
            if sys.byteorder == "big":
                column.byteswap()
            data = column.tobytes()
            for byte in range(column.itemsize):
                table[offset + byte :: PLAIN_STRIDE] = data[byte :: column.itemsize]
        return table

    def _inode(self, inode: int) -> None:
        """An inode that is not in the table, with all that lies behind it."""
        layout, tree = self.layout, self.tree
        kind = tree.attributes[tree.attribute_of[inode]].kind
        self._pad(layout.nids[inode] << 5)
        if kind == _DIR:
            folder = layout.folders[inode]
            if folder.size > MAX_TAIL:
                self._pack(inode, FORMAT_PLAIN, folder.size, folder.block)
            else:
                self._pack(inode, FORMAT_INLINE, folder.size, 0)
                self._emit(self._dirents(folder))
        elif kind == _REG and tree.sizes[inode]:
            made = layout.plans[inode]
            self._pack(inode, FORMAT_CHUNK, tree.sizes[inode], CHUNK_INDEXES | made.bits)
            self._pad((self.position + 7) & -8)
            self._emit(bytes(made.indexes))
        elif kind == _LNK:
            target, block = tree.targets[inode], layout.long_targets.get(inode)
            if block is None:
                self._pack(inode, FORMAT_INLINE, len(target), 0)
                self._emit(target)
            else:
                self._pack(inode, FORMAT_PLAIN, len(target), block)
        else:
            major, minor = tree.rdevs.get(inode, (0, 0)) if kind in (_CHR, _BLK) else (0, 0)
            # include/linux/kdev_t.h: new_encode_dev
            self._pack(inode, FORMAT_PLAIN, 0, minor & 0xFF | major << 8 | (minor & ~0xFF) << 12)

    def _pack(self, inode: int, form: int, size: int, union: int) -> None:
        tree, body = self.tree, self.layout.body(inode)
        mode, uid, gid, _ = tree.attributes[tree.attribute_of[inode]]
        seconds, nanoseconds = divmod(tree.mtimes[tree.mtime_of[inode]], _NS)
        try:
            packed = INODE.pack(
                *(form, xattrs.icount(len(body)), mode, 0, size, union, inode + 1),
                *(uid, gid, seconds, nanoseconds, tree.links[inode]),
            )
        except struct.error:
            raise IndexFormatError(f"{self.layout.show(inode)}: {_RANGE}") from None
        self._emit(packed + body)

    def _dirents(self, folder: Folder) -> bytes:
        """All entries, block by block: fixed parts first, then the names (Documentation/filesystems/erofs.rst)."""
        nids, types = self.layout.nids, self.types
        blocks: list[bytes] = []
        start = 0
        for count in folder.counts:
            names, inodes = folder.names, folder.inodes
            if len(folder.counts) > 1:
                names, inodes = names[start : start + count], inodes[start : start + count]
            start += count
            rows: list[int] = []
            offset = DIRENT.size * count
            for name, inode in zip(names, inodes, strict=True):
                rows += (nids[inode], offset, types[inode], 0)
                offset += len(name)
            blocks.append(_dirent_rows(count).pack(*rows) + b"".join(names))
        return b"".join([*(block.ljust(BLOCK, b"\0") for block in blocks[:-1]), blocks[-1]])

    def _data(self) -> Iterator[bytes]:
        """The data area, in the order in which Layout placed it."""
        for inode in self.layout.data:
            made = self.layout.plans.get(inode)
            if made is None:
                target = self.tree.targets[inode]
                yield target + bytes(-len(target) % BLOCK)
            elif self.read_layer is None:
                raise IndexFormatError(f"{self.layout.show(inode)}: sparse data, but no layer can be read")
            else:
                yield from made.read_copies(self.read_layer)


def _fits(code: str, value: int) -> bool:
    try:
        array(code, [value])
    except OverflowError:
        return False
    return True


@cache
def _dirent_rows(count: int) -> struct.Struct:
    return struct.Struct("<" + "QHBB" * count)
