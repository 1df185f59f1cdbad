"""The errors of clip-shim: a documented contract, one class for each kind of trouble.

Every error a user can meet is a `ShimError`: one line that says what is wrong, then `hint`, which says what to do.
Only the command line, the wrapper and the daemon's outermost loops turn one into an exit code, a log line or an errno.
Standard library only: the wrapper imports this module.
"""

from __future__ import annotations

import errno


class ShimError(Exception):
    """Base of all errors. `hint` is a full sentence for a person; `errno_` is what a file system answers."""

    exit_code = 1
    errno_ = errno.EIO
    default_hint = "run `clip-shim doctor` to see what is wrong with this node"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint if hint is not None else self.default_hint


class UsageError(ShimError):
    """The command line, or a value given on it, is wrong. Exit code 2; nothing was changed."""

    exit_code = 2
    default_hint = "see `clip-shim --help`"


class ConfigError(ShimError):
    """A configuration file or environment setting is wrong."""

    exit_code = 2
    default_hint = "see `clip-shim config default` for every key and its default"


class ImageReferenceError(UsageError):
    """An image reference is malformed, or is a local path where a registry reference is needed."""

    default_hint = "give a registry reference, for example docker.io/library/python:3.12"


class IndexFormatError(ShimError):
    """An index file is damaged, truncated, hostile or of an unknown version. The file was not used."""

    default_hint = "make the index again with `clip-shim index REF -o FILE`"


class LayerError(ShimError):
    """A layer's bytes are not a valid gzip, zstd or tar stream, or contradict the manifest."""

    default_hint = "the image itself is damaged: push it again, or name another reference"


class IntegrityError(ShimError):
    """Bytes do not hash to what the index or manifest says. They were not served."""

    default_hint = "the registry or a mirror serves wrong bytes: run `clip-shim verify INDEX` to see which layer"


class RegistryError(ShimError):
    """A registry could not be reached, refused, or answered nonsense. `retryable`: trying again may help."""

    default_hint = "check the network and the registry's name, then run `clip-shim doctor`"

    def __init__(
        self, message: str, *, hint: str | None = None, retryable: bool = False, status: int | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.retryable = retryable
        self.status = status


class AuthError(RegistryError):
    """The registry refused the credentials it was given (401 or 403), or none were found."""

    errno_ = errno.EACCES
    default_hint = "log in with `docker login` or `podman login` as root on this node"


class NotFoundError(RegistryError):
    """The registry has no such repository, manifest or blob (404)."""

    errno_ = errno.ENOENT
    default_hint = "check the reference's spelling, its tag and the platform"


class MountError(ShimError):
    """A mount could not be made or undone, or the merged root is not what the index says."""


class TrustError(ShimError):
    """A reference leads somewhere the `trust:` table does not allow."""

    errno_ = errno.EACCES
    default_hint = "see `trust:` in `clip-shim config default`"


class BundleError(ShimError):
    """An OCI bundle or its config.json cannot be used. Nothing was changed."""


class DaemonError(ShimError):
    """The daemon is not there, refused, or did not answer in time."""

    default_hint = "see `clip-shim status`, or start it with `systemctl start clip-shim`"


class CacheError(ShimError):
    """The layer cache cannot be used as asked (locked by another daemon, not writable, damaged)."""


class StoreError(ShimError):
    """An index store (a directory, S3) could not be reached, or refused. `retryable`: trying again may help."""

    default_hint = "check the store's URL, its credentials and `stores` in `clip-shim config show`"

    def __init__(self, message: str, *, hint: str | None = None, retryable: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.retryable = retryable


class AbsentError(StoreError):
    """The store has nothing of that name."""

    errno_ = errno.ENOENT
    default_hint = "check the URL, or make the index with `clip-shim index REF --push URL`"


class InstallError(ShimError):
    """An engine's configuration cannot be changed as asked: it is not valid, changed meanwhile, or still needed."""

    default_hint = "see the engine's page in packaging/engines"
