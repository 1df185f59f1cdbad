"""Hand-made and mutated archives: accepted and refused as Go's archive/tar does, never anything but LayerError."""

from __future__ import annotations

import random
import time

import pytest

from shim.errors import LayerError
from shim.layers.tar import DIRECTORY, REGULAR, TarEntry, TarWalker
from tests.unit.test_tar import content, walk

END = bytes(1024)
USTAR, GNU, V7 = b"ustar\x0000", b"ustar  \0", bytes(8)


def header(
    name: bytes = b"f",
    size: int | bytes = 0,
    kind: bytes = b"0",
    *,
    link: bytes = b"",
    mode: bytes = b"0000644\0",
    uid: bytes = b"0000000\0",
    mtime: bytes = b"00000000001\0",
    magic: bytes = USTAR,
    fields: dict[int, bytes] | None = None,
    checksum: bytes | None = None,
) -> bytes:
    """One header block; `fields` puts bytes at offsets."""
    block = bytearray(512)
    block[0 : len(name)] = name
    block[100:108], block[108:116], block[116:124] = mode, uid, b"0000000\0"
    block[124:136] = b"%011o\0" % size if isinstance(size, int) else size
    block[136:148] = mtime
    block[156:157] = kind
    block[157 : 157 + len(link)] = link
    block[257:265] = magic
    for at, value in (fields or {}).items():
        block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block) if checksum is None else checksum
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def record(key: bytes, value: bytes) -> bytes:
    """One PAX record: its length counts itself."""
    size = len(key) + len(value) + 3
    while len(b"%d %s=%s\n" % (size, key, value)) != size:
        size += 1
    return b"%d %s=%s\n" % (size, key, value)


def pax(*records: tuple[bytes, bytes], kind: bytes = b"x", raw: bytes | None = None) -> bytes:
    data = b"".join(record(key, value) for key, value in records) if raw is None else raw
    return header(b"pax", len(data), kind) + padded(data)


def long(kind: bytes, value: bytes) -> bytes:
    return header(b"././@LongLink", len(value), kind, magic=GNU) + padded(value)


def one(archive: bytes) -> TarEntry:
    (entry,) = walk(archive)
    return entry


def base256(value: int, width: int) -> bytes:
    data = bytearray(value.to_bytes(width, "big", signed=True))
    data[0] |= 0x80
    return bytes(data)


NAMED = {
    "global headers change nothing": (pax((b"path", b"G"), (b"uid", b"7"), kind=b"g") + header(b"f"), b"f"),
    "a global header drops what came before": (long(b"L", b"L\0") + pax(kind=b"g", raw=b"") + header(b"f"), b"f"),
    "an empty value leaves the header's": (pax((b"path", b"")) + header(b"f"), b"f"),
    "a later record wins": (pax((b"path", b"a"), (b"path", b"b")) + header(b"f"), b"b"),
    "a later header replaces the first": (pax((b"path", b"a")) + pax((b"uid", b"1")) + header(b"f"), b"f"),
    "a GNU name wins over PAX": (pax((b"path", b"a")) + long(b"L", b"L\0rest") + header(b"f"), b"L"),
    "an empty GNU name does not": (long(b"L", b"\0rest") + header(b"f"), b"f"),
    "ustar prefix": (header(b"f", fields={345: b"some/dir"}), b"some/dir/f"),
    "star prefix is shorter": (
        header(b"f", fields={345: b"p" * 131, 476: b"0" * 11, 508: b"tar\0"}),
        b"p" * 131 + b"/f",
    ),
    "V7 has no prefix": (header(b"f", magic=V7, fields={345: b"some/dir"}), b"f"),
    "GNU has times there": (header(b"f", magic=GNU, fields={345: b"00000000001\0" * 2}), b"f"),
    "but old Go wrote a prefix": (header(b"f", magic=GNU, fields={345: b"some/dir"}), b"some/dir/f"),
    "unless it is not ASCII": (header(b"f", magic=GNU, fields={345: b"some/\xff"}), b"f"),
    "a full name field has no NUL": (header(b"n" * 100), b"n" * 100),
    "signed checksum": (
        header(b"\xff\xfe", checksum=b"%06o\0 " % (sum(header(b"\xff\xfe", checksum=b" " * 8)) - 512)),
        b"\xff\xfe",
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_names(case: str) -> None:
    archive, name = NAMED[case]
    assert one(archive + END).name == name
    assert one(archive).name == name  # the end marker may be missing


def test_old_directories_contiguous_files_and_extensions() -> None:
    assert one(header(b"d/", kind=b"\0", magic=V7)).typeflag == DIRECTORY
    assert one(header(b"f", kind=b"\0", magic=V7)).typeflag == REGULAR
    assert one(header(b"f/", kind=b"0")).typeflag == REGULAR
    assert one(long(b"L", b"long/") + header(b"f", kind=b"\0")).typeflag == DIRECTORY
    archive = header(b"f", 3, b"7") + padded(b"abc")
    assert content(archive, one(archive)) == b"abc"
    assert one(long(b"K", b"k" * 300) + header(b"f", kind=b"2", link=b"short")).linkname == b"k" * 300
    assert one(pax((b"linkpath", b"p" * 300)) + header(b"f", kind=b"1", link=b"short")).linkname == b"p" * 300


def test_extensions_hold_for_one_entry_only() -> None:
    archive = pax((b"path", b"a"), (b"SCHILY.xattr.user.x", b"1")) + header(b"f") + header(b"g") + END
    first, second = walk(archive)
    assert (first.name, first.xattrs) == (b"a", ((b"user.x", b"1"),))
    assert (second.name, second.xattrs) == (b"g", ())


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6"])
def test_what_has_no_data_is_not_skipped(kind: bytes) -> None:
    for size in (700, base256(-1, 12)):
        first, second = walk(header(b"a", size, kind) + header(b"b") + END)
        assert (first.size, second.name) == (0, b"b")


def test_pax_size_wins() -> None:
    archive = pax((b"size", b"5")) + header(b"f", 0) + padded(b"hello") + header(b"g") + END
    first, second = walk(archive)
    assert (content(archive, first), second.name) == (b"hello", b"g")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"0000017\0", 15),
        (b"     17\0", 15),
        (b"17 \0\0\0\0\0", 15),
        (b"\0\0\0\0\0\0\0\0", 0),
        (b"        ", 0),
        (b"77777777", 0o77777777),
        (b"17\0junk\0", 15),
        (base256(70_000, 8), 70_000),
        (base256(-2, 8), 4_294_967_294),
        (base256(1 << 40, 8), 0),
    ],
)
def test_numbers(field: bytes, value: int) -> None:
    assert one(header(uid=field)).uid == value


@pytest.mark.parametrize(
    "field", [b"0000018\0", b"1_0\0\0\0\0\0", b"0o17\0\0\0\0", b"+17\0\0\0\0\0", b"-1\0\0\0\0\0\0", b"x"]
)
def test_numbers_that_are_none(field: bytes) -> None:
    with pytest.raises(LayerError, match="number"):
        walk(header(uid=field.ljust(8, b"\0")))


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        (b"1", 10**9),
        (b"1.5", 15 * 10**8),
        (b"-1.5", -15 * 10**8),
        (b"-0.25", -25 * 10**7),
        (b"1.", 10**9),
        (b"0.0000000019", 1),
        (b"99999999999999", (1 << 63) - 1),
        (b"-99999999999999", -(1 << 63)),
    ],
)
def test_times(text: bytes, nanoseconds: int) -> None:
    assert one(pax((b"mtime", text)) + header()).mtime == nanoseconds


def test_binary_time_is_kept_within_64_bits() -> None:
    assert one(header(mtime=base256(-3, 12))).mtime == -3 * 10**9
    assert one(header(mtime=base256(1 << 62, 12))).mtime == (1 << 63) - 1


SPARSE = b"GNU.sparse."


def sparse_1_0(sparse: bytes, data: bytes, realsize: bytes) -> bytes:
    body = padded(sparse) + data
    records = [(SPARSE + b"major", b"1"), (SPARSE + b"minor", b"0"), (SPARSE + b"realsize", realsize)]
    return pax(*records, (SPARSE + b"name", b"real")) + header(b"f", len(body)) + padded(body)


def test_sparse_maps() -> None:
    archive = sparse_1_0(b"2\n10\n3\n20\n2\n", b"abcde", b"30") + header(b"g") + END
    first, second = walk(archive, 100)
    assert (first.name, second.name) == (b"real", b"g")
    assert content(archive, first) == bytes(10) + b"abc" + bytes(7) + b"de" + bytes(8)
    archive = sparse_1_0(b"0\n", b"", b"30")
    assert content(archive, one(archive)) == bytes(30)


BAD: dict[str, bytes] = {
    "checksum": header(checksum=b"000001\0 "),
    "checksum in base 256": header(checksum=b"\x80" + bytes(5) + b"\x10\0"),
    "lone zero block": bytes(512) + header() + END,
    "half a header": header()[:300],
    "half a second zero block": bytes(700),
    "data missing": header(size=1000) + b"x" * 999,
    "negative size": header(size=base256(-1, 12)),
    "negative PAX size": pax((b"size", b"-1")) + header(),
    "negative size hidden by PAX": pax((b"size", b"0")) + header(size=base256(-1, 12)),
    "size out of range": header(size=b"\x80" + b"\xff" * 11),
    "size past 63 bits": header(size=base256((1 << 63) - 1, 12)),
    "negative base-256 overflow": header(size=b"\xc0" + bytes(11)),
    "PAX header cut short": header(b"x", 100, b"x") + b"12 path=a",
    "PAX header too large": header(b"x", (1 << 20) + 1, b"x") + bytes(3 << 20),
    "long name too large": header(b"x", 1 << 30, b"L", magic=GNU) + bytes(1 << 20),
    "name too long for Linux": long(b"L", b"n" * 5000) + header(),
    "target too long for Linux": pax((b"linkpath", b"n" * 5000)) + header(kind=b"2"),
    "PAX without length": pax(raw=b"path=a\n") + header(),
    "PAX length of zero": pax(raw=b"0 path=a\n") + header(),
    "PAX negative length": pax(raw=b"-9 path=a\n") + header(),
    "PAX length too long": pax(raw=b"99 path=a\n") + header(),
    "PAX length of digits only": pax(raw=b"5 \n\n\n") + header(),
    "PAX endless length": pax(raw=b"9" * 5000 + b" path=a\n") + header(),
    "PAX without newline": pax(raw=b"9 path=ab") + header(),
    "PAX without equals sign": pax(raw=b"9 path-a\n") + header(),
    "PAX empty key": pax((b"", b"v")) + header(),
    "PAX NUL in a path": pax((b"path", b"a\0b")) + header(),
    "PAX NUL in a key": pax((b"SCHILY.xattr.user.\0", b"v")) + header(),
    "PAX uid is no number": pax((b"uid", b"1x")) + header(),
    "PAX uid too large": pax((b"uid", b"9" * 20)) + header(),
    "PAX mtime is no number": pax((b"mtime", b"now")) + header(),
    "PAX mtime with a sign inside": pax((b"mtime", b"1.-5")) + header(),
    "PAX atime is no number": pax((b"atime", b"x")) + header(),
    "damaged global header": pax(kind=b"g", raw=b"nonsense") + header(),
    "xattr without a name": pax((b"SCHILY.xattr.", b"v")) + header(),
    "xattr name too long": pax((b"SCHILY.xattr.user." + b"n" * 300, b"v")) + header(),
    "xattr value too long": pax((b"SCHILY.xattr.user.x", b"v" * 65_537)) + header(),
    "unknown type": header(kind=b"D"),
    "multi-volume": header(kind=b"M", magic=GNU),
    "star's sparse file": header(kind=b"S"),
    "sparse directory": pax((SPARSE + b"map", b"0,0"), (SPARSE + b"numblocks", b"1")) + header(kind=b"5"),
    "sparse map without a count": pax((SPARSE + b"map", b"0,0")) + header(),
    "sparse map with a wrong count": pax((SPARSE + b"map", b"0,0"), (SPARSE + b"numblocks", b"2")) + header(),
    "sparse offsets out of order": pax((SPARSE + b"numbytes", b"1"), (SPARSE + b"offset", b"0")) + header(),
    "sparse 1.0 without a map": sparse_1_0(b"", b"", b"9"),
    "sparse 1.0 with a cut map": sparse_1_0(b"3\n0\n1\n", b"", b"9"),
    "sparse 1.0 with an endless map": sparse_1_0(b"7" * (2 << 20), b"", b"9"),
    "sparse 1.0 with too many": sparse_1_0(b"99999999\n", b"", b"9"),
    "sparse pieces that overlap": sparse_1_0(b"2\n0\n5\n4\n1\n", b"abcdef", b"9"),
    "sparse pieces past the end": sparse_1_0(b"1\n8\n5\n", b"abcde", b"9"),
    "sparse negative piece": sparse_1_0(b"1\n8\n-5\n", b"", b"9"),
    "sparse size negative": sparse_1_0(b"0\n", b"", b"-9"),
    "sparse data too short": sparse_1_0(b"1\n0\n5\n", b"abcd", b"9"),
    "sparse data too long": sparse_1_0(b"1\n0\n5\n", b"abcdef", b"9"),
    "old sparse map without end": header(kind=b"S", magic=GNU, fields={482: b"\1"})
    + (bytes(504) + b"\1" + bytes(7)) * 3000,
    "old sparse header cut short": header(kind=b"S", magic=GNU, fields={482: b"\1"}) + bytes(100),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("piece", [1 << 20, 509])
def test_refused(case: str, piece: int) -> None:
    with pytest.raises(LayerError, match="tar archive"):
        walk(BAD[case], piece)


def test_missing_padding_at_the_end_is_fine() -> None:
    archive = header(b"f", 5) + b"hello"
    for extra in (0, 1, 506, 507):
        assert one(archive + bytes(extra)).size == 5
    with pytest.raises(LayerError, match="too early"):
        walk(archive[:-1])


def test_limits() -> None:
    walker = TarWalker(max_entries=3)
    walker.feed(header() * 3)
    with pytest.raises(LayerError, match="too many entries"):
        walker.feed(header())
    walker = TarWalker(max_metadata=2500)
    walker.feed((pax((b"SCHILY.xattr.user.x", b"v" * 1000)) + header()) * 2)
    with pytest.raises(LayerError, match="too large together"):
        walker.feed(pax((b"SCHILY.xattr.user.x", b"v" * 1000)) + header())


def test_data_is_not_looked_at() -> None:
    """1 TiB of claimed data costs nothing, and looks like headers or not."""
    walker = TarWalker()
    walker.feed(header(b"huge", base256(1 << 40, 12)))
    block = memoryview(header(b"inside") * 2048)
    start = time.process_time()
    for _ in range(2000):
        walker.feed(block)
    assert time.process_time() - start < 1
    assert [entry.name for entry in walker.entries] == [b"huge"]
    with pytest.raises(LayerError, match="too early"):
        walker.finish()


SEEDS = (
    [archive for archive, _ in NAMED.values()]
    + list(BAD.values())
    + [sparse_1_0(b"2\n10\n3\n20\n2\n", b"abcde", b"30")]
)


@pytest.mark.parametrize("seed", range(8))
def test_mutations(seed: int) -> None:
    """Any damage gives entries or LayerError, the same ones however the archive is cut."""
    rnd = random.Random(seed)
    small = [archive[:20_000] for archive in SEEDS]
    for _ in range(250):
        data = bytearray(b"".join(rnd.choices(small, k=rnd.randint(1, 3))))
        for _ in range(rnd.randint(1, 5)):
            at = rnd.randrange(len(data))
            data[at] = rnd.choice((0, 0x20, 0x80, 0xFF, rnd.randrange(256), *b"0123456789xgLKS,.=-"))
            block = at // 512 * 512
            if rnd.random() < 0.8 and block + 512 <= len(data):
                data[block + 148 : block + 156] = b" " * 8
                data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
        if rnd.random() < 0.2:
            del data[rnd.randrange(len(data)) :]
        assert outcome(bytes(data), 1 << 20) == outcome(bytes(data), rnd.randint(1, 2000))


def outcome(archive: bytes, piece: int) -> tuple[list[TarEntry], str]:
    walker = TarWalker()
    try:
        for at in range(0, len(archive), piece):
            walker.feed(archive[at : at + piece])
        walker.finish()
    except LayerError as error:
        return walker.entries, str(error)
    return walker.entries, ""
