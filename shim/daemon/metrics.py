"""Prometheus metrics of a running daemon, on a unix socket or a TCP port, if `metrics.listen` says so.

Nothing is counted for them: a scrape reads the plain counters that are there anyway. prometheus_client is imported when
a listener is asked for, and no thread runs without one.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from math import isinf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shim import log
from shim.counters import Histogram
from shim.errors import DaemonError

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

PREFIX = "clip_shim_"
_UNIX = "unix:"


@dataclass(frozen=True, slots=True)
class Sample:
    """One metric family: its name without PREFIX, "counter" or "gauge", what it is, its label names and its values."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...]
    values: list[tuple[tuple[str, ...], float]]


Histograms = dict[str, tuple[str, Histogram]]  # name → (help, histogram)
Gather = Callable[[], tuple[list[Sample], Histograms]]


class Collector:
    """What prometheus_client asks at each scrape."""

    def __init__(self, gather: Gather) -> None:
        self._gather = gather

    def describe(self) -> Iterator[Metric]:
        """Nothing: so that registering does not scrape."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        samples, histograms = self._gather()
        for sample in samples:
            family = CounterMetricFamily if sample.kind == "counter" else GaugeMetricFamily
            metric = family(PREFIX + sample.name, sample.help, labels=sample.labels)
            for labels, value in sample.values:
                metric.add_metric(labels, value)
            yield metric
        for name, (text, histogram) in histograms.items():
            buckets = [("+Inf" if isinf(bound) else str(bound), float(count)) for bound, count in histogram.buckets()]
            yield HistogramMetricFamily(PREFIX + name, text, buckets=buckets, sum_value=histogram.sum)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 16

    def server_bind(self) -> None:
        """Without HTTPServer's look-up of the host's name, which may wait for DNS."""
        if self.address_family != socket.AF_UNIX:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)  # type: ignore[arg-type,unused-ignore]
        self.server_address = self.socket.getsockname()

    def handle_error(self, *_: object) -> None:
        log.debug("a scrape ended early")


class Endpoint:
    """Serves /metrics until `close`. Raises DaemonError when it cannot listen."""

    def __init__(self, listen: str, gather: Gather) -> None:
        from prometheus_client import CollectorRegistry, MetricsHandler, ProcessCollector

        registry = CollectorRegistry()
        registry.register(Collector(gather))
        ProcessCollector(registry=registry)
        handler = MetricsHandler.factory(registry)
        self._path: Path | None = None
        try:
            if listen.startswith(_UNIX):
                self._path = Path(listen.removeprefix(_UNIX))
                self._server = self._unix(self._path, handler)
            else:
                host, _, port = listen.rpartition(":")
                host = host.strip("[]")
                server = type("_", (_Server,), {"address_family": socket.AF_INET6 if ":" in host else socket.AF_INET})
                self._server = server((host, int(port)), handler)
        except OSError as error:
            raise DaemonError(
                f"`metrics.listen`: cannot listen at {listen}: {error.strerror or error}",
                hint="another program may have that address",
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()
        log.info("metrics are served", listen=self.address)

    @staticmethod
    def _unix(path: Path, handler: Any) -> _Server:
        path.unlink(missing_ok=True)
        old = os.umask(0o177)
        try:
            server = type("_", (_Server,), {"address_family": socket.AF_UNIX})
            return server(str(path), handler)  # type: ignore[no-any-return]
        finally:
            os.umask(old)

    @property
    def address(self) -> str:
        """Where it listens, with the port that the kernel chose for port 0."""
        if self._path is not None:
            return f"{_UNIX}{self._path}"
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
