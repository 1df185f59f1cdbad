"""Hostile and damaged index files, and the script that writes tests/assets/index-v1.

`python -m tests.support.indexfiles` writes `bad` afresh, and the files of `good` that are not there yet: those that are
stay, since today's reader must go on reading what older versions wrote.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import stat
import struct
from collections.abc import Callable
from typing import Any

from shim.index import codec, columns, container, treecodec
from shim.index.model import Extent, Node, Tree
from tests.support.indexes import ASSETS, NS, directory, dump, file, good_files, pack, put, sample, symlink


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
    return {**_bad_outside(), **_bad_meta(), **_bad_tree(), **_bad_spans(), **_bad_profiles()}


def _bad_outside() -> dict[str, tuple[bytes, str]]:
    """Header, table, trailer, sections as such."""
    good = codec.encode(sample())
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
    }


def _bad_meta() -> dict[str, tuple[bytes, str]]:
    sections = codec.raw_sections(sample())
    layers = json.loads(sections[codec.META])["layers"]
    return {
        "meta-no-json": (pack({**sections, codec.META: b"{"}), "not valid JSON"),
        "meta-deep": (pack({**sections, codec.META: b"[" * 20_000}), "not valid JSON"),
        "meta-list": (pack({**sections, codec.META: b"[]"}), "no JSON object"),
        "meta-true": (with_meta(checkpoint_mib=True), "checkpoint_mib"),
        "meta-image": (with_meta(image="../../etc\n"), "image reference"),
        "meta-local-image": (with_meta(image="/tmp/ubuntu:latest"), "image reference"),
        "meta-digest": (with_meta(digest="sha256:abc"), "manifest digest"),
        "meta-platform": (with_meta(platform="linux"), "platform"),
        "meta-layers": (with_meta(layers=[0] * 501), "at most 500"),
        "meta-size": (with_meta(layers=[{**layers[0], "size": -1}, *layers[1:]]), "impossible size"),
        "meta-entries": (with_meta(entries=3), "number of entries"),
        "meta-seek-points": (with_meta(seek_points=3), "number of seek points"),
    }


def _bad_tree() -> dict[str, tuple[bytes, str]]:
    return {
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
    }


def _bad_spans() -> dict[str, tuple[bytes, str]]:
    return {
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


def _profile(*columns_: list[int]) -> bytes:
    """The sample with a start profile of these columns, unchecked."""
    return pack({**codec.raw_sections(sample()), codec.PROFILE: columns.join([columns.pack(c) for c in columns_])})


def _bad_profiles() -> dict[str, tuple[bytes, str]]:
    return {
        "profile-layer": (_profile([4], [0]), "not there"),
        "profile-span": (_profile([0], [2 << 20]), "not there"),
        "profile-before": (_profile([0], [1]), "not there"),
        "profile-twice": (_profile([0, 0], [2, 0]), "spans twice"),
        "profile-columns": (_profile([0, 0], [2]), "differ in length"),
        "profile-long": (_profile([0] * 65_537, [2] * 65_537), "more numbers"),
    }


def _overflow(column: bytes) -> bytes:
    values = columns.unpack(column, 99)
    return columns.pack([(1 << 65) if i == 1 else value for i, value in enumerate(values)])


def _extents(*rows: tuple[int, int, int, int]) -> Callable[[Tree], Node]:
    extents = tuple(Extent(*row) for row in rows)
    return lambda tree: put(tree, "x", Node(stat.S_IFREG | 0o644, size=4096, extents=extents))


def _xattrs(*pairs: tuple[bytes, bytes]) -> Callable[[Tree], Node]:
    return lambda tree: put(tree, "x", file(xattrs=pairs))


def main() -> None:
    (ASSETS / "good").mkdir(parents=True, exist_ok=True)
    (ASSETS / "bad").mkdir(exist_ok=True)
    listed = ASSETS / "good" / "sums.json"
    sums: dict[str, Any] = json.loads(listed.read_text()) if listed.exists() else {}
    for name, (index, data) in good_files().items():
        if name in sums:
            continue
        (ASSETS / "good" / f"{name}.clip").write_bytes(data)
        sections = {tag.decode(): hashlib.sha256(raw).hexdigest() for tag, raw in codec.raw_sections(index).items()}
        sums[name] = {"sha256": hashlib.sha256(data).hexdigest(), "raw_sections": sections}
        (ASSETS / "good" / f"{name}.json").write_text(json.dumps(dump(index), indent=1) + "\n")
    listed.write_text(json.dumps(sums, indent=1) + "\n")
    for old in (ASSETS / "bad").iterdir():
        old.unlink()
    for name, (data, _) in bad_files().items():
        (ASSETS / "bad" / f"{name}.clip").write_bytes(data)
    says = {name: message for name, (_, message) in bad_files().items()}
    (ASSETS / "bad" / "errors.json").write_text(json.dumps(says, indent=1) + "\n")


if __name__ == "__main__":
    main()
