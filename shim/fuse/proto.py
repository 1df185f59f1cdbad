"""The FUSE kernel protocol: the structures and constants that the blob server speaks.

Source: Linux `include/uapi/linux/fuse.h` (7.31 to 7.45), native byte order, every structure padded to 8 bytes; flag and
notification numbers that Debian's header lacks are from Linux 6.12. What the kernel does with them is in
`fs/fuse/dev.c` (queue, interrupts, resend), `inode.c` (INIT) and `file.c` (reads). Pure functions over bytes, no I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

MAJOR = 7
MINOR = 40  # the highest we declare; the kernel then behaves as that version
LEAST_MINOR = 31  # Linux 5.4; EROFS over devices needs far newer kernels anyway
ROOT_ID = 1

# enum fuse_opcode
LOOKUP = 1
FORGET = 2
GETATTR = 3
OPEN = 14
READ = 15
STATFS = 17
RELEASE = 18
FSYNC = 20
FLUSH = 25
INIT = 26
OPENDIR = 27
READDIR = 28
RELEASEDIR = 29
ACCESS = 34
INTERRUPT = 36
DESTROY = 38
BATCH_FORGET = 42

# fuse_init_in.flags (low 32 bits) and flags2 (high 32 bits)
ASYNC_READ = 1 << 0
PARALLEL_DIROPS = 1 << 18
MAX_PAGES = 1 << 22
INIT_EXT = 1 << 30
HAS_RESEND = 1 << 39

# fuse_open_out.open_flags
FOPEN_DIRECT_IO = 1 << 0
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_NOFLUSH = 1 << 5

# enum fuse_notify_code
NOTIFY_INVAL_ENTRY = 3
NOTIFY_RESEND = 7

UNIQUE_RESEND = 1 << 63  # set in `unique` of a request that is delivered a second time
UNIQUE_MASK = UNIQUE_RESEND - 1

MIN_READ_BUFFER = 8192  # read(2) with less is EINVAL (FUSE_MIN_READ_BUFFER)
MAX_WRITE = 4096  # nobody writes; small, so that a request always fits into REQUEST_BUFFER
REQUEST_BUFFER = 16384
MAX_READ = 1 << 20  # 256 pages of 4 KiB: fs/fuse limits max_pages to 256 (sysctl fs.fuse.max_pages_limit)
MAX_BACKGROUND = 4096  # read-ahead requests in flight; at the default of 12 one stalled layer would stop all others
NAME_MAX = 255

IN_HEADER = struct.Struct("=IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
OUT_HEADER = struct.Struct("=IiQ")  # len, error, unique
INIT_IN = struct.Struct("=IIII")  # major, minor, max_readahead, flags
INIT_IN_EXT = struct.Struct("=IIIII44x")  # the same, flags2, unused[11]
INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")  # … max_pages, map_alignment, flags2, unused[7]
READ_IN = struct.Struct("=QQII")  # fh, offset, size, read_flags; lock_owner, flags, padding follow
OPEN_OUT = struct.Struct("=QII")  # fh, open_flags, padding
RELEASE_IN = struct.Struct("=Q")  # fh; the rest is not needed
ATTR = struct.Struct("=6Q10I")  # ino size blocks a/m/ctime, a/m/ctimensec mode nlink uid gid rdev blksize flags
ATTR_OUT = struct.Struct("=QII")  # attr_valid, attr_valid_nsec, dummy; fuse_attr follows
ENTRY_OUT = struct.Struct("=QQQQII")  # nodeid, generation, entry_valid, attr_valid, their nsec; fuse_attr follows
INVAL_ENTRY_OUT = struct.Struct("=QII")  # parent, name length, flags; the name and a NUL follow
STATFS_OUT = struct.Struct("=5Q4I24x")  # blocks bfree bavail files ffree bsize namelen frsize padding spare[6]
DIRENT = struct.Struct("=QQII")  # ino, off, namelen, type; the name follows, padded to 8

_VALID = 86400 * 365  # seconds that names and attributes stay good in the kernel: a blob never changes
_BLOCK = 512
_BLKSIZE = 4096
_S_IFDIR = 0o040000
_S_IFREG = 0o100000
_DT_DIR = 4
_DT_REG = 8


class ProtocolError(Exception):
    """A request is shorter than its structure, or INIT speaks a version that cannot be served."""


@dataclass(frozen=True, slots=True)
class InitState:
    """What INIT agreed on. A successor that takes the descriptor over never sees INIT, so this is journalled.

    flags: the 64 agreed bits (flags | flags2 << 32); max_readahead in bytes.
    """

    major: int
    minor: int
    flags: int
    max_readahead: int

    @property
    def can_resend(self) -> bool:
        """The kernel delivers unanswered requests again when asked (Linux >= 6.9)."""
        return bool(self.flags & HAS_RESEND)

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> InitState:
        """The inverse of `to_json`. Raises ValueError when a field is missing or no number."""
        try:
            return cls(*(int(data[key]) for key in ("major", "minor", "flags", "max_readahead")))
        except (KeyError, TypeError) as error:
            raise ValueError(f"no INIT state: {data!r}") from error


def negotiate(body: memoryview) -> InitState:
    """Choose from what INIT's body offers. Raises ProtocolError for a kernel older than 7.31 or another major."""
    if len(body) < INIT_IN.size:
        raise ProtocolError("INIT is too short")
    major, minor, readahead, flags = INIT_IN.unpack_from(body)
    if major != MAJOR or minor < LEAST_MINOR:
        raise ProtocolError(f"the kernel speaks FUSE {major}.{minor}, {MAJOR}.{LEAST_MINOR} or newer is needed")
    if flags & INIT_EXT and len(body) >= INIT_IN_EXT.size:
        flags |= INIT_IN_EXT.unpack_from(body)[4] << 32
    wanted = ASYNC_READ | PARALLEL_DIROPS | MAX_PAGES | INIT_EXT | HAS_RESEND
    return InitState(MAJOR, min(minor, MINOR), flags & wanted, readahead)


def init_out(state: InitState) -> bytes:
    """fuse_init_out for an agreed state."""
    return INIT_OUT.pack(
        state.major,
        state.minor,
        state.max_readahead,
        state.flags & 0xFFFFFFFF,
        MAX_BACKGROUND,
        MAX_BACKGROUND * 3 // 4,
        MAX_WRITE,
        1,
        MAX_READ // 4096,
        0,
        state.flags >> 32,
    )


def _attr(node_id: int, size: int, mode: int) -> bytes:
    blocks = (size + _BLOCK - 1) // _BLOCK
    links = 1 if mode & _S_IFREG else 2
    return ATTR.pack(node_id, size, blocks, 0, 0, 0, 0, 0, 0, mode, links, 0, 0, 0, _BLKSIZE, 0)


def file_attr(node_id: int, size: int) -> bytes:
    """fuse_attr of a blob file: root's, mode 0400."""
    return _attr(node_id, size, _S_IFREG | 0o400)


def root_attr() -> bytes:
    """fuse_attr of the directory: root's, mode 0500."""
    return _attr(ROOT_ID, 0, _S_IFDIR | 0o500)


def attr_out(attr: bytes) -> bytes:
    """fuse_attr_out: the attributes stay good."""
    return ATTR_OUT.pack(_VALID, 0, 0) + attr


def entry_out(node_id: int, attr: bytes) -> bytes:
    """fuse_entry_out: the name stays good until it is taken back (`inval_entry`)."""
    return ENTRY_OUT.pack(node_id, 0, _VALID, _VALID, 0, 0) + attr


def inval_entry(name: bytes) -> bytes:
    """fuse_notify_inval_entry_out: the kernel forgets a name of the root directory."""
    return INVAL_ENTRY_OUT.pack(ROOT_ID, len(name), 0) + name + b"\0"


def statfs_out(total: int, files: int) -> bytes:
    """fuse_statfs_out: `total` bytes in `files` files, nothing free."""
    return STATFS_OUT.pack((total + 511) // 512, 0, 0, files, 0, 512, NAME_MAX, 512, 0)


def dirents(entries: Iterable[tuple[int, bytes]], after: int, room: int) -> bytes:
    """fuse_dirent records of the directory, those with a cookie above `after`, as many as fit into `room` bytes.

    entries: (node id, name) in ascending order of id. Cookies are 1 for ".", 2 for ".." and the node id for a blob, so
    a listing stays right while blobs come and go.
    """
    out = bytearray()
    everything = [(1, ROOT_ID, b".", _DT_DIR), (2, ROOT_ID, b"..", _DT_DIR)]
    everything += [(node_id, node_id, name, _DT_REG) for node_id, name in entries]
    for cookie, node_id, name, kind in everything:
        if cookie <= after:
            continue
        record = DIRENT.pack(node_id, cookie, len(name), kind) + name
        record += bytes(-len(record) % 8)
        if len(out) + len(record) > room:
            break
        out += record
    return bytes(out)
