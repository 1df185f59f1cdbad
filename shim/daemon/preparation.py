"""From an index file to a tree that can be mounted: the jobs of prepare.py, and what can be done beside them."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from shim import log
from shim.daemon import indexfile, jobs, prepare
from shim.daemon.imagetree import Files
from shim.daemon.layers import Layers
from shim.daemon.startprofiles import StartProfiles
from shim.errors import CacheError, IndexFormatError

Access = jobs.Beside[None]


def ready(
    layers: Layers, profiles: StartProfiles, tree: str, directory: Path, files: Files, tier: str, end: float
) -> tuple[dict[str, Any], Access]:
    """The meta of the prepared tree (index hex `tree`, kept in `directory`), its layers served; and the registry's word
    on whether its image may have them, which must be waited for before anything is shown.

    By `end` (monotonic). The registry is asked, and what a start profile names is fetched, while the tree is made. What
    was kept and is damaged is made again, once. Raises ShimError; the layers are let go then.
    """
    while True:
        fresh = indexfile.keep(files.index, tree, directory)
        meta = None if fresh else prepare.read_meta(directory)
        access: Access | None = None
        try:
            if meta is not None:
                return meta, _serve(layers, profiles, tree, directory, files, meta, end)
            log.info("preparing a tree", index=tree)
            prepare.begin(directory)
            shape = jobs.Beside(jobs.run, left(end), prepare.prepare_tree, str(directory), tier != "fuse")
            try:
                meta = jobs.run(left(end), prepare.prepare_layers, str(directory))
                access = _serve(layers, profiles, tree, directory, files, meta, end)
            finally:
                shape.wait()
            meta |= shape.result()
            prepare.finish(directory, meta)
            return meta, access
        except BaseException as error:
            if access is not None:
                access.wait()  # it uses the layers
            layers.discard(tree)
            if not isinstance(error, IndexFormatError | CacheError):
                raise
            shutil.rmtree(directory, ignore_errors=True)
            if fresh:
                raise
            log.warning("what was kept of an index is damaged; making it again", index=tree, error=str(error))


def _serve(
    layers: Layers,
    profiles: StartProfiles,
    tree: str,
    directory: Path,
    files: Files,
    meta: dict[str, Any],
    end: float,
) -> Access:
    layers.add(tree, meta, directory, files.archive)
    profiles.begin(tree, meta)
    return jobs.Beside(layers.confirm, meta, end)


def left(end: float) -> float:
    """Seconds until `end`, at least a moment: a job that has no time left says so itself."""
    return max(0.05, end - time.monotonic())
