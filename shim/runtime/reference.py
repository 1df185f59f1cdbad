"""Which index a bundle asks for, if any. The first of these wins, each can be switched off (`reference.*`):

1. the annotation io.clip.index, or io.clip.index.<container name> in a pod;
2. index.clip in the bundle directory;
3. /.clip/index.clip in a *lower* directory of the rootfs: a container can write its upper, and restart;
4. CLIP_INDEX in process.env: names and digests only.

Whoever writes an image or an annotation must not choose what root reads: files are opened here, checked on descriptors,
and the daemon is given the descriptor.
"""

from __future__ import annotations

import os
import stat

from shim.errors import BundleError, TrustError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.runtime.bundle import Bundle
    from shim.runtime.config import Config

ANNOTATION = "io.clip.index"
SOURCE_ANNOTATION = "io.clip.rootfs"  # we set it: where root.path led before
BUNDLE_FILE = "index.clip"
MARKER_DIR, MARKER_FILE = ".clip", "index.clip"
MARKER = f"/{MARKER_DIR}/{MARKER_FILE}"
VARIABLE = "CLIP_INDEX"
_SCHEMES = ("s3://", "oci://", "image://")
_MAX = 2048
_NAME_MAX = 512
_NAME_BYTES = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._/:@-")
_FORMS = "use an absolute path, file://PATH, s3://BUCKET/KEY, oci://REGISTRY/REPOSITORY or image://REFERENCE"
_OPEN_DIR = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Reference:
    """source: "annotation", "bundle", "marker" or "env"; value: as written, or the file's path; fd: the index file,
    open for reading, or -1 when the value is no file."""

    __slots__ = ("fd", "source", "value")

    def __init__(self, source: str, value: str, fd: int = -1) -> None:
        self.source = source
        self.value = value
        self.fd = fd


def find(bundle: Bundle, config: Config, lowers: Callable[[], list[bytes]]) -> Reference | None:
    """The bundle's reference. `lowers` gives the rootfs' lower directories, topmost first, and is called if needed.

    Raises TrustError when it leads where it may not, BundleError when it cannot be understood.
    """
    sources = config.sources
    annotated = "annotation" in sources and ANNOTATION.encode() in bundle.data
    named = "bundle" in sources and _exists(os.path.join(bundle.directory, BUNDLE_FILE))
    variable = "env" in sources and VARIABLE.encode() in bundle.data
    if not (annotated or named or variable or "marker" in sources):
        return None
    if bundle.is_sandbox:
        return None
    found = None
    if annotated:
        found = _annotation(bundle, config.trust_paths)
    if found is None and named:
        path = os.path.join(bundle.directory, BUNDLE_FILE)
        found = Reference("bundle", path, _open_regular(path))
    if found is None and "marker" in sources:
        found = find_marker(lowers())
    if found is None and variable:
        found = _variable(bundle)
    return found


def _exists(path: str) -> bool:
    try:
        os.lstat(path)
    except OSError:
        return False
    return True


def _annotation(bundle: Bundle, trust_paths: list[str]) -> Reference | None:
    value = None
    if bundle.cri_name is not None:  # in a pod every container has the pod's annotations
        value = bundle.annotations.get(f"{ANNOTATION}.{bundle.cri_name}")
    if value is None:
        value = bundle.annotations.get(ANNOTATION)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > _MAX or not value.isprintable():
        raise BundleError(
            f"the annotation {ANNOTATION} is not a printable text of at most {_MAX} characters", hint=_FORMS
        )
    if value.startswith(_SCHEMES):
        return Reference("annotation", value)
    path = value[7:] if value.startswith("file://") else value
    if not path.startswith("/"):
        raise BundleError(f"the annotation {ANNOTATION} is {value!r}, which names no place of an index", hint=_FORMS)
    if bundle.is_cri:
        raise TrustError(
            f"the annotation {ANNOTATION} of a pod is {value!r}: a path of the node is never taken from there",
            hint="name the index by oci://, s3:// or image://, or use a thin image",
        )
    return Reference("annotation", value, open_trusted(path, trust_paths))


def _variable(bundle: Bundle) -> Reference | None:
    value = bundle.environment(VARIABLE)
    if not value:
        return None
    if (
        len(value) > _NAME_MAX
        or not _NAME_BYTES.issuperset(value)
        or value[0] in "/.-"
        or ".." in value
        or "//" in value
    ):
        raise TrustError(
            f"the variable {VARIABLE} is {value[:80]!r}: only a name or digest of a configured store is taken so"
        )
    return Reference("env", value)


def _open_regular(path: str) -> int:
    """Open a file that must be a regular one itself; TrustError if it is anything else."""
    try:
        handle = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise TrustError(f"the index {path} cannot be opened (errno {error.errno})") from error
    return _reopen(handle, path)


def _reopen(handle: int, path: str) -> int:
    """Turn an O_PATH descriptor (closed here) into one for reading, if it is a regular file. Opening a device node or a
    FIFO can have effects of its own, so the type is known first."""
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise TrustError(f"the index {path} is not a regular file")
        return os.open(f"/proc/self/fd/{handle}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise TrustError(f"the index {path} cannot be opened (errno {error.errno})") from error
    finally:
        os.close(handle)


def open_trusted(path: str, trust_paths: list[str]) -> int:
    """Open an index file below one of `trust_paths`, for reading.

    Every directory on the way must be root's and writable by root alone (or sticky, as /tmp, where nobody can replace
    what is root's), none a symlink, and the file likewise. Each step is checked on its open descriptor, so nothing can
    be exchanged between check and use. Raises TrustError.
    """
    hint = "put the index below a directory of `trust.paths` that only root can write: " + ", ".join(trust_paths)
    rest = None
    start = ""
    for trusted in trust_paths:
        base = os.path.normpath(trusted)
        if path.startswith(base.rstrip("/") + "/"):
            # the administrator's own directory may be reached over links; what it leads to is checked below
            start, rest = os.path.realpath(base), path[len(base.rstrip("/")) + 1 :]
            break
    if rest is None:
        raise TrustError(f"the index {path} lies below no directory of `trust.paths`", hint=hint)
    names = [name for name in start.split("/") if name] + [name for name in rest.split("/") if name]
    if ".." in names or "." in names or not rest.strip("/"):
        raise TrustError(f"the index path {path} must not hold . or ..", hint=hint)
    here = os.open("/", _OPEN_DIR)
    try:
        for name in names[:-1]:
            below = os.open(name, _OPEN_DIR, dir_fd=here)
            os.close(here)
            here = below
            _check_owner(here, path, directory=True)
        handle = os.open(names[-1], os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
    except OSError as error:
        raise TrustError(f"the index {path} cannot be opened (errno {error.errno})", hint=hint) from error
    finally:
        os.close(here)
    try:
        _check_owner(handle, path, directory=False)
    except TrustError:
        os.close(handle)
        raise
    return _reopen(handle, path)


def _check_owner(fd: int, path: str, *, directory: bool) -> None:
    status = os.fstat(fd)
    if not directory and not stat.S_ISREG(status.st_mode):
        raise TrustError(f"the index {path} is not a regular file")
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if status.st_uid != 0 or (writable and not (directory and status.st_mode & stat.S_ISVTX)):
        what = "a directory on the way to it" if directory else "it"
        raise TrustError(f"the index {path} is not trusted: others than root can write {what}")


def find_marker(lowers: list[bytes]) -> Reference | None:
    """A thin image's index in the lower directories (topmost first), as the overlay itself would find it: a whiteout or
    an opaque directory above hides what is below."""
    for lower in lowers:
        try:
            status = os.lstat(os.path.join(lower, MARKER_DIR.encode()))
        except OSError:
            continue
        if not stat.S_ISDIR(status.st_mode):
            return None  # a whiteout, or something else of that name: hides the layers below
        try:
            status = os.lstat(lower + MARKER.encode())
        except OSError:
            if is_opaque(os.path.join(lower, MARKER_DIR.encode())):
                return None
            continue
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
            return None  # deleted by this layer
        return _open_marker(lower)
    return None


def is_opaque(path: str | bytes) -> bool:
    """Whether a directory of an overlay's layer hides what is below it in lower ones."""
    for name in (b"trusted.overlay.opaque", b"user.overlay.opaque"):
        try:
            if os.getxattr(path, name, follow_symlinks=False) == b"y":
                return True
        except OSError:
            continue
    return False


def _open_marker(lower: bytes) -> Reference:
    """The marker of one lower directory. TrustError if it is no regular file, or reached over a link."""
    from shim.mount import syscalls

    path = os.fsdecode(lower) + MARKER
    root = os.open(lower, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        handle = syscalls.openat2(
            root,
            MARKER_DIR + "/" + MARKER_FILE,
            os.O_PATH | os.O_NOFOLLOW,
            resolve=syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_SYMLINKS,
        )
    except OSError as error:
        raise TrustError(f"the marker {path} cannot be opened (errno {error.errno})") from error
    finally:
        os.close(root)
    return Reference("marker", path, _reopen(handle, path))
