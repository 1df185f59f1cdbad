"""Sample indexes, a comparable dump of one, hostile variants, and the script that writes tests/assets/index-v1.

`python -m tests.support.indexes` writes the files afresh. Do that only together with a new format version: the files in
the repository are what older versions wrote, and today's reader must go on reading them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import lzma
import stat
import struct
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shim.index import codec, columns, container, treecodec
from shim.index.model import WINDOW_SIZE, Compression, Extent, Index, Layer, Node, Restart, SpanTable, Tree

ASSETS = Path(__file__).parents[1] / "assets" / "index-v1"
NS = 10**9


def digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def window(seed: int, step: int) -> bytes:
    """A sparse window: short runs, `step` apart, of text and of single bytes."""
    data = bytearray(WINDOW_SIZE)
    for at in range(seed % step, WINDOW_SIZE - 16, step):
        run = hashlib.sha256(f"{seed} {at}".encode()).digest()[: 3 + at % 13]
        data[at : at + len(run)] = run
    return bytes(data)


def directory(**more: Any) -> Node:
    return Node(stat.S_IFDIR | 0o755, children={}, **more)


def file(size: int = 0, layer: int = 0, offset: int = 0, mode: int = 0o644, **more: Any) -> Node:
    extents = (Extent(0, layer, offset, size),) if size else ()
    return Node(stat.S_IFREG | mode, size=size, extents=extents, **more)


def symlink(target: bytes, **more: Any) -> Node:
    return Node(stat.S_IFLNK | 0o777, size=len(target), target=target, **more)


def put(tree: Tree, path: str | bytes, node: Node) -> Node:
    """Set `path` to `node`, making directories."""
    here = tree.root
    *parents, last = (path.encode() if isinstance(path, str) else path).strip(b"/").split(b"/")
    for name in parents:
        assert here.children is not None
        here = here.children.setdefault(name, directory(mtime=1_700_000_000 * NS))
    assert here.children is not None
    here.children[last] = node
    return node


def spans(size: int, usize: int, points: list[tuple[int, int, int, Restart, bytes]]) -> SpanTable:
    """A table from (ustart, cstart, bits, kind, window) rows."""
    table = SpanTable(array("Q", [row[0] for row in points] + [usize]), array("Q", [row[1] for row in points] + [size]))
    for ustart, cstart, bits, kind, sparse in points:
        table.bits.append(bits)
        table.kinds.append(kind)
        table.windows.append(sparse)
        table.digests += hashlib.sha256(f"{size} {ustart} {cstart}".encode()).digest()
    return table


def sample_layers() -> list[Layer]:
    """gzip with every kind of span, plain tar, zstd, and an empty gzip layer."""
    stream, deflate, go_on = Restart.STREAM, Restart.DEFLATE, Restart.CONTINUE
    gzip = spans(
        3_000_000,
        9_000_000,
        [
            (0, 0, 0, stream, b""),
            (2_100_000, 700_001, 3, deflate, window(1, 257)),
            (4_200_000, 1_400_002, 0, deflate, b""),
            (5_000_000, 1_700_000, 7, deflate, bytes(WINDOW_SIZE)),
            (6_000_000, 1_700_000, 0, go_on, b""),
            (8_000_000, 2_700_000, 0, stream, b""),
        ],
    )
    plain = spans(20480, 20480, [(0, 0, 0, stream, b""), (16384, 16384, 0, stream, b"")])
    zstd = spans(50_000, 1_000_000, [(0, 0, 0, stream, b""), (500_000, 0, 0, go_on, b"")])
    tar = "application/vnd.oci.image.layer.v1.tar"
    empty = SpanTable(array("Q", [0]), array("Q", [29]))
    return [
        Layer(digest("a"), digest("A"), 3_000_000, 9_000_000, tar + "+gzip", Compression.GZIP, gzip),
        Layer(digest("b"), digest("b"), 20480, 20480, tar, Compression.NONE, plain),
        Layer(digest("c"), digest("C"), 50_000, 1_000_000, tar + "+zstd", Compression.ZSTD, zstd),
        Layer(digest("d"), digest("D"), 29, 0, tar + "+gzip", Compression.GZIP, empty),
    ]


def sample_tree() -> Tree:
    """Everything a tree can have, in few entries."""
    tree = Tree(directory(mtime=1_700_000_000 * NS))
    caps = (b"security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    put(tree, "dev/null", Node(stat.S_IFCHR | 0o666, rdev=(1, 3)))
    put(tree, "dev/loop", Node(stat.S_IFBLK | 0o660, gid=6, rdev=(4095, 1048575)))
    put(tree, "dev/pipe", Node(stat.S_IFIFO | 0o600, mtime=-1))
    put(tree, "dev/sock", Node(stat.S_IFSOCK | 0o755, uid=4294967294, gid=4294967294))
    put(tree, "proc", directory())
    put(tree, "sys", directory())
    put(tree, "tmp", Node(stat.S_IFDIR | 0o1777, children={}, mtime=1_700_000_001 * NS + 123456789))
    put(tree, "bin", symlink(b"usr/bin"))
    put(tree, "usr/bin/su", file(70000, 0, 1024, 0o4755, mtime=1_600_000_000 * NS))
    put(tree, "usr/bin/ping", file(512, 0, 72704, 0o755, xattrs=(caps,), mtime=1_600_000_000 * NS))
    acl = (b"system.posix_acl_access", b"\2\0\0\0"), (b"user.note", b""), (b"trusted.x", b"\0" * 9)
    put(tree, "usr/bin/new", file(100, 1, 512, xattrs=tuple(sorted(acl)), mtime=-5 * NS + 7))
    linked = put(tree, "usr/lib/a", file(4096, 0, 80000 * 100))
    put(tree, "usr/lib/b/also", linked)
    put(tree, "usr/share/link", put(tree, "usr/share/target", symlink("/ümlaut".encode())))
    put(tree, b"usr/share/\xff\n", file(mtime=(1 << 62) * NS))
    put(tree, "usr/share/" + "n" * 255, file(1, 2, 999_999))
    sparse = Extent(512, 0, 2_000_000, 100), Extent(5000, 0, 2_000_100, 24), Extent(1 << 40, 1, 1000, 1)
    put(tree, "var/sparse", Node(stat.S_IFREG | 0o600, size=(1 << 41) + 1, extents=sparse))
    put(tree, "var/hole", Node(stat.S_IFREG | 0o600, size=(1 << 63) - 1))
    put(tree, "var/tail", Node(stat.S_IFREG | 0o600, size=4096, extents=(Extent(0, 0, 512, 512),)))
    tree.count_links()
    return tree


def sample() -> Index:
    config = b'{"architecture": "amd64",\n "os":"linux", "config": {"Env": ["A=\xc3\xbc"]}}\n'
    image = "registry.example:5000/team/app_x/small:v1.0"
    return Index(image, digest("manifest"), "linux/arm64/v8", config, sample_layers(), sample_tree())


def smallest() -> Index:
    """No layers at all (a `FROM scratch` image)."""
    tree = Tree(directory())
    tree.count_links()
    return Index("localhost/scratch", digest("0"), "linux/amd64", b"", [], tree, checkpoint_mib=4)


def dump(index: Index) -> dict[str, Any]:
    """All that an index says, as JSON: two indexes are equal if their dumps are. Names that share an inode show it."""
    names: dict[int, str] = {}
    entries = []
    for path, node in index.tree.walk():
        text = path.decode("utf-8", "backslashreplace")
        entry: dict[str, Any] = {"path": text}
        first = names.setdefault(id(node), text)
        if first != text:
            entry["same_as"] = first
        for key in ("mode", "uid", "gid", "mtime", "size", "nlink"):
            entry[key] = getattr(node, key)
        entry["rdev"], entry["target"] = list(node.rdev), node.target.hex()
        entry["xattrs"] = sorted([name.hex(), value.hex()] for name, value in node.xattrs)
        entry["extents"] = [list(extent) for extent in node.extents]
        entry["dir"] = node.children is not None
        entries.append(entry)
    layers = []
    for layer in index.layers:
        table = layer.spans
        rows = [
            [
                table.ustart(i),
                table.cstart(i),
                table.bit(i),
                table.kind(i),
                table.digest(i).hex(),
                _sum(table.window(i)),
            ]
            for i in range(table.count)
        ]
        row = {key: getattr(layer, key) for key in ("digest", "diff_id", "size", "uncompressed_size", "media_type")}
        ends = [table.ustart(table.count), table.cstart(table.count)]
        layers.append({**row, "compression": layer.compression.name, "spans": rows, "ends": ends})
    head = {key: getattr(index, key) for key in ("image", "digest", "platform", "checkpoint_mib")}
    return {**head, "config": index.config.hex(), "layers": layers, "tree": entries}


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if data else ""


def pack(sections: dict[bytes, bytes]) -> bytes:
    """A file of raw sections, all hashes right, nothing else checked."""
    return container.pack([(tag, container.MANDATORY, raw) for tag, raw in sections.items()])


def with_tree(change: Callable[[Tree], object]) -> bytes:
    """The sample with an unchecked tree."""
    index = sample()
    sections = codec.raw_sections(index)
    change(index.tree)
    return pack({**sections, codec.TREE: treecodec.encode_tree(index.tree, len(index.layers))})


def with_columns(tag: bytes, change: Callable[[list[bytes]], object]) -> bytes:
    """The sample with the columns of one section changed."""
    sections = codec.raw_sections(sample())
    count = {codec.TREE: len(treecodec.COLUMNS), codec.SPANS: 5, codec.WINDOWS: 4}[tag]
    parts = columns.split(sections[tag], count, "")
    change(parts)
    return pack({**sections, tag: columns.join(parts)})


def with_meta(**values: Any) -> bytes:
    sections = codec.raw_sections(sample())
    meta = {**json.loads(sections[codec.META]), **values}
    return pack({**sections, codec.META: json.dumps(meta).encode()})


def tree_column(name: str, change: Callable[[bytes], bytes]) -> bytes:
    at = treecodec.COLUMNS.index(name)

    def edit(parts: list[bytes]) -> None:
        parts[at] = change(parts[at])

    return with_columns(codec.TREE, edit)


def replace_column(tag: bytes, at: int, change: Callable[[bytes], bytes]) -> bytes:
    def edit(parts: list[bytes]) -> None:
        parts[at] = change(parts[at])

    return with_columns(tag, edit)


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def _loop(tree: Tree) -> None:
    """Ten thousand directories, one in the other: too long a path."""
    here = tree.root
    for _ in range(10_000):
        assert here.children is not None
        here.children = {b"d": directory()}
        here = here.children[b"d"]


def _bomb() -> bytes:
    """A section that expands 6,000 times, every hash right."""
    sections = codec.raw_sections(sample())
    data = bytearray(pack({**sections, codec.TREE: b"\0"}))
    raw = bytes(16 << 20)
    return _rewrite(bytes(data), codec.TREE, _lzma(raw), len(raw), container.LZMA2)


def _lzma(raw: bytes) -> bytes:
    return lzma.compress(raw, lzma.FORMAT_RAW, filters=container._filters(len(raw)))


def _rewrite(data: bytes, tag: bytes, stored: bytes, raw_length: int, method: int, shift: int = 0) -> bytes:
    """`data` with one section's stored bytes and row replaced, all offsets and hashes made right again."""
    row, header = container._ROW, container._HEADER
    fields = list(header.unpack_from(data))
    rows = [list(row.unpack_from(data, header.size + i * row.size)) for i in range(fields[3])]
    bodies, at = [], header.size + len(rows) * row.size
    for entry in rows:
        body = data[entry[3] : entry[3] + entry[4]]
        if entry[0] == tag:
            body, entry[2], entry[5] = stored, method, raw_length
        entry[3], entry[4], entry[6] = at + shift * (entry[0] == tag), len(body), hashlib.sha256(body).digest()
        bodies.append(body)
        at += len(body)
    table = b"".join(row.pack(*entry) for entry in rows)
    fields[4], fields[6] = at + 16, hashlib.sha256(table).digest()
    return b"".join([header.pack(*fields), table, *bodies, container._TRAILER.pack(at + 16, container.END_MAGIC)])


def bad_files() -> dict[str, tuple[bytes, str]]:
    """name → (bytes, what the error must say)."""
    good = codec.encode(sample())
    layers = json.loads(codec.raw_sections(sample())[codec.META])["layers"]
    size = container._HEADER.size
    zeros = struct.pack("<Q", 0)
    return {
        "empty": (b"", "empty"),
        "text": (b"FROM debian\n" * 8, "not a clip index"),
        "go-clip": (container.GO_MAGIC + b"\1" + bytes(90), "Go clip file"),
        "header-only": (good[:64], "cut short"),
        "cut-short": (good[:-1], "cut short"),
        "trailing-byte": (good + b"\n", "behind its end"),
        "text-mode": (good.replace(b"\r\n", b"\n"), "not a clip index|impossible length|do not belong|damaged"),
        "trailer-only": (good[-16:], "impossible length"),
        "trailer-length": (patched(good, len(good) - 16, struct.pack("<Q", 1 << 63)), "impossible length"),
        "header-length": (patched(good, 16, zeros), "do not belong together"),
        "other-major": (patched(good, 8, b"\2\0"), "version 2.0"),
        "no-sections": (patched(good, 12, b"\0\0\0\0"), "header is damaged"),
        "many-sections": (patched(good, 12, b"\xff\xff\xff\xff"), "header is damaged"),
        "table-flip": (patched(good, size + 20, b"\xff"), "section table is damaged"),
        "tree-flip": (patched(good, len(good) - 400, bytes([good[-400] ^ 1])), "is damaged"),
        "unknown-mandatory": (
            container.pack([(b"XTRA", container.MANDATORY, b"?")]),
            "a reader must know",
        ),
        "section-twice": (container.pack([(b"META", 1, b"{}")] * 2), "repeats a tag"),
        "no-tree": (
            pack({t: r for t, r in codec.raw_sections(sample()).items() if t != codec.TREE}),
            "no section TREE",
        ),
        "unknown-codec": (_rewrite(good, codec.TREE, b"x", 1, 9), "codec 9"),
        "bad-lzma": (_rewrite(good, codec.TREE, b"\xff" * 99, 100, container.LZMA2), "cannot be decompressed"),
        "lzma-and-more": (
            _rewrite(good, codec.CONFIG, _lzma(b"abc") + b"x", 3, container.LZMA2),
            "does not decompress",
        ),
        "lzma-short": (_rewrite(good, codec.CONFIG, _lzma(b"abc"), 4, container.LZMA2), "does not decompress"),
        "section-overlap": (_rewrite(good, codec.CONFIG, b"abc", 3, container.STORED, shift=-1), "outside its place"),
        "section-gap": (_rewrite(good, codec.CONFIG, b"abc", 3, container.STORED, shift=1), "outside its place"),
        "raw-length-short": (_rewrite(good, codec.CONFIG, b"abc", 2, container.STORED), "two lengths"),
        "bomb": (_bomb(), "more than a reader believes"),
        "huge-claim": (_rewrite(good, codec.TREE, b"x" * 50, 1 << 62, container.LZMA2), "more than a reader believes"),
        "meta-no-json": (pack({**codec.raw_sections(sample()), codec.META: b"{"}), "not valid JSON"),
        "meta-deep": (pack({**codec.raw_sections(sample()), codec.META: b"[" * 20_000}), "not valid JSON"),
        "meta-list": (pack({**codec.raw_sections(sample()), codec.META: b"[]"}), "no JSON object"),
        "meta-true": (with_meta(checkpoint_mib=True), "checkpoint_mib"),
        "meta-image": (with_meta(image="../../etc\n"), "image reference"),
        "meta-local-image": (with_meta(image="/tmp/ubuntu:latest"), "image reference"),
        "meta-digest": (with_meta(digest="sha256:abc"), "manifest digest"),
        "meta-platform": (with_meta(platform="linux"), "platform"),
        "meta-layers": (with_meta(layers=[0] * 501), "at most 500"),
        "meta-size": (with_meta(layers=[{**layers[0], "size": -1}, *layers[1:]]), "impossible size"),
        "meta-entries": (with_meta(entries=3), "number of entries"),
        "meta-seek-points": (with_meta(seek_points=3), "number of seek points"),
        "tree-dotdot": (with_tree(lambda t: put(t, "usr/..", file())), "no file can have"),
        "tree-dot": (with_tree(lambda t: put(t, "usr/.", file())), "no file can have"),
        "tree-slash": (tree_column("names", lambda c: c.replace(b"ping", b"pi/g")), "no file can have"),
        "tree-empty-name": (tree_column("names", lambda c: c.replace(b"ping\0", b"\0")), "not sorted"),
        "tree-duplicate": (tree_column("names", lambda c: c.replace(b"ping", b"new")), "not unique"),
        "tree-long-name": (with_tree(lambda t: put(t, "n" * 256, file())), "no file can have"),
        "tree-deep": (with_tree(_loop), "longer than 4095"),
        "tree-no-names": (tree_column("names", lambda _: b""), "damaged"),
        "tree-unended-name": (tree_column("names", lambda c: c[:-1]), "damaged"),
        "tree-child-counts": (tree_column("children", lambda c: b"\xff\xff\x7f" + c[1:]), "too short|lacks entries"),
        "tree-link-nowhere": (tree_column("links", lambda c: b"\x7f" * len(c)), "points nowhere"),
        "tree-link-zero": (tree_column("links", lambda c: bytes(len(c))), "points nowhere"),
        "tree-class-nowhere": (tree_column("inodes", lambda c: b"\x7f" + c[1:]), "points nowhere"),
        "tree-root-link": (tree_column("inodes", lambda c: b"\0" + c[1:]), "points nowhere"),
        "tree-number-cut": (tree_column("mtimes", lambda c: c[:-1] + b"\x80"), "cut off"),
        "tree-number-long": (tree_column("mtimes", lambda c: b"\x80" * 11 + b"\0" + c[1:]), "too long"),
        "tree-too-many": (tree_column("mtimes", lambda c: c + bytes(99)), "more numbers"),
        "tree-left-over": (tree_column("size_low", lambda c: c + b"\0"), "too long"),
        "tree-ns": (tree_column("mtime_ns", lambda c: columns.pack([NS]) + c[1:]), "nanoseconds"),
        "tree-root-file": (with_tree(lambda t: setattr(t, "root", file())), "root directory"),
        "tree-type": (with_tree(lambda t: put(t, "x", Node(0o170644))), "impossible mode"),
        "tree-owner": (with_tree(lambda t: put(t, "x", file(uid=(1 << 32) - 1))), "impossible owner"),
        "tree-size": (with_tree(lambda t: put(t, "x", Node(stat.S_IFREG, size=1 << 63))), "impossible size"),
        "tree-mtime": (with_tree(lambda t: put(t, "x", file(mtime=(1 << 63) * NS))), "64 bits"),
        "tree-rdev": (with_tree(lambda t: put(t, "x", Node(stat.S_IFCHR, rdev=(4096, 0)))), "device number"),
        "tree-target-empty": (with_tree(lambda t: put(t, "x", symlink(b""))), "symlink target"),
        "tree-target-long": (with_tree(lambda t: put(t, "x", symlink(b"t" * 4096))), "symlink target"),
        "tree-extent-layer": (with_tree(_extents((0, 3, 0, 4096))), "outside layer 3"),
        "tree-extent-outside": (with_tree(_extents((0, 1, 20000, 4096))), "outside layer 1"),
        "tree-extent-negative": (with_tree(_extents((0, 1, -512, 4096))), "outside layer 1"),
        "tree-extent-beyond": (with_tree(_extents((4000, 1, 512, 99))), "more data than its size"),
        "tree-overlay-xattr": (with_tree(_xattrs((b"trusted.overlay.opaque", b"y"))), "overlayfs"),
        "tree-overlay-user": (with_tree(_xattrs((b"user.overlay.redirect", b"/"))), "overlayfs"),
        "tree-overlay-prefix": (with_tree(_xattrs((b"trusted.overlayfs", b"y"))), "overlayfs"),
        "tree-xattr-prefix": (with_tree(_xattrs((b"system.evil", b"y"))), "extended attribute"),
        "tree-xattr-bare": (with_tree(_xattrs((b"user.", b"y"))), "extended attribute"),
        "tree-xattr-twice": (with_tree(_xattrs((b"user.a", b"1"), (b"user.a", b"2"))), "one name"),
        "span-count": (replace_column(codec.SPANS, 0, lambda _: columns.pack([1 << 60, 0, 0, 0])), "more than"),
        "span-backwards": (
            replace_column(codec.SPANS, 1, lambda c: b"\0" + c[len(columns.pack([2_100_000])) :]),
            "layer",
        ),
        "span-overflow": (replace_column(codec.SPANS, 1, _overflow), "64 bits"),
        "span-kind": (replace_column(codec.SPANS, 3, lambda c: b"\3" + c[1:]), "no start of a stream"),
        "span-kind-unknown": (replace_column(codec.SPANS, 3, lambda c: c[:4] + b"\3" + c[5:]), "unknown kind"),
        "span-bits": (replace_column(codec.SPANS, 3, lambda c: c[:1] + b"\x22" + c[2:]), "unknown kind"),
        "span-digest-short": (replace_column(codec.SPANS, 4, lambda c: c[:-1]), "differ in length"),
        "window-count": (replace_column(codec.WINDOWS, 0, lambda c: c[:-1]), "not one for each|column"),
        "window-gap": (replace_column(codec.WINDOWS, 1, lambda c: columns.pack([32768]) + c[1:]), "past its window"),
        "window-bytes": (replace_column(codec.WINDOWS, 3, lambda c: c[:-1]), "differ in length"),
        "window-runs": (replace_column(codec.WINDOWS, 0, lambda _: columns.pack([1 << 40, 0, 0])), "not one for each"),
    }


def _overflow(column: bytes) -> bytes:
    values = columns.unpack(column, 99)
    return columns.pack([(1 << 65) if i == 1 else value for i, value in enumerate(values)])


def _extents(*rows: tuple[int, int, int, int]) -> Callable[[Tree], Node]:
    extents = tuple(Extent(*row) for row in rows)
    return lambda tree: put(tree, "x", Node(stat.S_IFREG | 0o644, size=4096, extents=extents))


def _xattrs(*pairs: tuple[bytes, bytes]) -> Callable[[Tree], Node]:
    return lambda tree: put(tree, "x", file(xattrs=pairs))


def good_files() -> dict[str, tuple[Index, bytes]]:
    """name → (what it means, bytes)."""
    index = sample()
    data = codec.encode(index)
    sections = [(tag, container.MANDATORY, raw) for tag, raw in codec.raw_sections(index).items()]
    return {
        "sample": (index, data),
        "scratch": (smallest(), codec.encode(smallest())),
        "behind-go": (copy.copy(index), container.GO_MAGIC + b"\1" + bytes(range(90)) + data),
        "optional-section": (index, container.pack([(b"note", 0, b"skip me"), *sections])),
    }


def main() -> None:
    for kind in ("good", "bad"):
        for old in (ASSETS / kind).iterdir():
            old.unlink()
    sums: dict[str, Any] = {}
    for name, (index, data) in good_files().items():
        (ASSETS / "good" / f"{name}.clip").write_bytes(data)
        sections = {tag.decode(): hashlib.sha256(raw).hexdigest() for tag, raw in codec.raw_sections(index).items()}
        sums[name] = {"sha256": hashlib.sha256(data).hexdigest(), "raw_sections": sections}
        (ASSETS / "good" / f"{name}.json").write_text(json.dumps(dump(index), indent=1) + "\n")
    (ASSETS / "good" / "sums.json").write_text(json.dumps(sums, indent=1) + "\n")
    for name, (data, _) in bad_files().items():
        (ASSETS / "bad" / f"{name}.clip").write_bytes(data)
    says = {name: message for name, (_, message) in bad_files().items()}
    (ASSETS / "bad" / "errors.json").write_text(json.dumps(says, indent=1) + "\n")


if __name__ == "__main__":
    main()
