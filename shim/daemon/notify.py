"""sd_notify(3): tell whoever started us (systemd, or our own supervisor) how we are. Standard library only."""

from __future__ import annotations

import os
import socket

SUPERVISOR = "CLIP_SHIM_SUPERVISOR"
_FIRST_FD = 3  # SD_LISTEN_FDS_START


def notify(text: str, fds: list[int] | None = None) -> bool:
    """Send `text` (lines of KEY=VALUE), with descriptors for FDSTORE=1. False if nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address[0] == "@":
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect(address)
            if fds:
                socket.send_fds(sock, [text.encode()], fds)
            else:
                sock.sendall(text.encode())
        except OSError:
            return False
    return True


def keeps_fds() -> bool:
    """Whether somebody keeps descriptors for a successor of ours. FDSTORE is set by systemd since version 254."""
    if os.environ.get(SUPERVISOR) and supervisor() is None:
        return False  # it was killed, and what it kept is gone
    return bool(os.environ.get("NOTIFY_SOCKET")) and os.environ.get("FDSTORE", "1") != "0"


def supervisor() -> int | None:
    """The process id of the `clip-shim daemon --supervise` that started us, if one did."""
    text = os.environ.get(SUPERVISOR, "")
    return int(text) if text.isdigit() and int(text) == os.getppid() else None


def store(name: str, fd: int) -> bool:
    """Leave a copy of a descriptor with the service manager, for a successor. False: nobody keeps it."""
    return keeps_fds() and notify(f"FDSTORE=1\nFDNAME={name}", [fd])


def unstore(name: str) -> None:
    """What was stored under this name is of no use any more."""
    notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def inherited() -> dict[str, list[int]]:
    """Descriptors that the service manager passed, by name (sd_listen_fds_with_names(3)); the second call gives none.

    They are close-on-exec from now on, and gone from the environment: what we start must not take them for its own.
    """
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    found: dict[str, list[int]] = {}
    if pid != str(os.getpid()) or not count.isdigit():
        return found
    for number in range(int(count)):
        fd = _FIRST_FD + number
        os.set_inheritable(fd, False)
        found.setdefault(names[number] if number < len(names) else "unknown", []).append(fd)
    return found


def watchdog_seconds() -> float | None:
    """How often the service manager wants to hear that we are well (sd_watchdog_enabled(3)); None if it does not."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", str(os.getpid()))
    return int(usec) / 1e6 if usec.isdigit() and int(usec) and pid == str(os.getpid()) else None


def ready() -> None:
    """We serve: say so to the service manager, and on the pipe that a wrapper which started us waits on."""
    notify(f"READY=1\nMAINPID={os.getpid()}")
    _tell_pipe("READY")


def failed(message: str) -> None:
    """We cannot start: `message` is one line for the person who waits."""
    notify("STATUS=" + message.replace("\n", " "))
    _tell_pipe("ERROR " + message.replace("\n", " "))


def _tell_pipe(line: str) -> None:
    text = os.environ.pop("CLIP_SHIM_READY_FD", "")
    if text.isdigit():
        try:
            os.write(int(text), line.encode() + b"\n")
            os.close(int(text))
        except OSError:
            pass  # the wrapper gave up waiting
