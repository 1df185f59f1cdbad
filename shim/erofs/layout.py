"""First pass of the EROFS writer: where every inode, directory and piece of data lies in the image."""

from __future__ import annotations

from bisect import insort

from shim.erofs import xattrs
from shim.erofs.chunks import Plan, plan
from shim.erofs.format import (
    BLOCK,
    BLOCK_BITS,
    CHUNK_INDEX,
    DEVICE_SLOT,
    DEVICE_TABLE_OFFSET,
    DIRENT,
    FILE_TYPES,
    INODE,
    MAX_ADDR,
    MAX_CHUNK,
    NID_UNIT,
    SUPER_OFFSET,
)
from shim.errors import IndexFormatError
from shim.index.model import Node, Tree

# What lies behind an inode must not cross a block; with 31 bytes lost to alignment at most, this always fits in one
MAX_TAIL = BLOCK - NID_UNIT
_MAX_TARGET = 4095  # PATH_MAX with its NUL
_INODE = INODE.size
_REG, _DIR, _LNK, _CHR, _BLK = 0o10, 0o04, 0o12, 0o02, 0o06


class Directory:
    """A directory on its way into the image. names: sorted, with "." and ".."; counts: entries in each block; size: of
    its entries, as st_size; block: where they lie if not behind the inode; below: its subdirectories by name."""

    __slots__ = ("below", "block", "children", "counts", "name", "names", "nid", "node", "parent", "size")

    def __init__(self, node: Node, parent: Directory | None, name: bytes) -> None:
        self.node = node
        self.parent = parent
        self.name = name
        self.children: dict[bytes, Node] = node.children if node.children is not None else {}
        self.nid = 0
        self.block = 0
        self.below: list[Directory] = []
        self.names = sorted(self.children)
        self._check_names()
        insort(self.names, b".")
        insort(self.names, b"..")
        total = sum(map(len, self.names)) + DIRENT.size * len(self.names)
        if total <= BLOCK:
            counts: tuple[int, ...] = (len(self.names),)
            self.counts, self.size = counts, total
        else:
            self.counts, self.size = _cut(self.names)

    def _check_names(self) -> None:
        names = self.names
        if not names:
            return
        joined = b"\0".join(names)
        bad = b"/" in joined or joined.count(b"\0") != len(names) - 1 or not names[0] or len(max(names, key=len)) > 255
        if bad or b"." in self.children or b".." in self.children:
            raise IndexFormatError(f"directory {show_path(self)} has a name that no file system allows")


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


def show_path(directory: Directory | None, name: bytes = b"") -> str:
    """A path for an error message, from its end, at most some 4,000 bytes."""
    parts = [name]
    length = len(name)
    while directory is not None and directory.parent is not None and length < 4000:
        parts.append(directory.name)
        length += len(directory.name) + 1
        directory = directory.parent
    cut = directory is not None and directory.parent is not None
    path = ("…" if cut else "/") + b"/".join(part for part in reversed(parts) if part).decode(
        "utf-8", "backslashreplace"
    )
    return path if path.isprintable() else ascii(path)


class Layout:
    """First pass: where everything lies. `nids` is by id(node): a hard link finds the number its inode has already."""

    def __init__(self, tree: Tree, sizes: tuple[int, ...], max_inline: int) -> None:
        self.sizes = sizes
        self.max_inline = max_inline
        self.nids: dict[int, int] = {}
        self.links: dict[int, int] = {}  # of inodes with more than one name
        self.plans: dict[int, Plan] = {}
        self.long_targets: dict[int, int] = {}  # id(node) → block
        self.data: list[tuple[Directory, bytes, Node]] = []  # what goes to the data area, in order
        self.data_blocks = 0
        self.inline_bytes = 0
        self.index_bytes = 0
        self.entries = 0
        self.bodies: dict[tuple[tuple[bytes, bytes], ...], tuple[bytes, int]] = {(): (b"", 0)}
        self.directories: list[Directory] = []
        # the checksum covers the superblock's block: nothing but the device table shares it
        self.start = max(DEVICE_TABLE_OFFSET + len(sizes) * DEVICE_SLOT.size, SUPER_OFFSET + BLOCK)
        if tree.root.children is None or tree.root.mode >> 12 != _DIR:
            raise IndexFormatError("the tree's root is no directory")
        self.root = Directory(tree.root, None, b"")
        end = self._place_all(self.start)
        self.data_start = (end + BLOCK - 1) >> BLOCK_BITS
        self._place_data()
        self.end = self.data_start + self.data_blocks
        if self.end > MAX_ADDR:
            raise IndexFormatError("the tree image would be larger than 2 TiB")

    def body(self, node: Node, directory: Directory | None, name: bytes) -> bytes:
        """The xattrs behind a node's inode; the same set is encoded once."""
        known = self.bodies.get(node.xattrs)
        if known is None:
            try:
                known = xattrs.encode(node.xattrs)
            except IndexFormatError as error:
                raise IndexFormatError(f"{show_path(directory, name)}: {error}") from None
            self.bodies[node.xattrs] = known
        return known[0]

    def _place_all(self, end: int) -> int:
        root = self.root
        end = self._put(end, len(self.body(root.node, None, b"")), root.size if root.size <= MAX_TAIL else 0, root.node)
        root.nid = self.nids[id(root.node)]
        stack = [root]
        while stack:
            directory = stack.pop()
            self.directories.append(directory)
            if directory.size > MAX_TAIL:
                directory.block = (end + BLOCK - 1) >> BLOCK_BITS
                end = (directory.block + len(directory.counts)) << BLOCK_BITS
            end = self._place_children(directory, end)
            stack.extend(reversed(directory.below))
        return end

    def _put(self, end: int, xattr_size: int, tail: int, node: Node) -> int:
        """Give `node` the next place: inode, xattrs, then `tail` bytes that must not cross a block. Returns its end."""
        start = (end + NID_UNIT - 1) & -NID_UNIT
        if tail:
            behind = (start + _INODE + xattr_size) % BLOCK
            if behind + tail > BLOCK:
                start += (BLOCK - behind + NID_UNIT - 1) & -NID_UNIT
        self.nids[id(node)] = start // NID_UNIT
        return start + _INODE + xattr_size + tail

    def _place_data(self) -> None:
        block = self.data_start
        for _, _, node in self.data:
            made = self.plans.get(id(node))
            if made is not None:
                made.place(block)
                block += made.copied_blocks
            else:
                self.long_targets[id(node)] = block
                block += (len(node.target) + BLOCK - 1) >> BLOCK_BITS

    def _place_children(self, directory: Directory, end: int) -> int:
        nids, links, sizes, devices = self.nids, self.links, self.sizes, len(self.sizes)
        children = directory.children
        self.entries += len(children)
        for name in directory.names:
            child = children.get(name)
            if child is None:
                continue  # "." and ".."
            key = id(child)
            kind = child.mode >> 12
            if key in nids:
                if kind == _DIR:
                    raise IndexFormatError(f"directory {show_path(directory, name)} has a second name")
                links[key] = links.get(key, 1) + 1
                continue
            xattr_size = len(self.body(child, directory, name)) if child.xattrs else 0
            if kind == _REG:
                size = child.size
                tail = 0
                if size:
                    tail = CHUNK_INDEX.size
                    extents = child.extents
                    if len(extents) == 1:
                        logical, layer, offset, length = extents[0]
                        plain = not logical and length == size and not offset & 511 and 0 <= layer < devices
                        if not plain or offset < 0 or not 0 < size <= sizes[layer] - offset or size > MAX_CHUNK:
                            tail = self._plan(directory, name, child)
                    else:
                        tail = self._plan(directory, name, child)
                elif child.extents:
                    raise IndexFormatError(f"{show_path(directory, name)}: an empty file with data")
                # chunk indexes lie at a multiple of 8 and may cross blocks
                start = (end + NID_UNIT - 1) & -NID_UNIT
                nids[key] = start >> 5
                end = ((start + _INODE + xattr_size + 7) & -8) + tail if tail else start + _INODE + xattr_size
            elif kind == _DIR:
                sub = Directory(child, directory, name)
                end = self._put(end, xattr_size, sub.size if sub.size <= MAX_TAIL else 0, child)
                sub.nid = nids[key]
                directory.below.append(sub)
            elif kind == _LNK:
                end = self._put(end, xattr_size, self._target(directory, name, child), child)
            else:
                self._check_special(directory, name, child)
                end = self._put(end, xattr_size, 0, child)
        return end

    def _plan(self, directory: Directory, name: bytes, node: Node) -> int:
        """Plan a file that is not one plain chunk; returns the bytes of its indexes."""
        try:
            made = plan(node, self.sizes)
        except IndexFormatError as error:
            raise IndexFormatError(f"{show_path(directory, name)}: {error}") from None
        self.plans[id(node)] = made
        self.index_bytes += len(made.indexes)
        blocks = made.copied_blocks
        self.inline_bytes += blocks << BLOCK_BITS
        if self.inline_bytes > self.max_inline or self.index_bytes > self.max_inline:
            raise IndexFormatError(
                f"{show_path(directory, name)}: the image's sparse files need more than {self.max_inline >> 20} MiB "
                "copied into the tree image",
                hint="use the portable tree for this image: set `tree: fuse`",
            )
        if blocks:
            self.data_blocks += blocks
            self.data.append((directory, name, node))
        return len(made.indexes)

    def _target(self, directory: Directory, name: bytes, node: Node) -> int:
        """Bytes of a symlink's target behind its inode; a long one goes to the data area."""
        length = len(node.target)
        if not 0 < length <= _MAX_TARGET or b"\0" in node.target:
            what = "an empty target" if not length else "a target that no file system allows"
            raise IndexFormatError(f"symlink {show_path(directory, name)} has {what}")
        if length <= MAX_TAIL:
            return length
        self.data_blocks += (length + BLOCK - 1) >> BLOCK_BITS
        self.data.append((directory, name, node))
        return 0

    @staticmethod
    def _check_special(directory: Directory, name: bytes, node: Node) -> None:
        kind = node.mode >> 12
        if kind not in FILE_TYPES:
            raise IndexFormatError(f"{show_path(directory, name)} has mode {node.mode:#o}, which is no kind of file")
        major, minor = node.rdev
        if kind in (_CHR, _BLK) and not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
            raise IndexFormatError(f"{show_path(directory, name)} has device number {major}:{minor}, Linux has no such")
