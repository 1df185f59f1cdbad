"""Layer tars written by hand, so that every oddity a real writer can produce can be asked for; and every compression.

Formats: POSIX.1-2017 pax interchange format; GNU tar manual, "Sparse Formats"; eStargz v1 (stargz-snapshotter,
docs/estargz.md); RFC 1952 (gzip members), RFC 8878 (zstd frames, skippable frames).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import struct
import subprocess
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import zstandard

BLOCK = 512
NS = 1_000_000_000
REG, LINK, SYM, CHR, BLK, DIR, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"


@dataclass(frozen=True)
class Entry:
    """One tar member. `mtime` in ns (may be negative); `sparse` = (real size, ((offset, length), …))."""

    name: bytes
    kind: bytes = REG
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int = 1_600_000_000 * NS
    data: bytes = b""
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = field(default_factory=dict)
    sparse: tuple[int, tuple[tuple[int, int], ...]] | None = None


def _octal(value: int, width: int) -> bytes:
    """`width` bytes: octal with a NUL, or GNU base-256 when it does not fit."""
    text = b"%0*o\0" % (width - 1, value)
    if value >= 0 and len(text) == width:
        return text
    return (value & ((1 << (8 * width)) - 1) | (0x80 << (8 * (width - 1)))).to_bytes(width, "big")


def _header(
    name: bytes,
    kind: bytes,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    mtime: int,
    target: bytes,
    device: tuple[int, int],
) -> bytearray:
    block = bytearray(BLOCK)
    block[0:100] = name[:100].ljust(100, b"\0")
    block[100:108] = _octal(mode, 8)
    block[108:116] = _octal(uid, 8)
    block[116:124] = _octal(gid, 8)
    block[124:136] = _octal(size, 12)
    block[136:148] = _octal(mtime, 12)
    block[156:157] = kind
    block[157:257] = target[:100].ljust(100, b"\0")
    block[257:265] = b"ustar\x0000"
    block[329:337] = _octal(device[0], 8)
    block[337:345] = _octal(device[1], 8)
    return block


def _seal(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _pad(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % BLOCK)


def pax_records(records: dict[str, bytes]) -> bytes:
    """The body of an `x` header: "length key=value\\n", length counting itself."""
    out = b""
    for key, value in records.items():
        body = b" " + key.encode() + b"=" + value + b"\n"
        length = len(body) + 1
        while len(b"%d" % length) + len(body) != length:
            length = len(b"%d" % length) + len(body)
        out += b"%d" % length + body
    return out


def pax_time(nanoseconds: int) -> bytes:
    sign, value = (b"-", -nanoseconds) if nanoseconds < 0 else (b"", nanoseconds)
    return sign + b"%d.%09d" % divmod(value, NS)


def member(entry: Entry) -> bytes:
    """The bytes of one member: pax header if something needs one, header, data."""
    pax: dict[str, bytes] = {}
    name, data, kind = entry.name, entry.data, entry.kind
    if entry.kind == DIR and not name.endswith(b"/"):
        name += b"/"
    if len(name) > 100 or not _plain(name):
        pax["path"] = name
    if len(entry.target) > 100 or not _plain(entry.target):
        pax["linkpath"] = entry.target
    if entry.mtime % NS or entry.mtime < 0:
        pax["mtime"] = pax_time(entry.mtime)
    for key, value in entry.xattrs.items():
        pax["SCHILY.xattr." + key] = value
    size = len(data)
    if entry.sparse is not None:  # pax sparse 1.0: the map in front of the data, in whole blocks
        real, pieces = entry.sparse
        numbers = [len(pieces), *(number for piece in pieces for number in piece)]
        pax |= {
            "GNU.sparse.major": b"1",
            "GNU.sparse.minor": b"0",
            "GNU.sparse.name": name,
            "GNU.sparse.realsize": b"%d" % real,
        }
        pax.pop("path", None)
        name = b"GNUSparseFile.0/" + name.rsplit(b"/", 1)[-1]
        data = _pad(b"".join(b"%d\n" % number for number in numbers)) + data
        size = len(data)
    header = _header(
        name, kind, entry.mode, entry.uid, entry.gid, size, max(0, entry.mtime // NS), entry.target, entry.device
    )
    out = b""
    if pax:
        body = pax_records(pax)
        out += _seal(_header(b"PaxHeaders.0/entry", b"x", 0o644, 0, 0, len(body), 0, b"", (0, 0))) + _pad(body)
    return out + _seal(header) + _pad(data)


def _plain(name: bytes) -> bool:
    """Whether Go and GNU tar would put it into the ustar field. What is no UTF-8 stays there, raw."""
    try:
        return name.isascii() or not name.decode()
    except UnicodeDecodeError:
        return True


def tar(entries: Sequence[Entry], *, record: int = 1024) -> bytes:
    """A whole layer; the end is two zero blocks, then zeros up to a multiple of `record` (GNU tar: 10240)."""
    body = b"".join(map(member, entries)) + b"\0" * 1024
    return body + b"\0" * (-len(body) % record)


def gzip_bytes(data: bytes, level: int = 6) -> bytes:
    return gzip.compress(data, level, mtime=0)


def multi_member(data: bytes, piece: int = 100_003) -> bytes:
    """gzip members of `piece` bytes: none of their borders is aligned with the tar's."""
    return b"".join(gzip_bytes(data[at : at + piece]) for at in range(0, len(data), piece))


def pigz(data: bytes) -> bytes:
    """What the parallel compressor writes: one member, a sync flush (empty stored block) every 128 KiB."""
    return subprocess.run(["pigz", "-n", "-6", "-p", "4", "-c"], input=data, stdout=subprocess.PIPE, check=True).stdout


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress(data)


def zstd_chunked(data: bytes, piece: int = 65_536) -> bytes:
    """Frames of `piece` bytes, then the table in a skippable frame, as zstd:chunked has it."""
    compressor = zstandard.ZstdCompressor(level=3)
    frames = [compressor.compress(data[at : at + piece]) for at in range(0, len(data), piece)]
    table = zstandard.ZstdCompressor().compress(json.dumps({"version": 1, "entries": []}).encode())
    return b"".join(frames) + struct.pack("<II", 0x184D2A50, len(table)) + table


def estargz(entries: Sequence[Entry]) -> tuple[bytes, bytes]:
    """(uncompressed tar, eStargz blob): a gzip member for each entry, the TOC last, then the footer."""
    landmark = Entry(b".no.prefetch.landmark", data=b"\xf0")
    pieces, toc = [], []
    for entry in [landmark, *entries]:
        pieces.append(member(entry))
        toc.append({"name": entry.name.decode("utf-8", "replace"), "type": "reg", "size": len(entry.data)})
    blobs = [gzip_bytes(piece) for piece in pieces]
    offset = sum(map(len, blobs))
    table = Entry(b"stargz.index.json", mode=0o444, mtime=0, data=json.dumps({"version": 1, "entries": toc}).encode())
    pieces.append(member(table) + b"\0" * 1024)
    blobs.append(gzip_bytes(pieces[-1]))
    payload = b"%016xSTARGZ" % offset
    extra = b"SG" + struct.pack("<H", len(payload)) + payload
    footer = b"\x1f\x8b\x08\x04" + b"\0" * 5 + b"\xff" + struct.pack("<H", len(extra)) + extra
    footer += b"\x01\x00\x00\xff\xff" + struct.pack("<II", zlib.crc32(b""), 0)
    return b"".join(pieces), b"".join(blobs) + footer


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


COMPRESS = {
    "gzip": (gzip_bytes, "application/vnd.oci.image.layer.v1.tar+gzip"),
    "plain": (bytes, "application/vnd.oci.image.layer.v1.tar"),
    "multimember": (multi_member, "application/vnd.oci.image.layer.v1.tar+gzip"),
    "pigz": (pigz, "application/vnd.oci.image.layer.v1.tar+gzip"),
    "zstd": (zstd, "application/vnd.oci.image.layer.v1.tar+zstd"),
    "zstdchunked": (zstd_chunked, "application/vnd.oci.image.layer.v1.tar+zstd"),
    "estargz": (bytes, "application/vnd.oci.image.layer.v1.tar+gzip"),  # compressed by estargz()
}
