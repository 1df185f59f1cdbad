"""An OCI bundle's config.json: read once, patched as plain JSON, replaced in one step (runtime-spec@v1.2: config.md).

Only our own keys are touched; everything else, known or not, is written back as it was read.
"""

from __future__ import annotations

import os
import stat

from shim.errors import BundleError
from shim.runtime import jsontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_MAX = 16 << 20
_CRI_KEYS = ("io.kubernetes.", "io.container.manager")
# podman writes these on all its containers (libpod/container_internal_common.go); the manager is then "libpod"
_PODMAN_KEYS = ("io.kubernetes.cri-o.Created", "io.kubernetes.cri-o.TTY")
_PODMAN = ("io.container.manager", "libpod")
_TYPE_KEYS = ("io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType")
_NAME_KEYS = ("io.kubernetes.cri.container-name", "io.kubernetes.container.name")


class Bundle:
    """directory: absolute; path: the configuration's real file (a link to it stays a link); data: its bytes as read."""

    def __init__(self, directory: str, name: str = "config.json") -> None:
        """Read the file. OSError when it cannot be opened, BundleError when it is no plain file or too long."""
        self.directory = os.path.abspath(directory or ".")
        self.path = os.path.realpath(os.path.join(self.directory, name))
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise BundleError(f"{self.path} is not a regular file")
            parts: list[bytes] = []
            size = 0
            while part := os.read(fd, 1 << 20):
                parts.append(part)
                size += len(part)
                if size > _MAX:
                    raise BundleError(f"{self.path} is larger than {_MAX >> 20} MiB")
        finally:
            os.close(fd)
        self.data = b"".join(parts)
        self._mode = stat.S_IMODE(status.st_mode)
        self._owner = (status.st_uid, status.st_gid)
        self._spec: dict[str, Any] | None = None

    @property
    def spec(self) -> dict[str, Any]:
        """The decoded configuration, to be changed in place. BundleError when it is no JSON object."""
        if self._spec is None:
            try:
                spec = jsontext.decode(self.data)
            except ValueError as error:
                raise BundleError(f"{self.path} is not valid JSON: {error}") from None
            if not isinstance(spec, dict):
                raise BundleError(f"{self.path} does not hold a JSON object")
            self._spec = spec
        return self._spec

    def section(self, key: str) -> dict[str, Any]:
        """The object under a top-level key, {} (not part of the spec) if it is absent or null."""
        value = self.spec.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise BundleError(f"{self.path}: `{key}` must be an object")
        return value

    @property
    def annotations(self) -> dict[str, Any]:
        return self.section("annotations")

    @property
    def is_sandbox(self) -> bool:
        """Whether this is a pod's pause container: it carries the pod's annotations but runs no image of the user's."""
        return any(self.annotations.get(key) == "sandbox" for key in _TYPE_KEYS)

    @property
    def is_cri(self) -> bool:
        """Whether a Kubernetes runtime wrote this: then whoever may make a pod writes the annotations."""
        return any(
            key.startswith(_CRI_KEYS) and key not in _PODMAN_KEYS and (key, value) != _PODMAN
            for key, value in self.annotations.items()
        )

    @property
    def cri_name(self) -> str | None:
        """The container's name in its pod."""
        for key in _NAME_KEYS:
            name = self.annotations.get(key)
            if isinstance(name, str) and name:
                return name
        return None

    @property
    def rootfs(self) -> str:
        """root.path as an absolute path, symlinks not resolved. BundleError if there is none."""
        path = self.section("root").get("path")
        if not isinstance(path, str) or not path or "\0" in path:
            raise BundleError(f"{self.path}: `root.path` must name a directory")
        return os.path.normpath(os.path.join(self.directory, path))

    @property
    def readonly(self) -> bool:
        return self.section("root").get("readonly") is True

    @property
    def has_user_namespace(self) -> bool:
        """Whether owners are shifted: the tree's are not, so such a container would see everything as nobody's."""
        linux = self.section("linux")
        if linux.get("uidMappings") or linux.get("gidMappings"):
            return True
        namespaces = linux.get("namespaces")
        return isinstance(namespaces, list) and any(
            isinstance(item, dict) and item.get("type") == "user" for item in namespaces
        )

    def environment(self, name: str) -> str | None:
        """The last value of a variable in process.env."""
        env = self.section("process").get("env")
        found = None
        for item in env if isinstance(env, list) else ():
            if isinstance(item, str) and item.startswith(name + "="):
                found = item[len(name) + 1 :]
        return found

    def annotate(self, values: dict[str, str]) -> None:
        """Set annotations in the (decoded) configuration."""
        if not self.annotations:
            self.spec["annotations"] = {}
        self.annotations.update(values)

    def add_poststop(self, hook: dict[str, Any]) -> None:
        """Append a poststop hook to the (decoded) configuration."""
        hooks = self.section("hooks")
        if not hooks:
            hooks = self.spec["hooks"] = {}
        entries = hooks.get("poststop")
        if not isinstance(entries, list):
            entries = hooks["poststop"] = []
        entries.append(hook)

    def drop_poststop(self, word: str) -> None:
        """Remove the poststop hooks whose command line holds `word` from the (decoded) configuration."""
        hooks = self.section("hooks")
        entries = hooks.get("poststop")
        if isinstance(entries, list):
            kept = [item for item in entries if not (isinstance(item, dict) and word in (item.get("args") or []))]
            hooks["poststop"] = kept

    def write(self, data: bytes | None = None) -> bytes:
        """Replace the file by `data`, or by the changed configuration: all or nothing, mode and owner kept.

        Returns what was written. Raises BundleError.
        """
        content = (jsontext.encode(self.spec) + "\n").encode() if data is None else data
        temporary = f"{self.path}.clip-{os.getpid()}"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                at = 0
                while at < len(content):
                    at += os.write(fd, content[at:])
                os.fchown(fd, *self._owner)
                os.fchmod(fd, self._mode)
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, self.path)
        except OSError as error:
            try:
                os.unlink(temporary)
            except OSError:
                pass
            raise BundleError(f"{self.path} cannot be rewritten (errno {error.errno})") from error
        return content
