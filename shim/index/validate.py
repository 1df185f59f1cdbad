"""What every index must obey, and its bounds: checked before an index is written and after one is read.

Nothing here trusts its input beyond the types of `model`: a bad value raises IndexFormatError with the path or layer.
Sources: Linux include/uapi/linux/limits.h (NAME_MAX, PATH_MAX, XATTR_NAME_MAX), fs/erofs/erofs_fs.h (xattr sizes),
include/linux/kdev_t.h (12 bits of major, 20 of minor).
"""

from __future__ import annotations

import operator
import re
import stat
from collections.abc import Iterable, Sequence
from itertools import pairwise

from shim.errors import IndexFormatError
from shim.index.flat import Attributes, cut_path
from shim.index.model import WINDOW_SIZE, Compression, Index, Layer, Node, Restart, SpanTable, Tree
from shim.index.sparse import SparseWindows

MAX_LAYERS = 500  # overlayfs' own limit on lowers
MAX_SPANS = 1 << 18  # of all layers: 512 GiB at 2 MiB spacing
MAX_SPAN = 128 << 20  # uncompressed bytes of one span: a reader holds it in memory to verify it
MAX_CHECKPOINT_MIB = 64  # a span may be twice as long as the spacing
MAX_CONFIG = 8 << 20
MAX_ENTRIES = 2_000_000  # names in the tree
MAX_EXTENTS = 2_000_000  # of files that are not one extent from first byte to last
MAX_XATTRS = 2_000_000  # in all distinct sets of xattrs
MAX_NAME = 255
MAX_PATH = 4095  # with the leading slash: PATH_MAX less the NUL
MAX_TARGET = 4095
MAX_SIZE = (1 << 63) - 1  # loff_t
MAX_SECONDS = 1 << 63  # of a time, in either direction
MAX_MAJOR = (1 << 12) - 1
MAX_MINOR = (1 << 20) - 1
MAX_ID = (1 << 32) - 2  # 2**32 - 1 means "no change" to chown(2)
MAX_XATTR_NAME = 255
MAX_XATTR_VALUE = 65535  # EROFS has 16 bits for it, one byte less than Linux' XATTR_SIZE_MAX
MAX_XATTRS_SIZE = ((1 << 16) - 1) * 4  # an EROFS inode counts its inline xattrs in 16 bits, in units of 4 bytes
FILE_TYPE = 0o170000  # S_IFMT; stat.S_ISREG and its like overflow on hostile modes
DEVICES = (stat.S_IFCHR, stat.S_IFBLK)
_XATTRS_HEADER = 12
_XATTR_HEADER = 4
_NS = 10**9

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_IMAGE = re.compile(r"[a-zA-Z0-9.\-\[\]:]+(?:/[a-z0-9._-]+)+(?::[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?")
_PLATFORM = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}(?:/[a-z0-9][a-z0-9._-]{0,63}){1,2}")
_MEDIA_TYPE = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9!#$&^_.+-]{0,126}/[a-zA-Z0-9][a-zA-Z0-9!#$&^_.+-]{0,126}")
_XATTR_NAME = re.compile(rb"(?:user|security|trusted)\.[^\0]+|system\.posix_acl_(?:access|default)", re.DOTALL)
_OVERLAY = (
    b"trusted.overlay",
    b"user.overlay.",
)  # overlayfs takes orders from these; the kernel's prefixes end in a dot
_TYPES = frozenset({stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK})
_DOTS = (b"", b".", b"..")


def validate_head(index: Index) -> None:
    """Check the image, config and layers, without spans and tree. Raises IndexFormatError."""
    _text(_IMAGE, index.image, "image reference", 512)
    _text(_DIGEST, index.digest, "manifest digest")
    _text(_PLATFORM, index.platform, "platform")
    if not 1 <= index.checkpoint_mib <= MAX_CHECKPOINT_MIB:
        raise IndexFormatError(f"the checkpoint spacing is {index.checkpoint_mib} MiB, not 1 to {MAX_CHECKPOINT_MIB}")
    if len(index.config) > MAX_CONFIG:
        raise IndexFormatError(f"the image config is {len(index.config)} bytes long, at most {MAX_CONFIG} are allowed")
    if len(index.layers) > MAX_LAYERS:
        raise IndexFormatError(f"the image has {len(index.layers)} layers, at most {MAX_LAYERS} are allowed")
    for number, layer in enumerate(index.layers):
        _text(_DIGEST, layer.digest, f"layer {number}: digest")
        _text(_DIGEST, layer.diff_id, f"layer {number}: diff id")
        _text(_MEDIA_TYPE, layer.media_type, f"layer {number}: media type")
        if not (0 <= layer.size <= MAX_SIZE and 0 <= layer.uncompressed_size <= MAX_SIZE):
            raise IndexFormatError(f"layer {number}: impossible size")
        if layer.compression == Compression.NONE and layer.size != layer.uncompressed_size:
            raise IndexFormatError(f"layer {number}: not compressed, but with two sizes")


def _text(pattern: re.Pattern[str], value: str, what: str, longest: int = 256) -> None:
    if len(value) > longest or not pattern.fullmatch(value):
        raise IndexFormatError(f"{what} is not well-formed: {value[:80]!r}")


def validate_spans(layer: Layer, number: int) -> None:
    """Check a layer's span table against the layer; `number` is for the message. Raises IndexFormatError."""
    spans, count = layer.spans, layer.spans.count
    problem = _shape_problem(spans) or _offset_problem(layer)
    if not problem and count:
        if spans.kinds[0] != Restart.STREAM:
            problem = "its first span is no start of a stream"
        elif max(spans.kinds) > Restart.DEFLATE or max(spans.bits) > 7:
            problem = "a span of unknown kind"
        elif layer.compression != Compression.GZIP and Restart.DEFLATE in spans.kinds:
            problem = "a deflate restart point, but not gzip"
        elif any(bit for bit, kind in zip(spans.bits, spans.kinds, strict=True) if kind != Restart.DEFLATE):
            problem = "a bit offset where there is no deflate block"
        else:
            problem = _window_problem(spans)
    if problem:
        raise IndexFormatError(f"layer {number}: {problem}")


def _shape_problem(spans: SpanTable) -> str:
    count = spans.count
    if count > MAX_SPANS:
        return f"{count} spans, at most {MAX_SPANS} are allowed"
    lengths = (len(spans.ustarts), len(spans.cstarts), len(spans.bits), len(spans.digests), len(spans.windows))
    if lengths != (count + 1, count + 1, count, 32 * count, count):
        return "the columns of its span table differ in length"
    return ""


def _offset_problem(layer: Layer) -> str:
    ustarts, cstarts = layer.spans.ustarts, layer.spans.cstarts
    if ustarts[0] != 0 or ustarts[-1] != layer.uncompressed_size or cstarts[-1] != layer.size:
        return "its spans do not cover it"
    if not all(map(operator.lt, ustarts, ustarts[1:])):
        return "its spans are not in order"
    if not all(map(operator.le, cstarts, cstarts[1:])):
        return "its restart points are not in order"
    if any(end - start > MAX_SPAN for start, end in pairwise(ustarts)):
        return f"a span is longer than {MAX_SPAN >> 20} MiB"
    if layer.compression == Compression.NONE and any(
        ustart != cstart
        for ustart, cstart, kind in zip(ustarts, cstarts, layer.spans.kinds, strict=False)
        if kind != Restart.CONTINUE
    ):
        return "not compressed, but with two offsets for one restart point"
    return ""


def _window_problem(spans: SpanTable) -> str:
    if isinstance(spans.windows, SparseWindows):  # records: nothing is unpacked to see whether it is there
        sizes = [WINDOW_SIZE if record else 0 for record in spans.windows.records]
    else:
        sizes = [len(window) for window in spans.windows]
    for kind, size in zip(spans.kinds, sizes, strict=True):
        if size and (kind != Restart.DEFLATE or size != WINDOW_SIZE):
            return f"a window of {size} bytes at a span of kind {kind}"
    return ""


def validate_tree(tree: Tree, sizes: Sequence[int]) -> None:
    """Check a tree whose extents lie in layers of these uncompressed sizes. Raises IndexFormatError with the path.

    Time and memory are linear in the entries, however deep the tree; a loop or a directory's second name is found.
    """
    _TreeCheck(sizes).run(tree)


class _TreeCheck:
    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._seen: set[int] = set()
        self._attributes: set[tuple[int, int, int, tuple[tuple[bytes, bytes], ...]]] = set()
        self._entries = 1
        self._extents = 0
        self._xattrs = 0

    def run(self, tree: Tree) -> None:
        if tree.root.children is None:
            raise IndexFormatError("the root is no directory")
        self._node(b"/", b"", tree.root)
        stack = [(b"", tree.root)]
        while stack:
            base, parent = stack.pop()
            assert parent.children is not None
            self._entries += len(parent.children)
            if self._entries > MAX_ENTRIES:
                raise IndexFormatError(f"the tree has more than {MAX_ENTRIES} entries")
            for name, node in parent.children.items():
                if name in _DOTS or b"/" in name or b"\0" in name or len(name) > MAX_NAME:
                    raise IndexFormatError(f"{_show(base)}: a name that no file can have: {name[:64]!r}")
                if len(base) + 1 + len(name) > MAX_PATH:
                    raise IndexFormatError(f"{_show(base)}: a path longer than {MAX_PATH} bytes")
                self._node(base, name, node)
                if node.children is not None:
                    stack.append((base + b"/" + name, node))

    def _node(self, base: bytes, name: bytes, node: Node) -> None:
        key = id(node)
        if key in self._seen:
            if node.children is not None:
                raise IndexFormatError(f"{_show(base, name)}: a directory with two names")
            return
        self._seen.add(key)
        attributes = (node.mode, node.uid, node.gid, node.xattrs)
        problem = "" if attributes in self._attributes else self._attributes_problem(node)
        self._attributes.add(attributes)
        if not problem and not -MAX_SECONDS * _NS <= node.mtime < MAX_SECONDS * _NS:
            problem = "its time does not fit 64 bits of seconds"
        kind = node.mode & FILE_TYPE
        if kind == stat.S_IFREG:
            problem = problem or self._file_problem(node)
        elif node.extents or node.size != len(node.target):
            problem = problem or "data or size where there can be none"
        if kind == stat.S_IFLNK:
            if not 1 <= len(node.target) <= MAX_TARGET or b"\0" in node.target:
                problem = problem or "a symlink target that is empty, too long or has a NUL"
        elif node.target:
            problem = problem or "a symlink target where there can be none"
        if node.rdev != (0, 0) and (
            kind not in DEVICES or not (0 <= node.rdev[0] <= MAX_MAJOR and 0 <= node.rdev[1] <= MAX_MINOR)
        ):
            problem = problem or f"an impossible device number {node.rdev}"
        if (node.children is not None) != (kind == stat.S_IFDIR):
            problem = problem or "entries and type contradict each other"
        if problem:
            raise IndexFormatError(f"{_show(base, name)}: {problem}")

    def _attributes_problem(self, node: Node) -> str:
        self._xattrs += len(node.xattrs)
        problem = _attributes_problem(node.mode, node.uid, node.gid, node.xattrs)
        return problem or ("" if self._xattrs <= MAX_XATTRS else _TOO_MANY_XATTRS.format(MAX_XATTRS))

    def _file_problem(self, node: Node) -> str:
        if not 0 <= node.size <= MAX_SIZE:
            return f"an impossible size {node.size}"
        end = 0
        for logical, layer, offset, length in node.extents:
            if length <= 0 or logical < end:
                return "its data extents are empty, overlap or are not in order"
            end = logical + length
            if not 0 <= layer < len(self._sizes):
                return f"data in layer {layer}, which the image does not have"
            if offset < 0 or offset + length > self._sizes[layer]:
                return f"data outside layer {layer}"
        if end > node.size:
            return "more data than its size"
        if len(node.extents) > 1:
            self._extents += len(node.extents)
            if self._extents > MAX_EXTENTS:
                return f"the tree has more than {MAX_EXTENTS} extents"
        return ""


_TOO_MANY_XATTRS = "the tree has more than {} extended attributes"


def check_attributes(found: Iterable[Attributes]) -> None:
    """Check what the inodes of a tree have in common. Raises IndexFormatError."""
    count = 0
    for attributes in found:
        count += len(attributes.xattrs)
        problem = _attributes_problem(*attributes)
        if problem or count > MAX_XATTRS:
            raise IndexFormatError(f"the tree is damaged: {problem or _TOO_MANY_XATTRS.format(MAX_XATTRS)}")


def _attributes_problem(mode: int, uid: int, gid: int, xattrs: tuple[tuple[bytes, bytes], ...]) -> str:
    if not 0 <= mode <= 0o177777 or mode & FILE_TYPE not in _TYPES:
        return f"an impossible mode {mode:#o}"
    if not (0 <= uid <= MAX_ID and 0 <= gid <= MAX_ID):
        return f"an impossible owner {uid}:{gid}"
    size = _XATTRS_HEADER
    for name, value in xattrs:
        if len(name) > MAX_XATTR_NAME or not _XATTR_NAME.fullmatch(name):
            return f"an extended attribute that no file can have: {name[:64]!r}"
        if name.startswith(_OVERLAY):
            return f"an extended attribute that would give overlayfs orders: {name[:64]!r}"
        if len(value) > MAX_XATTR_VALUE:
            return f"extended attribute {name!r} is longer than {MAX_XATTR_VALUE} bytes"
        size += -(-(_XATTR_HEADER + len(name) + len(value)) // 4) * 4
    if size > MAX_XATTRS_SIZE:
        return f"its extended attributes take more than {MAX_XATTRS_SIZE} bytes"
    if len({name for name, _ in xattrs}) != len(xattrs):
        return "two extended attributes of one name"
    return ""


def _show(base: bytes, name: bytes = b"") -> str:
    return cut_path(base + b"/" + name if name else base or b"/")
