"""Alert rules as Prometheus itself reads and evaluates them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

MONITORING = Path(__file__).resolve().parents[2] / "packaging/monitoring"
LABELS = 'job="clip-shim",instance="n1"'


def promtool(*words: str | Path) -> None:
    done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_them() -> None:
    promtool("check", "rules", MONITORING / "prometheus-rules.yml")
    promtool("check", "config", MONITORING / "prometheus-scrape.yml")


# alert → series that set it off (promtool's notation, one value a minute)
BAD: dict[str, dict[str, str]] = {
    "ClipShimDown": {"up": "0x30"},
    "ClipShimReadsFail": {"clip_shim_read_failures_total": "0+1x30"},
    "ClipShimReadsWait": {"clip_shim_reads_waiting": "3x30"},
    "ClipShimReadsSlow": {
        'clip_shim_read_wait_seconds_bucket,le="5"': "0+1x30",
        'clip_shim_read_wait_seconds_bucket,le="10"': "0+60x30",
        'clip_shim_read_wait_seconds_bucket,le="+Inf"': "0+60x30",
    },
    "ClipShimStartsFail": {"clip_shim_container_failures_total": "0+1x30"},
    "ClipShimRegistryErrors": {
        'clip_shim_registry_errors_total,host="r"': "0+20x30",
        'clip_shim_registry_requests_total,host="r"': "0+60x30",
    },
    "ClipShimDiskFull": {"clip_shim_state_free_bytes": "4x30", "clip_shim_state_size_bytes": "100x30"},
    "ClipShimRestarts": {"process_start_time_seconds": "0+1x30"},
}
GOOD = {
    "up": "1x30",
    "clip_shim_read_failures_total": "7x30",
    "clip_shim_reads_waiting": "3 0 3 0 3 0 3 0 3 0 3 0 3 0 3 0 3 0 3 0 3 0 3 0 3 0 3 0 3 0",
    "clip_shim_container_failures_total": "2x30",
    "clip_shim_state_free_bytes": "20x30",
    "clip_shim_state_size_bytes": "100x30",
    "process_start_time_seconds": "5x30",
}


def series(values: dict[str, str]) -> list[dict[str, str]]:
    rows = []
    for key, text in values.items():
        name, _, more = key.partition(",")
        rows.append({"series": f"{name}{{{LABELS}{',' if more else ''}{more}}}", "values": text})
    return rows


def rules() -> dict[str, Any]:
    (group,) = yaml.safe_load((MONITORING / "prometheus-rules.yml").read_text())["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


@pytest.mark.parametrize("alert", BAD)
def test_what_sets_it_off(alert: str, tmp_path: Path) -> None:
    rule = rules()[alert]
    labels = {"severity": rule["labels"]["severity"], "instance": "n1"}
    if "sum by" not in rule["expr"]:
        labels["job"] = "clip-shim"
    if "host" in str(BAD[alert]):
        labels["host"] = "r"
    said = {
        key: text.replace("{{ $labels.instance }}", "n1").replace("{{ $labels.host }}", "r")
        for key, text in rule["annotations"].items()
    }
    expected = [{"exp_labels": labels, "exp_annotations": said}]
    check(tmp_path, alert, BAD[alert], expected)


@pytest.mark.parametrize("alert", BAD)
def test_what_does_not(alert: str, tmp_path: Path) -> None:
    check(tmp_path, alert, GOOD, [])


def check(directory: Path, alert: str, values: dict[str, str], expected: list[dict[str, Any]]) -> None:
    test = {
        "rule_files": [str(MONITORING / "prometheus-rules.yml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": series(values),
                "alert_rule_test": [{"eval_time": "25m", "alertname": alert, "exp_alerts": expected}],
            }
        ],
    }
    (directory / "test.yml").write_text(yaml.safe_dump(test))
    promtool("test", "rules", directory / "test.yml")


def test_every_alert_is_tried() -> None:
    assert set(BAD) == set(rules())
