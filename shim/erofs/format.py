"""EROFS on-disk structures, little-endian, as in Linux fs/erofs/erofs_fs.h (names of the fields are the kernel's).

Only what our images use: 512-byte blocks (Linux >= 6.4), extended inodes, chunk indexes, a device table, inline xattrs.
"""

from __future__ import annotations

import struct
from typing import BinaryIO, NamedTuple

from shim.errors import IndexFormatError

BLOCK_BITS = 9
BLOCK = 1 << BLOCK_BITS
SUPER_OFFSET = 1024
MAGIC = 0xE0F5E1E2
COMPAT_SB_CHKSUM = 1
COMPAT_MTIME = 2
INCOMPAT_CHUNKED_FILE = 4
INCOMPAT_DEVICE_TABLE = 8
KNOWN_INCOMPAT = INCOMPAT_CHUNKED_FILE | INCOMPAT_DEVICE_TABLE

# magic, checksum, feature_compat, blkszbits, sb_extslots, root_nid, inos, build_time, build_time_nsec, blocks,
# meta_blkaddr, xattr_blkaddr, uuid, volume_name, feature_incompat, available_compr_algs, extra_devices, devt_slotoff,
# dirblkbits, xattr_prefix_count, xattr_prefix_start, packed_nid, xattr_filter_reserved, reserved2
SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23x")
DEVICE_SLOT = struct.Struct("<64sII56x")  # tag, blocks, mapped_blkaddr
# i_format, i_xattr_icount, i_mode, i_reserved, i_size, i_u, i_ino, i_uid, i_gid, i_mtime, i_mtime_nsec, i_nlink
INODE = struct.Struct("<HHHHQIIIIqII16x")
CHUNK_INDEX = struct.Struct("<HHI")  # advise, device_id, blkaddr
# the two together, an inode without xattrs and its one chunk, as columns: field → (offset, type code of `array`)
INODE_COLUMNS = {
    "i_format": (0, "H"),
    "i_mode": (4, "H"),
    "i_size": (8, "Q"),
    "i_u": (16, "I"),
    "i_ino": (20, "I"),
    "i_uid": (24, "I"),
    "i_gid": (28, "I"),
    "i_mtime": (32, "q"),
    "i_mtime_nsec": (40, "I"),
    "i_nlink": (44, "I"),
    "device_id": (66, "H"),
    "blkaddr": (68, "I"),
}
PLAIN_STRIDE = 96  # from one of these to the next: 72 bytes, and the next inode begins at a multiple of NID_UNIT
DIRENT = struct.Struct("<QHBB")  # nid, nameoff, file_type, reserved
XATTR_HEADER = struct.Struct("<IBxxxxxxx")  # h_name_filter, h_shared_count
XATTR_ENTRY = struct.Struct("<BBH")  # e_name_len, e_name_index, e_value_size

NID_UNIT = 32  # an inode's number is its offset from the metadata area's start in these
DEVICE_TABLE_OFFSET = SUPER_OFFSET + SUPERBLOCK.size
NULL_ADDR = 0xFFFFFFFF  # a chunk that is a hole
MAX_ADDR = NULL_ADDR - 1

# i_format: version bit 0 (1 = extended), data layout from bit 1
FORMAT_PLAIN = 1 | 0 << 1
FORMAT_INLINE = 1 | 2 << 1
FORMAT_CHUNK = 1 | 4 << 1
CHUNK_INDEXES = 0x20  # in a chunk file's i_u: indexes of 8 bytes; the low 5 bits are log2(chunk size / block size)
MAX_CHUNK_BITS = 31
MAX_CHUNK = BLOCK << MAX_CHUNK_BITS  # 1 TiB

# st_mode >> 12 → d_type as EROFS_FT_* (include/linux/fs_types.h)
FILE_TYPES = {0o10: 1, 0o04: 2, 0o02: 3, 0o06: 4, 0o01: 5, 0o14: 6, 0o12: 7}


def _crc32c_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ 0x82F63B78 if value & 1 else value >> 1  # noqa: PLW2901
        table.append(value)
    return tuple(table)


def crc32c(data: bytes, crc: int = 0xFFFFFFFF) -> int:
    """CRC-32C (RFC 3720 B.4) without the final inversion, as the kernel's crc32c(). Plain Python: for one block."""
    table = _crc32c_table()
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc


def device_table(device_sizes: tuple[int, ...]) -> bytes:
    """The slots of all devices: sizes in bytes → blocks. The tag says the exact size, for a person who looks."""
    return b"".join(DEVICE_SLOT.pack(b"bytes=%d" % size, (size + BLOCK - 1) >> BLOCK_BITS, 0) for size in device_sizes)


def superblock(
    *, root_nid: int, inodes: int, blocks: int, uuid: bytes, devices: int, table: bytes, volume: bytes = b"clip"
) -> bytes:
    """The superblock with its checksum. `table`, the device table, follows it: the checksum covers the whole block."""
    fields = [
        MAGIC,
        0,
        COMPAT_SB_CHKSUM | COMPAT_MTIME,
        BLOCK_BITS,
        0,
        root_nid,
        inodes,
        0,
        0,
        blocks,
        0,
        0,
        uuid,
        volume,
        INCOMPAT_CHUNKED_FILE | (INCOMPAT_DEVICE_TABLE if devices else 0),
        0,
        devices,
        DEVICE_TABLE_OFFSET // DEVICE_SLOT.size if devices else 0,
        0,
        0,
        0,
        0,
        0,
    ]
    # fs/erofs/super.c erofs_superblock_csum_verify: from the superblock to the end of a block's length, field zeroed
    covered = (SUPERBLOCK.pack(*fields) + table)[:BLOCK].ljust(BLOCK, b"\0")
    fields[1] = crc32c(covered)
    return SUPERBLOCK.pack(*fields)


class Superblock(NamedTuple):
    """What a mount must know of an image: sizes in blocks of `BLOCK` bytes, one item a device in mount order."""

    blocks: int
    inodes: int
    root_nid: int
    uuid: bytes
    devices: tuple[int, ...]


def read_superblock(image: BinaryIO) -> Superblock:
    """Read superblock and device table of one of our images. IndexFormatError if it is none, or damaged."""
    image.seek(SUPER_OFFSET)
    head = image.read(BLOCK)
    if len(head) < SUPERBLOCK.size:
        raise IndexFormatError("the tree image is truncated", hint=_REBUILD)
    fields = SUPERBLOCK.unpack_from(head)
    if fields[0] != MAGIC:
        raise IndexFormatError("the tree image has no EROFS superblock", hint=_REBUILD)
    if fields[3] != BLOCK_BITS or fields[4] or fields[14] & ~KNOWN_INCOMPAT or not fields[2] & COMPAT_SB_CHKSUM:
        raise IndexFormatError("the tree image is not one that clip-shim wrote", hint=_REBUILD)
    covered = head.ljust(BLOCK, b"\0")
    if crc32c(covered[:4] + b"\0\0\0\0" + covered[8:]) != fields[1]:
        raise IndexFormatError("the tree image's superblock is damaged", hint=_REBUILD)
    count, slot = fields[16], fields[17]
    image.seek(slot * DEVICE_SLOT.size)
    table = image.read(count * DEVICE_SLOT.size)
    if len(table) != count * DEVICE_SLOT.size:
        raise IndexFormatError("the tree image's device table is truncated", hint=_REBUILD)
    devices = tuple(blocks for _, blocks, _ in DEVICE_SLOT.iter_unpack(table)) if count else ()
    return Superblock(fields[9], fields[6], fields[5], fields[12], devices)


_REBUILD = "it is made again from the index when it is removed from the trees directory"
