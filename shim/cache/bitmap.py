"""The file that says which spans of a cached layer were verified: small, checksummed, replaced as a whole.

    offset  bytes
    0       8      "CLIPBITS"
    8       4      version, 1                          (all numbers little-endian)
    12      4      count of spans
    16      32     the span table's digest
    48      n      bits, n = (count + 7) // 8; span i is bit i % 8 of byte i // 8
    48+n    32     SHA-256 of everything before it

It is written under another name, synced and renamed: a reader sees the old one or the new one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

_HEAD = struct.Struct("<8sII32s")
_MAGIC = b"CLIPBITS"
_VERSION = 1


def pack_bits(flags: bytes | bytearray) -> bytes:
    """One bit per byte of `flags` (0 or not)."""
    bits = bytearray((len(flags) + 7) // 8)
    for i, flag in enumerate(flags):
        if flag:
            bits[i >> 3] |= 1 << (i & 7)
    return bytes(bits)


def unpack_bits(bits: bytes, count: int) -> bytearray:
    """The inverse of `pack_bits`: one byte (0 or 1) per span."""
    return bytearray(bits[i >> 3] >> (i & 7) & 1 for i in range(count))


def load(path: Path, count: int, table_digest: bytes) -> bytearray | None:
    """One byte (0 or 1) per span, or None: there is no such file, it is torn, or it belongs to another table."""
    expected = _HEAD.size + (count + 7) // 8 + 32
    try:
        with open(path, "rb") as file:
            data = file.read(expected + 1)
    except OSError:
        return None
    body, checksum = data[:-32], data[-32:]
    if len(data) != expected or sha256(body).digest() != checksum:
        return None
    if _HEAD.unpack_from(body) != (_MAGIC, _VERSION, count, table_digest):
        return None
    return unpack_bits(body[_HEAD.size :], count)


def clear(path: Path, spans: Iterable[int]) -> int:
    """Take back that `spans` are there, whatever the table; returns how many were claimed. Raises OSError.

    A bitmap that is torn is removed: the layer counts as empty then anyway.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD.size).ljust(_HEAD.size, b"\0")
    _, _, count, digest = _HEAD.unpack(head)
    flags = load(path, count, digest)
    if flags is None:
        path.unlink(missing_ok=True)
        return 0
    claimed = [span for span in set(spans) if 0 <= span < count and flags[span]]
    for span in claimed:
        flags[span] = 0
    if claimed:
        store(path, flags, digest)
    return len(claimed)


def store(path: Path, flags: bytes | bytearray, table_digest: bytes, *, sync: bool = True) -> None:
    """Replace the file. The caller has made sure that the data of every set bit is on disk. Raises OSError."""
    body = _HEAD.pack(_MAGIC, _VERSION, len(flags), table_digest) + pack_bits(flags)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(body + sha256(body).digest())
        file.flush()
        if sync:
            os.fdatasync(file.fileno())
    temporary.rename(path)
