"""A thin image's config: the original's, but for the list of layers and their history (OCI image-spec config.md)."""

from __future__ import annotations

import json
from typing import Any

from shim.errors import UsageError
from shim.registry.manifest import load_json
from shim.thin.skeleton import clean

_WHAT = "the image's config"


def thin_config(raw: bytes, diff_id: str, created_by: str) -> bytes:
    """The config of an image whose one layer is `diff_id`. The original's history stays, as steps without a layer.

    Everything else is kept as it is, known or not. Raises RegistryError for a config that is no JSON object.
    """
    config = load_json(raw, _WHAT)
    # Go takes a key in any case for its own
    theirs = next((value for key, value in config.items() if key.lower() == "history"), None)
    kept = {key: value for key, value in config.items() if key.lower() not in ("history", "rootfs")}
    history: list[dict[str, Any]] = [
        {**step, "empty_layer": True} for step in (theirs if isinstance(theirs, list) else ()) if isinstance(step, dict)
    ]
    own: dict[str, Any] = {"created_by": created_by, "comment": "thin image: its content is loaded when it is read"}
    if isinstance(config.get("created"), str):
        own = {"created": config["created"], **own}
    kept["rootfs"] = {"type": "layers", "diff_ids": [diff_id]}
    kept["history"] = [*history, own]
    return json.dumps(kept, separators=(",", ":")).encode()


def volumes_of(raw: bytes) -> list[bytes]:
    """The paths of the config's `Volumes`, cleaned and sorted. Raises UsageError for one that is the root itself."""
    inner = load_json(raw, _WHAT).get("config")
    volumes = inner.get("Volumes") if isinstance(inner, dict) else None
    paths = sorted({clean(path) for path in volumes}) if isinstance(volumes, dict) else []
    if b"/" in paths:
        raise UsageError("the image declares its whole root as a volume", hint="no engine runs such an image")
    return paths
