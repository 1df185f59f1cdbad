"""First pass of the EROFS writer: where every inode, directory and piece of data lies in the image."""

from __future__ import annotations

from bisect import bisect_left

from shim.erofs import xattrs
from shim.erofs.chunks import Plan, plan, too_sparse
from shim.erofs.format import (
    BLOCK,
    BLOCK_BITS,
    DEVICE_SLOT,
    DEVICE_TABLE_OFFSET,
    DIRENT,
    FILE_TYPES,
    INODE,
    MAX_ADDR,
    MAX_CHUNK,
    NID_UNIT,
    PLAIN_STRIDE,
    SUPER_OFFSET,
)
from shim.errors import IndexFormatError
from shim.index.flat import FlatTree, show_path

# What lies behind an inode must not cross a block; with 31 bytes lost to alignment at most, this always fits in one
MAX_TAIL = BLOCK - NID_UNIT
_MAX_TARGET = 4095  # PATH_MAX with its NUL
_INODE = INODE.size
_REG, _DIR, _LNK, _CHR, _BLK = 0o10, 0o04, 0o12, 0o02, 0o06


class Folder:
    """A directory on its way into the image. names: sorted, with "." and "..", inodes: of these; counts: entries in
    each block; size: of its entries, as st_size; block: where they lie if not behind the inode."""

    __slots__ = ("block", "counts", "inode", "inodes", "names", "size")

    def __init__(self, tree: FlatTree, number: int) -> None:
        directory = tree.directories[number]
        self.inode = directory.inode
        self.block = 0
        self.names = [tree.names[entry] for entry in directory.entries]
        self.inodes = [tree.inodes[entry] for entry in directory.entries]
        for name, inode in ((b".", self.inode), (b"..", tree.directories[directory.parent].inode)):
            at = bisect_left(self.names, name)
            self.names.insert(at, name)
            self.inodes.insert(at, inode)
        total = sum(map(len, self.names)) + DIRENT.size * len(self.names)
        if total <= BLOCK:
            counts: tuple[int, ...] = (len(self.names),)
            self.counts, self.size = counts, total
        else:
            self.counts, self.size = _cut(self.names)


def _cut(names: list[bytes]) -> tuple[tuple[int, ...], int]:
    counts = []
    count = used = 0
    for name in names:
        need = DIRENT.size + len(name)
        if used + need > BLOCK:
            counts.append(count)
            count = used = 0
        count += 1
        used += need
    counts.append(count)
    return tuple(counts), (len(counts) - 1) * BLOCK + used


class Layout:
    """`nids`: inode → its number in the image; `plain`: the inodes that lie in the table of plain files, in order;
    `others`: for each directory the rest of the inodes whose first name is in it."""

    def __init__(self, tree: FlatTree, sizes: tuple[int, ...], max_inline: int) -> None:
        self.tree = tree
        self.sizes = sizes
        self.max_inline = max_inline
        self.nids = [0] * len(tree.links)
        self.plans: dict[int, Plan] = {}
        self.long_targets: dict[int, int] = {}  # inode → block
        self.data: list[int] = []  # inodes that have something in the data area, in order
        self.data_blocks = 0
        self.inline_bytes = 0
        self.index_bytes = 0
        self.xattr_bytes = 0
        self.bodies = self._xattrs()
        made = (Folder(tree, number) for number in range(len(tree.directories)))
        self.folders = {folder.inode: folder for folder in made}  # in preorder
        # the checksum covers the superblock's block: nothing but the device table shares it
        self.start = max(DEVICE_TABLE_OFFSET + len(sizes) * DEVICE_SLOT.size, SUPER_OFFSET + BLOCK)
        end = self._put(self.start, len(self.body(0)), self._tail(self.folders[0]), 0)  # its number has 16 bits
        self.plain = self._plain()
        self.table = (end + NID_UNIT - 1) & -NID_UNIT
        first, step = self.table // NID_UNIT, PLAIN_STRIDE // NID_UNIT
        for place, inode in enumerate(self.plain):
            self.nids[inode] = first + step * place
        self.others = self._rest()
        end = self._place(self.table + PLAIN_STRIDE * len(self.plain))
        self.data_start = (end + BLOCK - 1) >> BLOCK_BITS
        self._place_data()
        self.end = self.data_start + self.data_blocks
        if self.end > MAX_ADDR:
            raise IndexFormatError("the tree image would be larger than 2 TiB")

    def body(self, inode: int) -> bytes:
        """The xattrs behind an inode."""
        return self.bodies[self.tree.attribute_of[inode]][0]

    def show(self, inode: int) -> str:
        return show_path(self.tree, self.tree.inodes.index(inode))

    def _xattrs(self) -> list[tuple[bytes, int]]:
        """By number of the attributes: the bytes behind an inode, and how many xattrs are left out. Equal sets share
        their bytes: they may be long."""
        encoded: dict[tuple[tuple[bytes, bytes], ...], tuple[bytes, int]] = {(): (b"", 0)}
        for number, attributes in enumerate(self.tree.attributes):
            if attributes.xattrs not in encoded:
                try:
                    encoded[attributes.xattrs] = xattrs.encode(attributes.xattrs)
                except IndexFormatError as error:
                    raise IndexFormatError(f"{self.show(self.tree.attribute_of.index(number))}: {error}") from None
        return [encoded[attributes.xattrs] for attributes in self.tree.attributes]

    def _plain(self) -> list[int]:
        """The files without xattrs that are empty or one chunk of a device: nearly all there are."""
        tree, devices = self.tree, len(self.sizes)
        simple = [attributes.kind == _REG and not attributes.xattrs for attributes in tree.attributes]
        ends = [min(size, MAX_CHUNK) for size in self.sizes]
        columns = zip(tree.attribute_of, tree.layers, tree.offsets, tree.sizes, strict=True)
        return [
            inode
            for inode, (number, layer, offset, size) in enumerate(columns)
            if simple[number]
            and (
                (0 <= layer < devices and 0 < size <= ends[layer] - offset and offset >= 0 and not offset % BLOCK)
                or not (size or inode in tree.extents)
            )
        ]

    def _rest(self) -> list[list[int]]:
        tree, nids = self.tree, self.nids
        others: list[list[int]] = [[] for _ in tree.directories]
        for inode, entry in enumerate(tree.first_entries()):
            if not nids[inode]:
                others[tree.parents[entry]].append(inode)
        return others

    def _put(self, end: int, xattr_size: int, tail: int, inode: int) -> int:
        """Give `inode` the next place: itself, xattrs, `tail` bytes that must not cross a block. Returns the end."""
        start = (end + NID_UNIT - 1) & -NID_UNIT
        self.xattr_bytes += xattr_size
        if self.xattr_bytes > self.max_inline:
            raise IndexFormatError(f"{self.show(inode)}: the tree's xattrs take more than {self.max_inline >> 20} MiB")
        if tail:
            behind = (start + _INODE + xattr_size) % BLOCK
            if behind + tail > BLOCK:
                start += (BLOCK - behind + NID_UNIT - 1) & -NID_UNIT
        self.nids[inode] = start // NID_UNIT
        return start + _INODE + xattr_size + tail

    def _put_symlink(self, end: int, inode: int) -> int:
        """As `_put`. Linux before 6.12 takes xattrs and target of a symlink to be in the block in which its inode ends,
        also where that end is the block's (fs/erofs/inode.c: erofs_fill_symlink)."""
        start, size = (end + NID_UNIT - 1) & -NID_UNIT, len(self.body(inode))
        tail = self._target(inode, size)
        if tail and (start + _INODE - 1) % BLOCK + 1 + size + tail > BLOCK:
            start = (start + BLOCK - 1) & -BLOCK
        return self._put(start, size, tail, inode)

    @staticmethod
    def _tail(folder: Folder) -> int:
        return folder.size if folder.size <= MAX_TAIL else 0

    def _place(self, end: int) -> int:
        """For each directory its entries, if they do not lie behind its inode, and the inodes of `others`."""
        tree = self.tree
        for folder, inodes in zip(self.folders.values(), self.others, strict=True):
            if folder.size > MAX_TAIL:
                folder.block = (end + BLOCK - 1) >> BLOCK_BITS
                end = (folder.block + len(folder.counts)) << BLOCK_BITS
            for inode in inodes:
                size, kind = len(self.body(inode)), tree.attributes[tree.attribute_of[inode]].kind
                if kind == _DIR:
                    end = self._put(end, size, self._tail(self.folders[inode]), inode)
                elif kind == _LNK:
                    end = self._put_symlink(end, inode)
                elif kind == _REG:
                    tail = self._indexes(inode)
                    end = self._put(end, size, 0, inode)
                    end = ((end + 7) & -8) + tail if tail else end  # they may cross blocks
                else:
                    self._check_special(inode, kind)
                    end = self._put(end, size, 0, inode)
        return end

    def _place_data(self) -> None:
        block = self.data_start
        for inode in self.data:
            made = self.plans.get(inode)
            if made is not None:
                made.place(block)
                block += made.copied_blocks
            else:
                self.long_targets[inode] = block
                block += (len(self.tree.targets[inode]) + BLOCK - 1) >> BLOCK_BITS

    def _indexes(self, inode: int) -> int:
        """Plan a file that is not in the table; returns the bytes of its chunk indexes."""
        tree = self.tree
        size, extents = tree.sizes[inode], tree.data_of(inode)
        if not size:
            if extents:
                raise IndexFormatError(f"{self.show(inode)}: an empty file with data")
            return 0
        try:
            made = plan(size, extents, self.sizes, self.max_inline)
        except IndexFormatError as error:
            raise self._of(inode, error) from None
        self.plans[inode] = made
        self.index_bytes += len(made.indexes)
        blocks = made.copied_blocks
        self.inline_bytes += blocks << BLOCK_BITS
        if self.inline_bytes > self.max_inline or self.index_bytes > self.max_inline:
            raise self._of(inode, too_sparse(self.max_inline))
        if blocks:
            self.data_blocks += blocks
            self.data.append(inode)
        return len(made.indexes)

    def _of(self, inode: int, error: IndexFormatError) -> IndexFormatError:
        return IndexFormatError(f"{self.show(inode)}: {error}", hint=error.hint)

    def _target(self, inode: int, xattr_size: int) -> int:
        """Bytes of a symlink's target behind its inode; one that has no room there goes to the data area."""
        target = self.tree.targets[inode]
        length = len(target)
        if not 0 < length <= _MAX_TARGET or b"\0" in target:
            what = "an empty target" if not length else "a target that no file system allows"
            raise IndexFormatError(f"symlink {self.show(inode)} has {what}")
        if _INODE + xattr_size + length <= BLOCK:
            return length
        self.data_blocks += (length + BLOCK - 1) >> BLOCK_BITS
        self.data.append(inode)
        return 0

    def _check_special(self, inode: int, kind: int) -> None:
        if kind not in FILE_TYPES:
            mode = self.tree.attributes[self.tree.attribute_of[inode]].mode
            raise IndexFormatError(f"{self.show(inode)} has mode {mode:#o}, which is no kind of file")
        major, minor = self.tree.rdevs.get(inode, (0, 0))
        if kind in (_CHR, _BLK) and not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
            raise IndexFormatError(f"{self.show(inode)} has device number {major}:{minor}, Linux has no such")
