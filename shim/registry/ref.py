"""Image references: `registry/repository[:tag][@digest]`, by the grammar of distribution/reference, and nothing local.

Pure, standard library only. The grammar is github.com/distribution/reference `regexp.go` and `normalize.go` (what
Docker, containerd and podman share); only a registry reference is accepted, because an index made from a local path
is one that no other node can read and whose contents nobody verified.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from shim.errors import ImageReferenceError

DEFAULT_REGISTRY = "docker.io"
MAX_TEXT = 4096  # longer input is not looked at
MAX_REPOSITORY = 255  # distribution/reference RepositoryNameTotalLengthMax
DIGEST_LENGTHS = {"sha256": 64, "sha512": 128}  # OCI image-spec descriptor.md "Registered Algorithms"

_LABEL = r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]{{2,45}}\])(?::(?P<port>[0-9]{{1,5}}))?\Z")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*\Z")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")
_DIGEST = re.compile(r"(?P<algorithm>[a-z0-9]+):(?P<hex>[0-9a-f]+)\Z")
_HEX64 = re.compile(r"[0-9a-f]{64}\Z")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

# containers-transports(5), and the URL forms people try
_LOCAL_TRANSPORTS = (
    "oci",
    "oci-archive",
    "docker-archive",
    "docker-daemon",
    "containers-storage",
    "dir",
    "file",
    "ostree",
    "sif",
    "tarball",
    "s3",
)
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.zst", ".oci", ".clip", ".rclip")
_EXAMPLE = "docker.io/library/ubuntu:24.04"


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A canonical reference. `registry` is host[:port]; `tag` and `digest` ("sha256:<hex>") may both be set: then the
    digest decides. At least one of them is set in what `parse` returns."""

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str, *, local_paths: bool = True) -> ImageRef:
        """The canonical form of what a person writes: `ubuntu` is docker.io/library/ubuntu:latest.

        `local_paths`: refuse a name that exists as a local file, relative to the working directory. Pass False for
        references that a program stored; the working directory means nothing there.

        Raises ImageReferenceError.
        """
        if not isinstance(text, str) or not text:
            raise ImageReferenceError("the image reference is empty", hint=_right())
        if len(text) > MAX_TEXT:
            raise ImageReferenceError(f"the image reference is {len(text)} characters long", hint=_right())
        shown = _show(text)
        explicit = text.startswith("docker://")
        _refuse_local(text, shown, look=local_paths and not explicit)
        return _parse(text.removeprefix("docker://"), shown)

    @property
    def name(self) -> str:
        """registry/repository"""
        return f"{self.registry}/{self.repository}"

    @property
    def image(self) -> str:
        """registry/repository:tag, without the digest (as an index's `image` has it)."""
        return f"{self.name}:{self.tag}" if self.tag else self.name

    @property
    def reference(self) -> str:
        """What a manifest is asked for by: the digest if there is one, else the tag."""
        return self.digest or self.tag or "latest"

    def with_digest(self, digest: str) -> ImageRef:
        """The same name pinned to `digest`. Raises ImageReferenceError when it is not a digest."""
        return replace(self, digest=check_digest(digest))

    def __str__(self) -> str:
        return self.image + (f"@{self.digest}" if self.digest else "")


def check_digest(digest: str) -> str:
    """`digest` itself when it is sha256:<64 hex> or sha512:<128 hex>; else ImageReferenceError."""
    match = _DIGEST.match(digest) if len(digest) <= 256 else None
    if match is None or DIGEST_LENGTHS.get(match["algorithm"]) != len(match["hex"]):
        raise ImageReferenceError(
            f"{_show(digest)} is not a digest", hint="a digest is sha256: and 64 lower-case hex digits"
        )
    return digest


def _parse(text: str, shown: str) -> ImageRef:
    name, at, digest = text.partition("@")
    if at:
        check_digest(digest)
    name, tag = _split_tag(name)
    if tag is not None and not _TAG.match(tag):
        raise ImageReferenceError(
            f"{shown}: the tag {_show(tag)} is not valid",
            hint="a tag is up to 128 letters, digits, dots, dashes and underscores",
        )
    registry, repository = _split_registry(name)
    host = _HOST.match(registry)
    if host is None or int(host["port"] or 1) not in range(1, 65536):
        raise ImageReferenceError(f"{shown}: {_show(registry)} is not a registry host", hint=_right())
    if len(repository) > MAX_REPOSITORY:
        raise ImageReferenceError(
            f"{shown}: the repository name is longer than {MAX_REPOSITORY} characters", hint=_right()
        )
    if not _REPOSITORY.match(repository):
        why = "must be lower case" if repository != repository.lower() else "is not valid"
        raise ImageReferenceError(f"{shown}: the repository name {_show(repository)} {why}", hint=_right())
    if _HEX64.match(name):
        raise ImageReferenceError(
            f"{shown} is an image ID, not a reference", hint="IDs exist only in one engine's store; " + _right()
        )
    return ImageRef(registry, repository, tag or (None if digest else "latest"), digest or None)


def _split_tag(name: str) -> tuple[str, str | None]:
    """A colon after the last slash begins the tag; one before it belongs to a port."""
    slash = name.rfind("/")
    colon = name.find(":", slash + 1)
    return (name, None) if colon < 0 else (name[:colon], name[colon + 1 :])


def _split_registry(name: str) -> tuple[str, str]:
    """distribution/reference splitDockerDomain: the first part is a host if it looks like one."""
    first, slash, rest = name.partition("/")
    is_host = "." in first or ":" in first or first == "localhost" or first != first.lower()
    if not slash or not is_host:
        first, rest = DEFAULT_REGISTRY, name
    if first.lower() in ("index.docker.io", "registry-1.docker.io", "docker.io"):
        first = DEFAULT_REGISTRY
    if first == DEFAULT_REGISTRY and "/" not in rest:
        rest = "library/" + rest
    return first, rest


def _refuse_local(text: str, shown: str, *, look: bool) -> None:
    why = None
    head, colon, _ = text.partition(":")
    scheme = _SCHEME.match(text)
    if colon and head in _LOCAL_TRANSPORTS:
        why = f"`{head}:` names something that is not in a registry (on this machine, or a plain store)"
    elif scheme and not text.startswith("docker://"):
        raise ImageReferenceError(
            f"{shown}: a registry reference has no `{scheme[0]}` in front",
            hint=_right(text[scheme.end() :].strip("/")),
        )
    elif text.startswith(("/", "./", "../", "~")) or text in (".", ".."):
        why = "it is a local path"
    elif look and _exists_here(text):
        why = "it is a local file or directory"
    if why:
        raise ImageReferenceError(
            f"{shown}: a registry reference is needed, but {why}: an index must name bytes that every node can fetch"
            " and verify",
            hint=f"push the image first, then name it there, for example: clip-shim index {_EXAMPLE}"
            + (f" (if {shown} is in a registry: docker://{text})" if why.endswith("directory") else ""),
        )


def _exists_here(text: str) -> bool:
    candidates = {text, text.partition("@")[0], _split_tag(text.partition("@")[0])[0]}
    return any(
        ("/" in path or path.endswith(_ARCHIVES)) and "\0" not in path and os.path.lexists(path) for path in candidates
    )


def _right(text: str = "") -> str:
    guess = text if text and _is_valid(text) else _EXAMPLE
    return f"a registry reference is [registry/]repository[:tag][@digest], for example {guess}"


def _is_valid(text: str) -> bool:
    try:
        _parse(text, "")
    except ImageReferenceError:
        return False
    return True


def _show(text: str) -> str:
    """Text from outside in an error: quoted, printable, short."""
    return repr(text if len(text) <= 120 else text[:117] + "...")
