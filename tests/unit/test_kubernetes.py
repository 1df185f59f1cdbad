"""packaging/kubernetes against Kubernetes' published schemas, and against what the code calls things."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from shim.install import containerd
from shim.registry.ref import ImageRef
from shim.settings import load
from tests.support.host import ROOT

FOLDER = ROOT / "packaging/kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
MANIFESTS = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml")
VERSIONS = ("1.27", kubernetes_validate.latest_version())


def load_all(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_schema(path: Path, version: str) -> None:
    for document in load_all(path):
        kubernetes_validate.validate(document, version, strict=True)


def test_a_wrong_manifest_does_not_pass() -> None:
    [document] = load_all(FOLDER / "daemonset.yaml")
    document["spec"]["template"]["spec"]["hostPid"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, VERSIONS[0], strict=True)


def test_kustomization_names_what_is_there() -> None:
    """All but the example; in an order in which they can be made."""
    assert sorted(KUSTOMIZATION["resources"]) == sorted(path.name for path in MANIFESTS if path.name != "pod.yaml")
    kinds = [load_all(FOLDER / name)[0]["kind"] for name in KUSTOMIZATION["resources"]]
    assert kinds[0] == "Namespace"


def test_names_agree() -> None:
    """Handler, label, class, config map: one word in two files."""
    runtime = load_all(FOLDER / "runtimeclass.yaml")[0]
    daemons = load_all(FOLDER / "daemonset.yaml")[0]
    config = load_all(FOLDER / "configmap.yaml")[0]
    pod = load_all(FOLDER / "pod.yaml")[0]
    spec = daemons["spec"]["template"]["spec"]
    assert runtime["handler"] == "clip"  # `install`'s default name
    assert pod["spec"]["runtimeClassName"] == runtime["metadata"]["name"]
    assert spec["nodeSelector"] == runtime["scheduling"]["nodeSelector"]
    assert spec["volumes"][0]["configMap"]["name"] == config["metadata"]["name"]
    assert (
        daemons["spec"]["selector"]["matchLabels"].items() <= daemons["spec"]["template"]["metadata"]["labels"].items()
    )
    assert {item["metadata"].get("namespace") for item in (daemons, config)} == {"clip-shim"}
    assert containerd.ANNOTATIONS == ["io.clip.*"]
    assert ImageRef.parse(pod["spec"]["containers"][0]["image"]).registry == "registry.example.com"


def test_the_nodes_configuration_is_valid(tmp_path: Path) -> None:
    text = load_all(FOLDER / "configmap.yaml")[0]["data"]["config.yaml"]
    (tmp_path / "config.yaml").write_text(text)
    assert load(tmp_path / "config.yaml", env={})["trust.registries"] == ("*",)


def node_install(
    tmp_path: Path, doctor: int = 0, changed: bool = True, fails: str = "nothing"
) -> tuple[int, list[str]]:
    """Run the script with a node that only writes down what it is told: (exit code, its commands). fails: a part of a
    command that does."""
    tools, node = tmp_path / "bin", tmp_path / "node"
    for path in (tools, node / "run", tmp_path / "packages"):
        path.mkdir(parents=True, exist_ok=True)
    (tmp_path / "said").unlink(missing_ok=True)
    (tmp_path / "packages/clip-shim_1_amd64.deb").write_text("")
    (tmp_path / "config.yaml").write_text("{}\n")
    diff = "+  clip" if changed else "already"
    (tools / "nsenter").write_text(
        f"""#!/bin/sh
while [ "$1" != -- ]; do shift; done
shift
echo "$*" >>{tmp_path}/said
case "$*" in *--dry-run) echo "{diff}";; *doctor*) exit {doctor};; *"{fails}"*) exit 1;; esac
"""
    )
    (tools / "nsenter").chmod(0o755)
    script = (FOLDER / "node-install.sh").read_text().replace("root=/proc/$pid/root", f"root={node}")
    (tmp_path / "script").write_text(script)
    done = subprocess.run(
        ["sh", tmp_path / "script"],
        env={"PATH": f"{tools}:/usr/bin:/bin", "PACKAGES": f"{tmp_path}/packages", "CONFIG": f"{tmp_path}/config.yaml"},
        capture_output=True,
        text=True,
    )
    assert not (node / "run/clip-shim-install").exists()
    assert (node / "etc/clip-shim/config.yaml").read_text() == "{}\n"
    return done.returncode, (tmp_path / "said").read_text().splitlines()


def test_node_install(tmp_path: Path) -> None:
    code, said = node_install(tmp_path)
    assert code == 0
    assert [line for line in said if line.startswith(("clip-shim", "systemctl"))] == [
        "clip-shim install containerd --dry-run",
        "clip-shim install containerd",
        "systemctl restart containerd",
        "systemctl try-restart clip-shim.service",
        "clip-shim doctor",
    ]


@pytest.mark.parametrize(("doctor", "code"), [(0, 0), (1, 0), (2, 1)])
def test_node_install_ends_as_the_doctor_says(tmp_path: Path, doctor: int, code: int) -> None:
    """A warning is none of the pod's; an engine whose file is right is not restarted."""
    ended, said = node_install(tmp_path, doctor, changed=False)
    assert ended == code
    assert "systemctl restart containerd" not in said


@pytest.mark.parametrize("fails", ["install containerd", "systemctl restart"])
def test_node_install_that_ended_in_the_middle_is_finished(tmp_path: Path, fails: str) -> None:
    """The engine's file is right then, but the engine has not read it."""
    assert node_install(tmp_path, fails=fails)[0] == 1
    code, said = node_install(tmp_path, changed=False)
    assert code == 0
    assert "systemctl restart containerd" in said
    assert "systemctl restart containerd" not in node_install(tmp_path, changed=False)[1]
    assert list((tmp_path / "node/run").iterdir()) == []
