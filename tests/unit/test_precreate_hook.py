"""podman's precreate hook: whose configuration it has been given. The rest is tried with podman itself."""

from __future__ import annotations

from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HOOK = Path(__file__).resolve().parents[2] / "hooks" / "clip-precreate"
OURS, THEIRS = "1f" * 32, "2e" * 32
DIRECTORY = "/var/lib/containers/storage/{}-containers/{}/userdata"


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    module = ModuleType("clip_precreate")
    exec(compile(SourceFileLoader("clip_precreate", str(HOOK)).get_data(str(HOOK)), HOOK, "exec"), module.__dict__)
    return module


def config(*sources: str, cgroup: str = "", env: str = "") -> dict[str, Any]:
    mounts = [{"destination": "/x", "source": source} for source in sources]
    return {"process": {"env": [env]}, "mounts": mounts, "linux": {"cgroupsPath": cgroup}}


@pytest.mark.parametrize(
    "given",
    [
        config(DIRECTORY.format("overlay", OURS) + "/hosts", "proc"),
        config(DIRECTORY.format("vfs", OURS) + "/hosts"),
        config(cgroup=f"machine.slice:libpod:{OURS}"),
        config(cgroup=f"/libpod_parent/libpod-{OURS}"),
        # the container's own words name another
        config(DIRECTORY.format("vfs", OURS) + "/shm", env=f"X={DIRECTORY.format('overlay', THEIRS)}/"),
        config(cgroup=f"machine.slice:libpod:{OURS}", env=f"X={DIRECTORY.format('overlay', THEIRS)}/"),
        config(cgroup=f"machine.slice:libpod:{OURS}", env=f"X=libpod-{THEIRS}"),
        # and so does somebody's mount of another's directory
        config(*(DIRECTORY.format("overlay", id_) for id_ in (OURS, THEIRS)), cgroup=f"machine.slice:libpod:{OURS}"),
    ],
)
def test_whose_configuration_it_is(hook: ModuleType, given: dict[str, Any]) -> None:
    assert hook.container_id(given) == OURS


@pytest.mark.parametrize("given", [[], 5, {}, config(), {"mounts": [5]}, {"mounts": 5}, {"linux": 5}])
def test_nobodys_configuration(hook: ModuleType, given: Any) -> None:
    with pytest.raises(ValueError, match="configuration"):
        hook.container_id(given)
