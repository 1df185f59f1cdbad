"""Extended attributes as EROFS keeps them behind an inode (fs/erofs/xattr.c, `struct erofs_xattr_ibody_header`)."""

from __future__ import annotations

from shim.erofs.format import XATTR_ENTRY, XATTR_HEADER
from shim.errors import IndexFormatError

# EROFS_XATTR_INDEX_*: an ACL's whole name is its index, the others keep what follows the prefix
_WHOLE = {b"system.posix_acl_access": 2, b"system.posix_acl_default": 3}
_PREFIXES = ((b"user.", 1), (b"trusted.", 4), (b"security.", 6))
_MAX_BODY = XATTR_HEADER.size + 0xFFFE * 4  # i_xattr_icount has 16 bits
_MAX_VALUE = 0xFFFF


def encode(xattrs: tuple[tuple[bytes, bytes], ...]) -> tuple[bytes, int]:
    """(the bytes that follow the inode, b"" if none; the number of attributes left out).

    Left out are names that Linux has no place for (such as macOS' com.apple.*): setxattr(2) refuses them too, and
    every engine goes on without them. IndexFormatError if they do not fit the 256 KiB that an inode has for them.
    """
    entries: list[bytes] = []
    dropped = 0
    for name, value in sorted(xattrs):
        index, suffix = _split(name)
        if index == 0:
            dropped += 1
            continue
        if len(suffix) > 255 or len(value) > _MAX_VALUE:
            raise IndexFormatError(f"extended attribute {name[:64]!r} is too long")
        entry = XATTR_ENTRY.pack(len(suffix), index, len(value)) + suffix + value
        entries.append(entry + bytes(-len(entry) % 4))
    if not entries:
        return b"", dropped
    # the name filter has a bit for each name that is surely absent: none claimed (and only read with its feature bit)
    body = XATTR_HEADER.pack(0, 0) + b"".join(entries)
    if len(body) > _MAX_BODY:
        raise IndexFormatError("its extended attributes take more than 256 KiB")
    return body, dropped


def icount(body_size: int) -> int:
    """i_xattr_icount of a body: 1 for the header, and one for each 4 bytes after it; 0 without a body."""
    return (body_size - XATTR_HEADER.size) // 4 + 1 if body_size else 0


def _split(name: bytes) -> tuple[int, bytes]:
    whole = _WHOLE.get(name)
    if whole is not None:
        return whole, b""
    for prefix, index in _PREFIXES:
        if name.startswith(prefix) and len(name) > len(prefix):
            return index, name[len(prefix) :]
    return 0, b""
