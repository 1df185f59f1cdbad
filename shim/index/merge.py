"""Tar entries of an image's layers, lowest layer first, become one merged Tree.

What counts is what an engine shows after it has applied the layers (containerd's archive/tar.go, moby's pkg/archive):
a later entry replaces an earlier one of its name, a directory over a directory keeps the children and takes the new
metadata, a hard link's header sets the shared inode's metadata, a directory's time is the one its header gives
whatever is written into it later. Whiteouts are those of the OCI image specification (layer.md, "Whiteouts"): they hide
names of lower layers and never of their own, wherever in the layer they stand.

Where engines and unpackers differ, this is the view of a single directory into which all layers are unpacked:
- A symlink as a *parent* is followed inside the root (`lib/x` with `/lib -> usr/lib` is `/usr/lib/x`); as the last
  component it is replaced. (Engines that unpack each layer by itself put a new directory over a lower layer's symlink.)
- A hard link may name a file of a lower layer: it is the same inode and changes none of its metadata, whatever its
  header says. (Those engines fail.)
- A directory that no layer names is 0755, root's, with time `implicit_mtime` (0): engines use the time of unpacking,
  and an index must not depend on when it was made.
- A character device 0/0 is an overlay's own whiteout: in the engines' overlays it hides its name. So here.
"""

from __future__ import annotations

import posixpath
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING

from shim.errors import LayerError
from shim.index.model import Extent, Node, Tree

if TYPE_CHECKING:
    from shim.layers.tar import TarEntry

MAX_ENTRIES = 5_000_000  # tar entries and directories that no layer names
MAX_NAME = 255  # NAME_MAX
MAX_PATH = 4096  # PATH_MAX
MAX_LINKS = 255  # symlinks followed for one path, as containerd's fs.RootPath
MAX_STEPS = 50_000_000  # path components walked through symlinks, all in all: symlink mazes end here
NO_ID = 0xFFFF_FFFF  # -1 means "leave it" to chown(2): a new file stays root's
MAX_XATTR = 65536  # XATTR_SIZE_MAX
MAX_MTIME = (1 << 63) - 1

_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_AUFS = b".wh..wh."  # AUFS' own book-keeping, left in very old images
_AUFS_LINKS = b".wh..wh.plnk/"  # there regular files live that hard links elsewhere refer to
_OVERLAY_XATTRS = (b"trusted.overlay.", b"user.overlay.")
_XATTR_SPACES = (b"user.", b"trusted.", b"security.", b"system.posix_acl_")
_MAX_SHOWN = 200


def show_path(path: bytes) -> str:
    """A path for a person's terminal: printable, one line, at most 200 characters."""
    text = path.decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"


class TreeMerger:
    """Call `apply` for each layer, lowest first, then `finish`.

    `dropped` counts, by reason, what a layer holds but no container may see (xattrs that would steer an overlay, …):
    one warning for the user.
    """

    def __init__(self, *, implicit_mtime: int = 0, max_entries: int = MAX_ENTRIES) -> None:
        self.dropped: dict[str, int] = {}
        self._implicit_mtime = implicit_mtime
        self._room = max_entries
        self._max_entries = max_entries
        self._steps = MAX_STEPS
        self._root = Node(stat.S_IFDIR | 0o755, mtime=implicit_mtime, children={})
        self._layer = 0
        self._own: dict[int, Node] = {}  # id → node, no directory, of the layer being applied
        self._dirs: dict[bytes, Node] = {}  # cleaned path → directory; dropped when a removal could make one stale
        self._aufs_links: dict[bytes, Node] = {}

    def apply(self, entries: Sequence[TarEntry], layer: int) -> None:
        """Apply one layer's entries, in tar order; `layer` is its number in the index, from 0.

        Raises LayerError, naming layer and entry: a name or target that leaves the root, is too long or holds NUL, a
        hard link to nothing or to a directory, an unknown type, too many entries.
        """
        self._layer = layer
        self._own = {}
        self._dirs = {b"": self._root}
        self._aufs_links = {}
        # First everything this layer hides: only lower layers' nodes are there yet, so order does not matter.
        for entry in entries:
            if _WHITEOUT in entry.name:
                self._hide(self._clean(entry.name))
        self._dirs = {b"": self._root}
        for entry in entries:
            self._add(entry)

    def finish(self) -> Tree:
        """The merged tree, link counts set."""
        tree = Tree(self._root)
        tree.count_links()
        return tree

    # --- names -------------------------------------------------------------------------------------------------------

    def _error(self, name: bytes, problem: str) -> LayerError:
        return LayerError(f'layer {self._layer + 1}: entry "{show_path(name)}" {problem}')

    def _clean(self, name: bytes) -> bytes:
        """The name as Go's filepath.Clean gives it, relative to the root; b"" is the root itself."""
        path = name[2:] if name[:2] == b"./" else name
        if path[-1:] == b"/":
            path = path[:-1]
        if b"/." in path or b"//" in path or path[:1] in (b".", b"/", b""):
            path = posixpath.normpath(name)
            if path == b".." or path[:3] == b"../":
                raise self._error(name, "leaves the root")
            path = path.lstrip(b"/")
            if path == b".":
                path = b""
        if len(path) > MAX_PATH:
            raise self._error(name, f"is longer than {MAX_PATH} bytes")
        if b"\0" in path:
            raise self._error(name, "has a NUL in its name")
        return path

    def _directory(self, path: bytes, *, create: bool) -> Node | None:
        """The directory that cleaned `path` leads to, symlinks followed inside the root.

        Without `create` None if there is none; with it missing directories are made, and a lower layer's file in the
        way is replaced by one.
        """
        known = self._dirs.get(path)
        if known is not None:
            return known
        stack: list[tuple[Node, int]] = [(self._root, 0)]  # directory, length of its real path
        todo = path.split(b"/")[::-1]
        links = 0
        while todo:
            name = todo.pop()
            if name in (b"", b"."):
                continue
            if name == b"..":
                if len(stack) > 1:
                    stack.pop()
                continue
            here, length = stack[-1]
            assert here.children is not None
            child = here.children.get(name)
            if child is not None and stat.S_ISLNK(child.mode):
                links += 1
                target = child.target.split(b"/")[::-1]
                self._steps -= len(target)
                if links > MAX_LINKS or self._steps < 0:
                    raise self._error(path, "leads through too many symlinks")
                if child.target[:1] == b"/":
                    del stack[1:]
                todo += target
                continue
            if child is None or child.children is None:
                if not create:
                    return None
                child = self._implicit(here, name, child, path)
            length += len(name) + 1
            if length > MAX_PATH:
                raise self._error(path, f"leads to a path longer than {MAX_PATH} bytes")
            stack.append((child, length))
        self._dirs[path] = stack[-1][0]
        return stack[-1][0]

    def _implicit(self, parent: Node, name: bytes, found: Node | None, path: bytes) -> Node:
        """A directory that is needed and that no entry names, put at `name` in `parent`."""
        if found is not None and id(found) in self._own:
            raise self._error(path, "is to lie in what the same layer says is not a directory")
        if len(name) > MAX_NAME:
            raise self._error(path, f"has a name longer than {MAX_NAME} bytes")
        node = Node(stat.S_IFDIR | 0o755, mtime=self._implicit_mtime, children={})
        self._put(parent, name, node, path)
        return node

    # --- hiding ------------------------------------------------------------------------------------------------------

    def _hide(self, path: bytes) -> None:
        parent, _, base = path.rpartition(b"/")
        if base[:4] != _WHITEOUT:
            return
        hidden = base[4:]
        if hidden in (b"", b".", b".."):
            raise self._error(path, "is a whiteout of nothing")
        directory = self._directory(parent, create=False)
        if directory is None or directory.children is None:
            return
        if base == _OPAQUE:
            directory.children.clear()
            self._dirs = {b"": self._root}
        elif base[:8] != _AUFS:
            self._remove(directory.children, hidden)

    def _remove(self, children: dict[bytes, Node], name: bytes) -> None:
        old = children.pop(name, None)
        if old is not None and (old.children is not None or stat.S_ISLNK(old.mode)):
            self._dirs = {b"": self._root}

    # --- adding ------------------------------------------------------------------------------------------------------

    def _put(self, parent: Node, name: bytes, node: Node, path: bytes) -> None:
        self._room -= 1
        if self._room < 0:
            raise self._error(path, f"is one too many: an index holds at most {self._max_entries} entries")
        assert parent.children is not None
        parent.children[name] = node
        if node.children is None:
            self._own[id(node)] = node

    def _add(self, entry: TarEntry) -> None:
        path = self._clean(entry.name)
        if not path:
            if entry.typeflag == b"5":
                self._set_metadata(self._root, entry)
            return  # engines ignore anything else that claims to be the root
        parent_path, _, base = path.rpartition(b"/")
        if path[:8] == _AUFS and path != _OPAQUE:
            if path.startswith(_AUFS_LINKS) and entry.typeflag == b"0":
                self._aufs_links[base] = self._file(entry)
            return
        parent = self._dirs.get(parent_path)
        if parent is None:
            parent = self._directory(parent_path, create=True)
            assert parent is not None
        assert parent.children is not None
        if base[:4] == _WHITEOUT:
            return
        if len(base) > MAX_NAME:
            raise self._error(path, f"has a name longer than {MAX_NAME} bytes")
        children = parent.children
        old = children.get(base)
        if entry.typeflag == b"5":
            if old is not None and old.children is not None:
                self._set_metadata(old, entry)
                return
            node = self._node(entry, stat.S_IFDIR)
            node.children = {}
            self._remove(children, base)
        else:
            if old is not None:
                self._remove(children, base)
            made = self._make(entry, path)
            if made is None:
                return
            node = made
        self._put(parent, base, node, path)

    def _make(self, entry: TarEntry, path: bytes) -> Node | None:
        """The node of an entry that is no directory; its name is free already. None: nothing is to stand there."""
        kind = entry.typeflag
        if kind == b"0":
            return self._file(entry)
        if kind == b"1":
            return self._hard_link(entry, path)
        if kind == b"2":
            target = entry.linkname
            if not target or len(target) >= MAX_PATH or b"\0" in target:
                raise self._error(path, "is a symlink whose target is empty, too long or has a NUL")
            node = self._node(entry, stat.S_IFLNK)
            node.mode = stat.S_IFLNK | 0o777  # Linux has no other
            node.target = target
            node.size = len(target)
            return node
        if kind in (b"3", b"4"):
            major, minor = entry.devmajor, entry.devminor
            if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):  # Linux' dev_t
                raise self._error(path, f"has the impossible device number {major}:{minor}")
            if kind == b"3" and major == minor == 0:
                self._count("overlay whiteout")
                return None
            node = self._node(entry, stat.S_IFCHR if kind == b"3" else stat.S_IFBLK)
            node.rdev = (major, minor)
            return node
        if kind == b"6":
            return self._node(entry, stat.S_IFIFO)
        raise self._error(path, f"has the unknown type {kind!r}")

    def _file(self, entry: TarEntry) -> Node:
        node = self._node(entry, stat.S_IFREG)
        node.size = entry.size
        layer = self._layer
        if entry.extents is not None:
            node.extents = tuple([Extent(at, layer, offset, length) for at, offset, length in entry.extents if length])
        elif entry.size:
            node.extents = (Extent(0, layer, entry.data_offset, entry.size),)
        return node

    def _hard_link(self, entry: TarEntry, path: bytes) -> Node:
        target = self._clean(entry.linkname)
        parent_path, _, base = target.rpartition(b"/")
        node: Node | None = None
        if target.startswith(_AUFS_LINKS):
            node = self._aufs_links.get(base)
        elif base:
            parent = self._directory(parent_path, create=False)
            if parent is not None and parent.children is not None:
                node = parent.children.get(base)
        if node is None:
            raise self._error(path, f'is a hard link to "{show_path(entry.linkname)}", which is not there')
        if node.children is not None:
            raise self._error(path, f'is a hard link to the directory "{show_path(entry.linkname)}"')
        if id(node) in self._own or node is self._aufs_links.get(base):
            # Engines chown, chmod and set times through the new name: it is the shared inode's that change.
            before = dict(node.xattrs)
            mode = node.mode
            self._set_metadata(node, entry)
            if stat.S_ISLNK(mode):
                node.mode = mode
            if before:
                node.xattrs = tuple(sorted((before | dict(node.xattrs)).items()))
        return node

    def _node(self, entry: TarEntry, kind: int) -> Node:
        node = Node(kind)
        self._set_metadata(node, entry)
        return node

    def _set_metadata(self, node: Node, entry: TarEntry) -> None:
        uid, gid, mtime = entry.uid, entry.gid, entry.mtime
        if not (0 <= uid <= NO_ID and 0 <= gid <= NO_ID):
            raise self._error(entry.name, f"has the impossible owner {uid}:{gid}")
        node.mode = stat.S_IFMT(node.mode) | entry.mode & 0o7777
        node.uid = uid if uid != NO_ID else 0
        node.gid = gid if gid != NO_ID else 0
        node.mtime = mtime if 0 <= mtime <= MAX_MTIME else 0  # engines: containerd boundTime, moby chtimes
        node.xattrs = self._xattrs(entry, node.mode) if entry.xattrs else ()

    def _xattrs(self, entry: TarEntry, mode: int) -> tuple[tuple[bytes, bytes], ...]:
        """Those a file system would take: known name spaces, `user.` on files and directories only."""
        kept: dict[bytes, bytes] = {}
        user = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
        for name, value in dict(entry.xattrs).items():
            if name.startswith(_OVERLAY_XATTRS):
                self._count("overlay xattr")
            elif not name.startswith(_XATTR_SPACES) or (not user and name.startswith(b"user.")):
                self._count("xattr no file system takes")
            elif len(name) > MAX_NAME or len(value) > MAX_XATTR or b"\0" in name:
                raise self._error(entry.name, "has an xattr that is too large or has a NUL in its name")
            else:
                kept[name] = value
        return tuple(sorted(kept.items()))

    def _count(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
