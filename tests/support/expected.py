"""What a test image must look like: unpacked by umoci, kept beside the images.

Known ways of umoci (0.4.7) that are not the image's: directories no layer names, the root among them, get the time
of unpacking (see `unset`); layers in zstd it cannot read, so the variants of `small` are compared with `small` itself.
"""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

from tests.support import images, ocitar, smallimage

ESTARGZ_EXTRAS = (b".no.prefetch.landmark", b"stargz.index.json")


def tree(image: images.Image) -> Path:
    """The unpacked tree of an image: made once, never to be written to."""
    name = "small" if image.name.startswith("small-") else image.name
    source = images.image(name)

    def build(directory: Path) -> None:
        subprocess.run(
            ["umoci", "raw", "unpack", "--image", f"{source.layout}:latest", directory / "rootfs"],
            check=True,
            capture_output=True,
        )

    with images.built("trees", name, source.digest.removeprefix("sha256:")[:16], build) as directory:
        return directory / "rootfs"


def unset(image: images.Image) -> tuple[bytes, ...]:
    """Directories of the image that no layer names."""
    if image.name in ("debian", "science"):
        return ()  # the base layer's tar names all, `./` too
    return (b"", *smallimage.ODD_UNSET) if image.name == "odd" else (b"",)


def resolve(root: Path, path: bytes, hops: int = 40) -> bytes | None:
    """`path` (relative) with all symlinks followed inside `root`; None if it leads nowhere."""
    done: list[bytes] = []
    rest = [part for part in path.split(b"/") if part not in (b"", b".")]
    base = os.fsencode(root)
    while rest:
        part = rest.pop(0)
        if part == b"..":
            done = done[:-1]
            continue
        full = b"/".join([base, *done, part])
        try:
            found = os.lstat(full)
        except OSError:
            return None
        if not stat.S_ISLNK(found.st_mode):
            done.append(part)
            continue
        hops -= 1
        if hops < 0:
            return None
        target = os.readlink(full)
        if target.startswith(b"/"):
            done = []
        rest = [piece for piece in target.split(b"/") if piece not in (b"", b".")] + rest
    return b"/".join(done)


def skeleton(root: Path) -> list[ocitar.Entry]:
    """The entries of a marker image: every directory, every symlink to a directory, /etc/passwd and /etc/group."""
    base = os.fsencode(root)
    entries = []
    stack = [b""]
    while stack:
        path = stack.pop()
        full = os.path.join(base, path)
        if path:
            entries.append(_entry(base, path, ocitar.DIR))
        for name in sorted(os.listdir(full)):
            child = os.path.join(path, name)
            mode = os.lstat(os.path.join(base, child)).st_mode
            if stat.S_ISDIR(mode):
                stack.append(child)
            elif stat.S_ISLNK(mode):
                end = resolve(root, child)
                if end is not None and os.path.isdir(os.path.join(base, end)):
                    entries.append(_entry(base, child, ocitar.SYM))
    files = (b"etc/passwd", b"etc/group")
    entries += [_entry(base, path, ocitar.REG) for path in files if os.path.lexists(os.path.join(base, path))]
    return sorted(entries, key=lambda entry: entry.name)


def _entry(base: bytes, path: bytes, kind: bytes) -> ocitar.Entry:
    full = os.path.join(base, path)
    found = os.lstat(full)
    names = os.listxattr(full, follow_symlinks=False)
    return ocitar.Entry(
        path, kind, stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_mtime_ns,
        data=Path(os.fsdecode(full)).read_bytes() if kind == ocitar.REG else b"",
        target=os.readlink(full) if kind == ocitar.SYM else b"",
        xattrs={name: os.getxattr(full, name, follow_symlinks=False) for name in names if name != "security.selinux"},
    )  # fmt: skip


def marker_image(index_file: Path, source: images.Image, layout: Path) -> images.Image:
    """A hand-made thin image at `layout`: one layer with /.clip/index.clip and the skeleton, and the original's config
    but for its layer list. Loadable, importable, pushable as `<source name>-thin`."""
    entries = [
        ocitar.Entry(b".clip", ocitar.DIR, 0o755),
        ocitar.Entry(b".clip/index.clip", data=index_file.read_bytes()),
        *skeleton(tree(source)),
    ]
    work = layout.with_suffix(".layer")
    work.mkdir()
    images.store(work, ocitar.tar(entries), "gzip")
    images.write_layout(layout, [images.blob(work)], images.config_of(source))
    return images.read_layout(f"{source.name}-thin", layout)
