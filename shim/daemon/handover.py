"""What a server takes over from a predecessor that was killed or replaced: the blobs' descriptor and the journal.

The descriptor is kept by the service manager (notify.store); RUN/blobs.journal says what the kernel knows; the layers
behind it are found by the prepared trees below STATE/trees. Nothing here touches a path below the mounts.
"""

from __future__ import annotations

import os
import select
from pathlib import Path
from typing import Any

from shim import log
from shim.daemon import archives, notify, prepare
from shim.daemon.imagetree import ImageTree
from shim.daemon.layers import Layers
from shim.daemon.origins import Source
from shim.daemon.trees import Trees
from shim.errors import DaemonError, ShimError
from shim.fuse.journal import Journal
from shim.fuse.server import BlobServer
from shim.mount import mountinfo
from shim.registry.ref import ImageRef
from shim.settings import Settings

BLOBS = "blobs"  # names in the descriptor store
LISTENER = "listener"
JOURNAL = "blobs.journal"
_OLD_KERNEL = "this kernel cannot deliver requests again (FUSE_NOTIFY_RESEND needs Linux 6.9)"


def possible(server: BlobServer) -> str:
    """What becomes of reads should the server be killed: "" if a successor answers them, else why they fail."""
    if not notify.keeps_fds():
        return "nobody keeps its descriptor: it runs neither below `clip-shim daemon --supervise` nor as a systemd unit"
    return "" if server.can_resend else _OLD_KERNEL


def take(fds: dict[str, list[int]], run: Path) -> tuple[int, Journal] | None:
    """The predecessor's /dev/fuse descriptor and its journal, if reads can go on with them; None: begin anew.

    Whatever cannot be used is closed, here and in the store: those who wait for it then get an error at once.
    """
    for fd in fds.get(BLOBS, [])[:1]:
        reason = _unusable(fd)
        if not reason:
            try:
                journal = Journal(run / JOURNAL, fresh=False)
            except (DaemonError, OSError) as error:
                reason = str(error)
            else:
                if journal.init is not None and journal.init.can_resend:
                    return fd, journal
                journal.close()
                if journal.init is not None:
                    reason = _OLD_KERNEL
        if reason:
            log.error("the predecessor's blobs cannot be taken over: reads of running containers fail", reason=reason)
        os.close(fd)
        notify.unstore(BLOBS)
    return None


def restore(settings: Settings, journal: Journal, layers: Layers, trees: Trees) -> None:
    """The tables as the predecessor had them, from the prepared trees, the journal and what is mounted; before anything
    is served.

    A tree that is mounted, and all of whose layers are served, goes on. Anything else at a tree's path is unmounted by
    `Trees.reap`; portable trees too: their servers go on for those who have a mount, the next acquire starts another.
    """
    names = {os.fsdecode(name) for name, _ in journal.nodes.values()}
    prefix = os.fsencode((settings.run_dir / "trees").resolve()) + b"/"
    mounts = {e.mount_point[len(prefix) :]: e for e in mountinfo.read() if e.mount_point.startswith(prefix)}
    served: set[str] = set()
    for directory in sorted((settings.state_dir / "trees").iterdir()):
        meta = prepare.read_meta(directory)
        if meta is None:
            continue
        hex_ = directory.name
        blobs = {layer["blob"] for layer in meta["layers"]}
        again = _serve_again(settings, layers, hex_, meta, directory, names)
        served |= again
        entry = mounts.get(os.fsencode(hex_))
        if entry is not None and entry.fs_type == b"erofs" and again == blobs:
            tier = "erofs-loop" if entry.source.startswith(b"/dev/loop") else "erofs"
            trees.adopt(ImageTree(hex_, meta=meta, mounted=tier, device=entry.dev.decode()))
        else:
            layers.release(hex_)
    if names - served:
        log.error("a predecessor's layers are known no more: reads of them fail", layers=sorted(names - served))


def _serve_again(
    settings: Settings, layers: Layers, tree: str, meta: dict[str, Any], directory: Path, names: set[str]
) -> set[str]:
    """Those layers of a tree that are in `names`. Trust was judged when the tree was mounted."""
    done = set()
    wanted = [(number, layer) for number, layer in enumerate(meta["layers"]) if layer["blob"] in names]
    for number, layer in wanted:
        try:
            place = archives.source(meta, directory, None, settings)
            source = Source(ImageRef.parse(meta["image"], local_paths=False), layer["digest"], archive=place)
            layers.add_one(tree, number, layer, directory / f"spans.{number}", source)
            done.add(layer["blob"])
        except ShimError as error:
            log.error("a layer cannot be served again", layer=layer["diff_id"], index=tree, error=str(error))
    return done


def _unusable(fd: int) -> str:
    """Why nothing can be served on a descriptor; "" if something can."""
    poll = select.poll()
    poll.register(fd, 0)
    if any(events & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, events in poll.poll(0)):
        return "they are no longer mounted"
    return ""
