"""What the daemon measures: every metric's name, meaning and source. The one list of them; see systemd/README.md."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from shim import __version__
from shim.cache.transfer import LayerStats
from shim.counters import Histogram
from shim.daemon.failures import FailureLog
from shim.daemon.layers import Layers
from shim.daemon.metrics import Histograms, Sample
from shim.daemon.starts import Starts
from shim.daemon.trees import Trees
from shim.fuse.server import BlobServer


@dataclass(frozen=True, slots=True)
class Measures:
    """Reads the daemon's parts; called in a thread of the metrics endpoint."""

    layers: Layers
    trees: Trees
    server: BlobServer
    starts: Starts
    failures: FailureLog
    state_dir: Path

    def __call__(self) -> tuple[list[Sample], Histograms]:
        return [*self._reads(), *self._fetches(), *self._registries(), *self._state()], self._histograms()

    def _histograms(self) -> Histograms:
        def one(text: str, histogram: Histogram) -> tuple[str, Histogram]:
            return text, histogram

        return {
            "read_wait_seconds": one("How long reads waited that the cache could not answer", self.server.waits),
            "mount_seconds": one("How long an acquire of a tree took", self.starts.mounts),
            "container_start_seconds": one("What clip-shim added to container starts", self.starts.durations),
        }

    def _reads(self) -> list[Sample]:
        total = self.layers.totals()
        hits = _one("result", {"hit": total.hits, "miss": total.misses})
        return [
            Sample("reads_total", "counter", "Reads of layers, by where the bytes were", ("result",), hits),
            _plain("read_failures_total", "counter", "Reads answered with an error", self.failures.count),
            _plain("reads_waiting", "gauge", "Reads that wait for a registry now", len(self.server.waiting())),
        ]

    def _fetches(self) -> list[Sample]:
        total: LayerStats = self.layers.totals()
        reasons = _one("reason", {"demand": total.demand_bytes, "ahead": total.ahead_bytes})
        text = "Uncompressed bytes fetched because a read waited (demand) or was expected (ahead)"
        return [
            _plain("fetched_bytes_total", "counter", "Compressed bytes of layers fetched", total.fetched_bytes),
            Sample("fetched_data_bytes_total", "counter", text, ("reason",), reasons),
            _plain("fetches_total", "counter", "Ranges of layers asked for", total.requests),
            _plain("fetch_failures_total", "counter", "Fetches that failed; most are tried again", total.failures),
            _plain("fetches_running", "gauge", "Fetches that run or wait for a thread", self.layers.busy_count()),
        ]

    def _registries(self) -> list[Sample]:
        rows = {tuple(name.rpartition(" ")[::2]): row for name, row in self.layers.traffic().items()}
        labels = ("host", "kind")

        def of(field: str) -> list[tuple[tuple[str, ...], float]]:
            return [(key, float(row[field])) for key, row in rows.items()]

        return [
            Sample("registry_requests_total", "counter", "Requests to registries", labels, of("requests")),
            Sample("registry_received_bytes_total", "counter", "Bytes from registries", labels, of("bytes")),
            Sample("registry_errors_total", "counter", "Requests to registries that failed", labels, of("errors")),
            Sample("registry_retries_total", "counter", "Requests tried again", labels, of("retries")),
        ]

    def _state(self) -> list[Sample]:
        trees = self.trees.status()
        entries = self.layers.cache.entries()
        disk = os.statvfs(self.state_dir)
        tier = str(trees[0]["tier"]) if trees else "none"
        return [
            Sample("info", "gauge", "Version and tier", ("version", "tier"), [((__version__, tier), 1.0)]),
            _plain("trees_mounted", "gauge", "Images whose tree is mounted", len(trees)),
            _plain("containers", "gauge", "Overlays over mounted trees", sum(tree["overlays"] for tree in trees)),
            _plain("layers_served", "gauge", "Layers that are served", self.layers.served_count()),
            _plain("layers_open", "gauge", "Layers that the kernel has open", self.layers.open_count()),
            _plain("cache_bytes", "gauge", "Disk space of the layer cache", sum(entry.allocated for entry in entries)),
            _plain("cache_layers", "gauge", "Layers in the cache", len(entries)),
            _plain("state_free_bytes", "gauge", "Free space where the cache is", disk.f_bavail * disk.f_frsize),
            _plain("state_size_bytes", "gauge", "Size of the file system of the cache", disk.f_blocks * disk.f_frsize),
            _plain("container_failures_total", "counter", "Starts that were given up", self.starts.failures),
        ]


def _plain(name: str, kind: str, text: str, value: float) -> Sample:
    return Sample(name, kind, text, (), [((), float(value))])


def _one(_label: str, values: dict[str, int]) -> list[tuple[tuple[str, ...], float]]:
    return [((key,), float(value)) for key, value in values.items()]
