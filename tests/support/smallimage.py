"""The contents of the small test image: busybox, and everything a layer can hold that goes wrong easily.

`layers()` holds what Docker, containerd, podman and umoci all extract alike; `odd_layer()` what only a layer applied
onto the merged tree gets right (hard links into lower layers, files below directories that the layer does not name).
"""

from __future__ import annotations

import random
import struct
import subprocess
from pathlib import Path

from tests.support.ocitar import BLK, CHR, DIR, FIFO, LINK, NS, REG, SYM, Entry

T = 1_600_000_000 * NS
PASSWD = b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n"
GROUP = b"root:x:0:\nuser:x:1000:\n"
# VFS_CAP_REVISION_2, effective; CAP_NET_RAW (13) permitted (include/uapi/linux/capability.h)
CAP_NET_RAW = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
VERSION = 5  # part of the cache key: raise it when the contents change


def busybox() -> bytes:
    for path in (Path("/usr/bin/busybox"), Path("/bin/busybox")):
        if path.exists():
            return path.read_bytes()
    raise FileNotFoundError("no busybox: install busybox-static")


def _applets() -> list[bytes]:
    listing = subprocess.run(["busybox", "--list"], stdout=subprocess.PIPE, check=True).stdout.split()
    return [name for name in listing if name != b"busybox"]


def noise(seed: int, size: int) -> bytes:
    """Deterministic bytes that do not compress."""
    return random.Random(seed).randbytes(size)


def text(seed: int, size: int) -> bytes:
    """Deterministic bytes that compress about as program text does."""
    words = [b"%x" % random.Random(n).getrandbits(28) for n in range(512)]
    pick = random.Random(seed)
    out = bytearray()
    while len(out) < size:
        out += b" ".join(pick.choices(words, k=12)) + b"\n"
    return bytes(out[:size])


def _dir(name: bytes, mode: int = 0o755, **more: object) -> Entry:
    return Entry(name, DIR, mode, **more)  # type: ignore[arg-type]


def base_layer() -> list[Entry]:
    """A runnable system: busybox with hard-linked applets, the usual directories, `/bin -> usr/bin`."""
    entries = [_dir(name) for name in (b"usr", b"usr/bin", b"usr/lib", b"usr/share", b"usr/local", b"usr/local/bin")]
    entries += [Entry(name, SYM, 0o777, target=b"usr/" + target) for name, target in (
        (b"bin", b"bin"), (b"sbin", b"bin"), (b"lib", b"lib"), (b"lib64", b"lib"))]  # fmt: skip
    entries += [_dir(name) for name in (b"etc", b"proc", b"sys", b"dev", b"var", b"run", b"home", b"mnt")]
    entries += [
        _dir(b"tmp", 0o1777),
        _dir(b"root", 0o700),
        _dir(b"home/user", 0o2750, uid=1000, gid=1000),
        Entry(b"var/run", SYM, 0o777, target=b"/run"),
        Entry(b"vmlinuz", SYM, 0o777, target=b"boot/vmlinuz-none"),  # dangles, as in Debian's images
        Entry(b"etc/passwd", data=PASSWD),
        Entry(b"etc/group", data=GROUP),
        Entry(b"etc/os-release", data=b'ID=small\nPRETTY_NAME="clip-shim test image"\n'),
        Entry(b"usr/bin/busybox", mode=0o755, data=busybox()),
    ]
    entries += [Entry(b"usr/bin/" + name, LINK, 0o755, target=b"usr/bin/busybox") for name in _applets()]
    return entries


def data_layer() -> list[Entry]:
    """Data of several kinds and sizes, and what the next layer removes or replaces."""
    entries = [_dir(b"data"), _dir(b"data/many"), _dir(b"gone"), _dir(b"opaque"), _dir(b"opaque/sub"), _dir(b"turns")]
    entries += [
        Entry(b"data/noise.bin", data=noise(1, 3_000_001)),
        Entry(b"data/text.txt", data=text(2, 4_000_003)),
        Entry(b"data/zeros.bin", data=bytes(1_048_576)),
        Entry(b"data/empty"),
        Entry(b"data/one", data=b"1"),
        Entry(b"data/block", data=noise(3, 512)),
        Entry(b"data/page", data=noise(4, 4096)),
        Entry(b"data/page+1", data=noise(5, 4097)),
        Entry(b"gone/file", data=b"whited out"),
        Entry(b"gone/kept", data=b"kept"),
        Entry(b"gone/late", data=b"whited out before its directory entry"),
        Entry(b"opaque/hidden", data=b"hidden by an opaque directory"),
        Entry(b"opaque/sub/hidden", data=b"hidden"),
        Entry(b"turns/dir-to-file/x", data=b"x"),
        Entry(b"turns/file-to-dir", data=b"a file"),
        Entry(b"turns/link-to-dir", SYM, 0o777, target=b"/data"),
        Entry(b"turns/dir-to-link/x", data=b"x"),
        Entry(b"turns/file-to-link", data=b"a file"),
    ]
    entries.insert(6, _dir(b"turns/dir-to-file"))
    entries.insert(7, _dir(b"turns/dir-to-link"))
    entries += [
        Entry(b"data/many/%03d" % n, mode=0o600 + n % 64, uid=n, data=text(n, n * 37), mtime=T + n) for n in range(200)
    ]
    return entries


def change_layer() -> list[Entry]:
    """Whiteouts, an opaque directory, changes of type, new contents for an old name."""
    return [
        _dir(b"gone", 0o711, mtime=T + 5),
        Entry(b"gone/.wh.file"),
        Entry(b"gone/.wh.late"),
        _dir(b"opaque", 0o750),
        Entry(b"opaque/.wh..wh..opq"),
        Entry(b"opaque/new", data=b"new"),
        _dir(b"turns"),
        Entry(b"turns/dir-to-file", data=b"now a file"),
        _dir(b"turns/file-to-dir"),
        Entry(b"turns/file-to-dir/inside", data=b"inside"),
        _dir(b"turns/link-to-dir"),
        Entry(b"turns/link-to-dir/inside", data=b"inside"),
        Entry(b"turns/dir-to-link", SYM, 0o777, target=b"file-to-dir"),
        Entry(b"turns/file-to-link", SYM, 0o777, target=b"../etc/passwd"),
        _dir(b"data", 0o755, mtime=T + 123_456_789),
        Entry(b"data/one", mode=0o640, uid=7, gid=8, data=b"changed in a higher layer"),
    ]


def kinds_layer() -> list[Entry]:
    """Every inode type, mode bit and attribute; names that break careless code."""
    long_dir = b"long/" + b"d" * 200
    entries = [_dir(b"kinds", xattrs={"user.dir": b"on a directory"}), _dir(b"names"), _dir(b"long"), _dir(long_dir)]
    pieces = ((4096, 600), (1_000_000, 1000), (3_000_000, 0))
    entries += [
        Entry(b"kinds/setuid", mode=0o4755, data=b"#!/bin/sh\n"),
        Entry(b"kinds/setgid", mode=0o2755, data=b"#!/bin/sh\n"),
        Entry(b"kinds/none", mode=0, data=b"mode 0"),
        _dir(b"kinds/sticky", 0o1777),
        _dir(b"kinds/all-bits", 0o7777),
        Entry(b"kinds/ping", mode=0o755, data=b"\x7fELF not really", xattrs={"security.capability": CAP_NET_RAW}),
        Entry(b"kinds/xattrs", xattrs={"user.text": b"value", "user.bytes": b"\x00\xff\n=", "user.big": b"v" * 900}),
        Entry(b"kinds/null", CHR, 0o666, device=(1, 3)),
        Entry(b"kinds/far", CHR, 0o600, device=(250, 70_000)),
        Entry(b"kinds/disk", BLK, 0o660, gid=6, device=(7, 9)),
        Entry(b"kinds/fifo", FIFO, 0o620, uid=3),
        Entry(b"kinds/big-owner", uid=3_000_000, gid=2_500_000, data=b"owner beyond octal"),
        Entry(b"kinds/hard-1", data=b"three names, one inode", mtime=T + 1, xattrs={"user.shared": b"1"}),
        Entry(b"kinds/hard-2", LINK, target=b"kinds/hard-1", mtime=T + 1),
        Entry(b"kinds/sticky/hard-3", LINK, target=b"kinds/hard-1", mtime=T + 1),
        Entry(b"kinds/fifo-2", LINK, 0o620, uid=3, target=b"kinds/fifo"),
        Entry(b"kinds/now", mtime=T + 987_654_321, data=b"nanoseconds"),
        Entry(b"kinds/epoch", mtime=0, data=b"1970"),
        Entry(b"kinds/late", mtime=4_000_000_000 * NS + 1, data=b"2096"),
        Entry(b"kinds/long-link", SYM, 0o777, target=b"x/" * 500 + b"end"),
        Entry(b"kinds/dot-link", SYM, 0o777, target=b"./././setuid", mtime=T + 55),
        Entry(b"kinds/sparse", REG, sparse=(3_000_000, pieces), data=noise(8, 1600)),
    ]  # fmt: skip
    for name in (
        b"new\nline",
        "größe-日本".encode(),
        b"back\\slash",
        b"latin-caf\xe9",
        b" lead and trail ",
        b"-rf",
        b"tab\t",
        b"*?[",
        b"\"'$",
    ):
        entries.append(Entry(b"names/" + name, data=name))
    entries += [
        Entry(b"names/" + b"n" * 255, data=b"longest name"),
        Entry(long_dir + b"/" + b"f" * 200, data=b"long path"),
        Entry(long_dir + b"/link", SYM, 0o777, target=b"f" * 200),
        Entry(b"names/link-\n", SYM, 0o777, target="größe-日本".encode()),
        Entry(b"names/hard-to-long", LINK, target=long_dir + b"/" + b"f" * 200),
        _dir(b"new"),
        _dir(b"new/parent"),
        Entry(b"new/parent/file", data=b"file"),
    ]
    return entries


def odd_layer() -> list[Entry]:
    """Only right when applied onto the merged tree. `ODD_UNSET` names the directories whose attributes nothing sets."""
    return [
        Entry(b"data/hard-across", LINK, target=b"data/block"),
        Entry(b"kinds/hard-across", LINK, target=b"kinds/hard-1"),
        Entry(b"gone/added", data=b"its directory is not named by this layer"),
        Entry(b"unnamed/parents/of/file", data=b"no layer names these directories"),
        Entry(b"./data/./twice", data=b"first"),
        Entry(b"data/twice", data=b"second entry wins"),
        Entry(b"data/.wh.not-there"),
    ]


ODD_UNSET = (b"unnamed", b"unnamed/parents", b"unnamed/parents/of")


def layers() -> list[list[Entry]]:
    return [base_layer(), data_layer(), change_layer(), kinds_layer(), []]
