"""A small reader of EROFS images, written from fs/erofs/erofs_fs.h and apart from the writer, to check its bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass

BLOCK = 512
_PREFIX = {1: b"user.", 2: b"system.posix_acl_access", 3: b"system.posix_acl_default", 4: b"trusted.", 6: b"security."}


@dataclass
class Inode:
    nid: int
    layout: int
    mode: int
    size: int
    union: int
    uid: int
    gid: int
    mtime: int
    nlink: int
    xattrs: dict[bytes, bytes]
    data: int  # where inline data or chunk indexes may begin


class Image:
    def __init__(self, data: bytes, devices: list[bytes]) -> None:
        self.data = data
        self.devices = devices
        magic, _, self.compat, bits, ext, self.root_nid, self.inos = struct.unpack_from("<IIIBBHQ", data, 1024)
        assert magic == 0xE0F5E1E2
        assert (bits, ext) == (9, 0)
        (self.blocks,) = struct.unpack_from("<I", data, 1024 + 36)
        self.uuid = data[1024 + 48 : 1024 + 64]
        (self.incompat,) = struct.unpack_from("<I", data, 1024 + 80)
        count, slot = struct.unpack_from("<HH", data, 1024 + 86)
        self.device_blocks = [struct.unpack_from("<I", data, (slot + i) * 128 + 64)[0] for i in range(count)]
        assert len(data) == self.blocks * BLOCK

    def inode(self, nid: int) -> Inode:
        at = nid * 32
        form, icount, mode, _, size, union, _, uid, gid, sec, nsec, nlink = struct.unpack_from(
            "<HHHHQIIIIqII", self.data, at
        )
        assert form & 1, "an extended inode"
        end = at + 64 + (12 + (icount - 1) * 4 if icount else 0)
        xattrs, pos = {}, at + 64 + 12
        while pos < end:
            name_len, index, value_size = struct.unpack_from("<BBH", self.data, pos)
            name = self.data[pos + 4 : pos + 4 + name_len]
            value = self.data[pos + 4 + name_len : pos + 4 + name_len + value_size]
            xattrs[_PREFIX[index] + name] = value
            pos += (4 + name_len + value_size + 3) & ~3
        assert pos == end or not icount
        return Inode(nid, form >> 1, mode, size, union, uid, gid, sec * 10**9 + nsec, nlink, xattrs, end)

    def flat(self, inode: Inode) -> bytes:
        """Data of a directory or symlink."""
        if inode.layout == 2:
            assert inode.data % BLOCK + inode.size <= BLOCK, "inline data must not cross a block"
            return self.data[inode.data : inode.data + inode.size]
        assert inode.layout == 0
        return self.data[inode.union * BLOCK : inode.union * BLOCK + inode.size]

    def entries(self, inode: Inode) -> list[tuple[bytes, int, int]]:
        """(name, nid, file type) of a directory, checked to be sorted."""
        data = self.flat(inode)
        found = []
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            (first,) = struct.unpack_from("<H", block, 8)
            rows = [struct.unpack_from("<QHBB", block, 12 * i) for i in range(first // 12)]
            ends = [row[1] for row in rows[1:]] + [len(block)]
            for (nid, offset, kind, _), end in zip(rows, ends, strict=True):
                found.append((block[offset:end].rstrip(b"\0"), nid, kind))
        names = [name for name, _, _ in found]
        assert names == sorted(set(names))
        return found

    def chunks(self, inode: Inode) -> tuple[int, list[tuple[int, int]]]:
        """(bytes of a chunk, (device, block) of each)."""
        assert inode.layout == 4
        assert inode.union & ~0x1F == 0x20
        chunk = BLOCK << (inode.union & 0x1F)
        at = (inode.data + 7) & ~7
        count = -(-inode.size // chunk)
        rows = [struct.unpack_from("<HHI", self.data, at + 8 * i) for i in range(count)]
        return chunk, [(device, block) for _, device, block in rows]

    def read(self, inode: Inode) -> bytes:
        if not inode.size:
            return b""
        chunk, rows = self.chunks(inode)
        out = bytearray()
        for number, (device, block) in enumerate(rows):
            length = min(chunk, inode.size - number * chunk)
            if block == 0xFFFFFFFF:
                out += bytes(length)
                continue
            source = self.devices[device - 1] if device else self.data
            piece = source[block * BLOCK : block * BLOCK + length]
            assert len(piece) == length, "a chunk outside its device"
            out += piece
        return bytes(out)

    def walk(self) -> dict[bytes, Inode]:
        """path → inode; checks "." and ".."."""
        found = {}
        stack = [(b"", self.root_nid, self.root_nid)]
        while stack:
            path, nid, parent = stack.pop()
            inode = self.inode(nid)
            found[path or b"/"] = inode
            if inode.mode >> 12 == 4:
                for name, child, _ in self.entries(inode):
                    if name == b".":
                        assert child == nid
                    elif name == b"..":
                        assert child == parent
                    else:
                        stack.append((path + b"/" + name, child, nid))
        return found
