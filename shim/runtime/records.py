"""What the wrapper remembers of a container, and who works on it: RUN/containers/<hash of the runtime's root>/<ID>/.

    owner        "<pid> <start time> <token>" of the wrapper that makes the container; that process becomes the runtime
    state.json   the engine's layers, ours, and where they are mounted (versioned)
    config.json  the bundle's configuration as it was before we changed it, and config.ours as we left it
    stage/       where an overlay is put together on kernels without "lowerdir+"
    rootfs/      the merged root of a container whose rootfs is no overlay

The latter's upper and work directory lie in STATE/containers/<same>, or with io.clip.upper=keep in STATE/kept/<same>,
which nothing here ever deletes. What is deleted goes to STATE/trash first.

Nothing waits for a `delete`: a second create of the ID, the poststop hook and the daemon's sweep each can clean up, and
do nothing where another has done it. RUN is on tmpfs and 0700, so what stands here was written by root since boot.
"""

from __future__ import annotations

import fcntl
import os

from shim.errors import BundleError, MountError
from shim.runtime import jsontext

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shim.runtime.config import Config

VERSION = 1
_STATE_MAX = 4 << 20
_CLAIMS = 16


class Record:
    """One container's directory. `state` is the content of state.json, {} if there is none."""

    __slots__ = ("directory", "kept_dir", "state", "state_dir", "token", "trash_dir")

    def __init__(self, config: Config, root: str, container: str) -> None:
        self._place(config, _hash(os.path.realpath(root)), container)

    @classmethod
    def at(cls, config: Config, base: str, container: str) -> Record:
        """The record in a directory that is there already. base: the name of its parent."""
        record = cls.__new__(cls)
        record._place(config, base, container)
        return record

    def _place(self, config: Config, base: str, container: str) -> None:
        place = os.path.join("containers", base, container)
        self.directory = os.path.join(config.run_dir, place)
        self.state_dir = os.path.join(config.state_dir, place)
        self.kept_dir = os.path.join(config.state_dir, "kept", base, container)
        self.trash_dir = os.path.join(config.state_dir, "trash")
        self.state: dict[str, Any] = {}
        self.token = ""

    @property
    def rootfs(self) -> str:
        return os.path.join(self.directory, "rootfs")

    @property
    def stage(self) -> str:
        return os.path.join(self.directory, "stage")

    def lock(self) -> int:
        """Open and lock the directory; close the descriptor soon, it is held for a few small files only. OSError."""
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        fcntl.flock(fd, fcntl.LOCK_EX)
        return fd

    def has_owner(self) -> bool:
        """Whether another process is making this container (or is the runtime that holds it in the foreground)."""
        owner = self._read("owner").split()
        try:
            return len(owner) == 3 and int(owner[0]) != os.getpid() and is_alive(int(owner[0]), int(owner[1]))
        except ValueError:
            return False

    def claim(self) -> None:
        """Become the one who works on this container, and read its state. BundleError while another one does."""
        for _ in range(_CLAIMS):
            try:
                os.makedirs(self.directory, 0o700, exist_ok=True)
                lock = self.lock()
            except FileNotFoundError:
                continue  # another one has just released it
            except OSError as error:
                raise MountError(f"{self.directory} cannot be made (errno {error.errno})") from error
            try:
                if os.fstat(lock).st_nlink == 0:
                    continue
                if self.has_owner():
                    raise BundleError(
                        f"container {os.path.basename(self.directory)} is being created by another process",
                        hint="wait for it, or use another ID",
                    )
                started = start_time(os.getpid())
                self.token = f"{os.getpid()}-{started}"
                self._write("owner", f"{os.getpid()} {started} {self.token}".encode())
            except OSError as error:
                raise MountError(f"{self.directory} cannot be written (errno {error.errno})") from error
            finally:
                os.close(lock)
            self.load()
            return
        raise MountError(f"{self.directory} is removed by others again and again")

    def load(self) -> None:
        """Read state.json; one that is damaged or of another version counts as none."""
        self.state = {}
        try:
            state = jsontext.decode(self._read("state.json"))
        except ValueError:
            return
        if isinstance(state, dict) and state.get("version") == VERSION:
            self.state = state

    def save(self, state: dict[str, Any]) -> None:
        """Replace state.json. MountError."""
        self.state = {"version": VERSION, "token": self.token, **state}
        try:
            self._write("state.json", jsontext.encode(self.state).encode())
        except OSError as error:
            raise MountError(f"{self.directory} cannot be written (errno {error.errno})") from error

    def keep_config(self, before: bytes, after: bytes) -> None:
        """Remember the bundle's configuration as it was and as we write it. MountError."""
        try:
            self._write("config.json", before)
            self._write("config.ours", after)
        except OSError as error:
            raise MountError(f"{self.directory} cannot be written (errno {error.errno})") from error

    def kept_config(self) -> tuple[bytes, bytes]:
        """What `keep_config` was given, b"" for nothing."""
        return self._read("config.json"), self._read("config.ours")

    def disown(self) -> None:
        """Work no more on this container, but remember it."""
        self._quietly(os.unlink, os.path.join(self.directory, "owner"))

    def release(self) -> None:
        """Forget this container: the record and its empty directories. What is still mounted or filled stays."""
        try:
            names = os.listdir(self.directory)  # also files that a killed wrapper had not renamed yet
        except OSError:
            names = []
        for name in sorted(names, key=lambda name: (name == "owner", name != "state.json")):
            self._quietly(os.unlink, os.path.join(self.directory, name))
        for path in (self.rootfs, self.stage, self.directory, os.path.dirname(self.directory)):
            self._quietly(os.rmdir, path)

    @staticmethod
    def _quietly(call: Any, path: str) -> None:
        try:
            call(path)
        except OSError:
            pass

    def _read(self, name: str) -> bytes:
        try:
            fd = os.open(os.path.join(self.directory, name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return b""
        try:
            parts = []
            size = 0
            while size < 4 * _STATE_MAX and (part := os.read(fd, _STATE_MAX)):
                parts.append(part)
                size += len(part)
            return b"".join(parts)
        finally:
            os.close(fd)

    def _write(self, name: str, data: bytes) -> None:
        path = os.path.join(self.directory, name)
        temporary = f"{path}.{os.getpid()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            at = 0
            while at < len(data):
                at += os.write(fd, data[at:])
        finally:
            os.close(fd)
        os.rename(temporary, path)


def _hash(text: str) -> str:
    """16 hex digits that stand for a runtime's root directory."""
    data = text.encode("utf-8", "surrogateescape")
    try:  # built in, where hashlib would load OpenSSL
        from _sha256 import sha256  # type: ignore[import-not-found]
    except ImportError:  # Python 3.12 calls it _sha2
        from hashlib import sha256
    return str(sha256(data).hexdigest()[:16])


def start_time(pid: int) -> int:
    """A process' start time in clock ticks since boot (proc_pid_stat(5), field 22), 0 if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            return int(file.read(4096).rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def is_alive(pid: int, started: int) -> bool:
    """Whether the process that started then still runs."""
    return started != 0 and start_time(pid) == started
