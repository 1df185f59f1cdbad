"""The URLs of stores and of what lies in them.

PATH, file://PATH                     a file; with a slash at its end (or a directory that is there) a store
s3://BUCKET/KEY                       an object; with a slash at its end a store: the image's name is put behind
oci://REGISTRY/REPOSITORY             beside the image of that repository, as its referrer
oci://REGISTRY/REPOSITORY:TAG|@DIGEST an artifact, or the image whose referrer is meant
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from shim.errors import ImageReferenceError, UsageError
from shim.registry.ref import ImageRef

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]\Z")  # S3 user guide, "General purpose bucket naming rules"
_MAX_KEY = 1024  # bytes, S3 user guide "Naming Amazon S3 objects"
FORMS = (
    "use a path, s3://BUCKET/KEY or oci://REGISTRY/REPOSITORY[:TAG]; a slash at the end of a path or key means a store"
)


@dataclass(frozen=True, slots=True)
class FilePlace:
    path: Path
    is_store: bool


@dataclass(frozen=True, slots=True)
class S3Place:
    """`key` without a slash in front; of a store it ends in one, or is empty."""

    bucket: str
    key: str

    @property
    def is_store(self) -> bool:
        return self.key == "" or self.key.endswith("/")

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


@dataclass(frozen=True, slots=True)
class OciPlace:
    """`ref` has neither tag nor digest when only the repository was named."""

    ref: ImageRef

    @property
    def is_store(self) -> bool:
        return self.ref.tag is None and self.ref.digest is None

    def __str__(self) -> str:
        return f"oci://{self.ref}"


Place = FilePlace | S3Place | OciPlace


def parse(url: str) -> Place:
    """What a URL means. Raises UsageError."""
    if not url.isprintable() or not url:
        raise UsageError(f"{url[:100]!r} is not a URL", hint=FORMS)
    if url.startswith("s3://"):
        return _s3(url)
    if url.startswith("oci://"):
        return _oci(url)
    if "://" in url and not url.startswith("file://"):
        raise UsageError(f"{url[:100]!r} is no URL of a store", hint=FORMS)
    path = url.removeprefix("file://")
    if url.startswith("file://") and not path.startswith("/"):
        raise UsageError(f"{url[:100]!r}: file:// is followed by an absolute path", hint=FORMS)
    return FilePlace(Path(path), path.endswith("/") or os.path.isdir(path))


def _s3(url: str) -> S3Place:
    bucket, _, key = url[len("s3://") :].partition("/")
    if not _BUCKET.match(bucket):
        raise UsageError(f"{url[:100]!r}: {bucket[:80]!r} is not a bucket's name", hint=FORMS)
    if len(key.encode()) > _MAX_KEY or key.startswith("/") or any(part in (".", "..") for part in key.split("/")):
        raise UsageError(f"{url[:100]!r} has a key that is not valid", hint=FORMS)
    return S3Place(bucket, key)


def _oci(url: str) -> OciPlace:
    text = url[len("oci://") :]
    try:
        ref = ImageRef.parse(text.rstrip("/"), local_paths=False)
    except ImageReferenceError as error:
        raise UsageError(f"{url[:100]!r}: {error}", hint=FORMS) from None
    named = "@" in text or ":" in text.rpartition("/")[2]
    return OciPlace(ref if named else replace(ref, tag=None))
