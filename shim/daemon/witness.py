"""How a server's death is noticed at once, also while a thread of it hangs in the kernel. Standard library only.

Neither SIGCHLD nor the pidfd of a process comes before its last thread has ended; that of a thread does (PIDFD_THREAD,
Linux 6.9). So one thread, the witness, waits for nothing all the server's life, and dies when it does. Our supervisor
polls its descriptor. systemd knows SIGCHLD only: there a small process polls it, which takes the dead one's place as
the unit's main process, and ends.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
from contextlib import suppress

from shim.cache.ownership import is_corpse
from shim.daemon import notify

WITNESS = "X_CLIP_SHIM_WITNESS"
_SETTLE_SECONDS = 0.05  # a dead server has ended by then, or hangs
_BARRIER_SECONDS = 10.0


def leave() -> None:
    """Let whoever starts our successor hear of our death. Call it before there are threads, or signal handlers."""
    _leave_no_core()
    supervised = notify.supervisor() is not None
    if not supervised and not os.environ.get("NOTIFY_SOCKET"):
        return
    thread = threading.Thread(target=threading.Event().wait, name="witness", daemon=True)
    fds: list[int] = []
    channel = None
    try:
        channel = None if supervised else _start_watcher()
        thread.start()
        fds.append(os.pidfd_open(thread.native_id or 0, os.O_EXCL))  # O_EXCL: PIDFD_THREAD
        fds.append(os.pidfd_open(os.getpid()))
        if channel is not None:
            socket.send_fds(channel, [b"\n"], fds)
        else:
            notify.notify(f"{WITNESS}=1", fds[:1])
    except OSError:
        pass  # an older kernel, or no room for one more process: our death is seen later, that is all
    finally:
        for fd in fds:
            os.close(fd)
        if channel is not None:
            channel.close()


def _leave_no_core() -> None:
    """prctl(2), PR_SET_DUMPABLE. A death by SIGABRT or SIGSEGV would wait until each thread can be dumped, then until
    the dump is written; reads would, too. faulthandler prints what it would show."""
    import ctypes

    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)


def _start_watcher() -> socket.socket:
    """A process that gets descriptors from here: of the witness, and of us."""
    server = os.getpid()
    ours, theirs = socket.socketpair()
    try:
        child = os.fork()
    except OSError:
        ours.close()
        theirs.close()
        raise
    if child == 0:
        try:
            if os.fork() == 0:  # an orphan: systemd hears of the end of its own children only
                os.dup2(theirs.fileno(), 3)
                os.closerange(4, 1 << 30)  # nothing that we hold is to live longer than we do
                _watch(socket.socket(fileno=3), server)
        finally:
            os._exit(0)
    with suppress(ChildProcessError):  # whoever started us ignored SIGCHLD
        os.waitpid(child, 0)
    theirs.close()
    return ours


def _watch(channel: socket.socket, server: int) -> None:
    with open("/proc/self/comm", "w") as file:
        file.write("clip-watcher")
    _, fds, _, _ = socket.recv_fds(channel, 1, 2)
    if len(fds) != 2:
        return
    witness, process = fds
    select.select([witness, process], [], [])
    while not select.select([process], [], [], _SETTLE_SECONDS)[0]:
        if is_corpse(server):
            text = "the daemon is dead, and a thread of it hangs in the kernel: its successor does not wait for that"
            print(f"clip-shim: {text}", file=sys.stderr, flush=True)  # noqa: T201
            notify.notify(f"MAINPID={os.getpid()}")
            _barrier()
            return


def _barrier() -> None:
    """sd_notify_barrier(3): returns when what was sent has been obeyed."""
    ours, theirs = os.pipe()
    if notify.notify("BARRIER=1", [theirs]):
        os.close(theirs)
        select.select([ours], [], [], _BARRIER_SECONDS)
