"""What Prometheus calls each metric, and the expressions that dashboards and alerts are made of.

Every expression begins at a definition in `cluster.metrics`, or at one of Ray's own in `RAY_METRICS`: a name that is
defined nowhere is a KeyError where the dashboard is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.metrics import (
    SERVING,
    SERVING_METRICS,
    TRAINING,
    TRAINING_METRICS,
    TUNING,
    TUNING_METRICS,
    Metric,
)

RATE_WINDOW = "$__rate_interval"
"""Grafana's: at least four scrapes, and no less than the step of the graph"""

_NODE = ("ip", "RayNodeType")
_GPU = (*_NODE, "GpuIndex", "GpuDeviceName")

RAY_METRICS: Mapping[str, Metric] = {
    "node_cpu_utilization": Metric("gauge", "CPU time of a node in use, percent", _NODE),
    "node_mem_used": Metric("gauge", "memory of a node in use, bytes", _NODE),
    "node_mem_total": Metric("gauge", "memory of a node, bytes", _NODE),
    "node_disk_utilization_percentage": Metric("gauge", "of the root file system in use, percent", _NODE),
    "node_disk_free": Metric("gauge", "free on the root file system, bytes", _NODE),
    "node_network_receive_speed": Metric("gauge", "bytes that a node receives in a second", _NODE),
    "node_gpus_utilization": Metric("gauge", "time in which a GPU ran a kernel, percent", _GPU),
    "node_gram_used": Metric("gauge", "memory of a GPU in use, MiB", _GPU),
    "node_gram_available": Metric("gauge", "memory of a GPU that is free, MiB", _GPU),
    "serve_application_status": Metric("gauge", "of Serve's application: 6 runs, 5 deploys, 2 ails", ("application",)),
    "serve_deployment_status": Metric(
        "gauge", "of Serve's deployment: 6 is healthy, 2 is not", ("deployment", "application")
    ),
    "serve_deployment_replica_healthy": Metric("gauge", "healthy replicas", ("deployment", "application")),
}
"""Ray's own that are used here, as Ray 2.60's dashboard agent and Serve's controller define them"""

RUNNING_STATUS, UNHEALTHY_STATUS = 6, 2
"""of Serve's applications and deployments"""


@dataclass(frozen=True)
class Series:
    """A metric as Prometheus has it.

    Args:
        name: as scraped, without a counter's or histogram's ending.
        metric: its definition.
        labels: that tell its sources apart, beside those of the metric.
    """

    name: str
    metric: Metric
    labels: tuple[str, ...] = ()

    def gauge(self, *matchers: str) -> str:
        """The selector of a gauge."""
        return self._select("gauge", "", matchers)

    def rate(self, *matchers: str, window: str = RATE_WINDOW) -> str:
        """Of a counter, how much it grows in a second."""
        return f"rate({self._select('counter', '_total', matchers)}[{window}])"

    def grown(self, *matchers: str, window: str) -> str:
        """Of a counter, how much it grew in the window, its first count included.

        Ray shows no counter before it has counted something, and `increase` knows nothing of what a series began with:
        where things are as rare as trials, that is much of it.
        """
        return _grown(self._select("counter", "_total", matchers), window)

    def buckets(self, *matchers: str, by: str = "", window: str = RATE_WINDOW) -> str:
        """Of a histogram, values in a second by upper bound, for a heat map."""
        labels = ", ".join(filter(None, ("le", by)))
        return f"sum by ({labels}) (rate({self._select('histogram', '_bucket', matchers)}[{window}]))"

    def quantile(self, share: float, *matchers: str, by: str, window: str = RATE_WINDOW) -> str:
        """Of a histogram, the value that a share of the values lies under."""
        return f"histogram_quantile({share:g}, {self.buckets(*matchers, by=by, window=window)})"

    def rare_quantile(self, share: float, *matchers: str, by: str, window: str) -> str:
        """The same of a histogram of few values, as `grown` counts them."""
        grown = _grown(self._select("histogram", "_bucket", matchers), window)
        return f"histogram_quantile({share:g}, sum by (le, {by}) ({grown}))"

    def rare_mean(self, *matchers: str, by: str, window: str) -> str:
        """The mean of a histogram of few values in the window, as `grown` counts them."""
        total, count = (_grown(self._select("histogram", end, matchers), window) for end in ("_sum", "_count"))
        return f"sum by ({by}) ({total}) / sum by ({by}) ({count})"

    def _select(self, kind: str, ending: str, matchers: tuple[str, ...]) -> str:
        if self.metric.kind != kind:
            raise TypeError(f"{self.name} is a {self.metric.kind}, not a {kind}")
        return f"{self.name}{ending}{{{','.join(matchers)}}}" if matchers else f"{self.name}{ending}"

    @property
    def scraped(self) -> tuple[str, ...]:
        """All names under which Prometheus has it."""
        endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
        return tuple(self.name + ending for ending in endings[self.metric.kind])


def _grown(selector: str, window: str) -> str:
    """A counter that began anew, with its node, counts as if it had not grown."""
    before = f"({selector} offset {window} or 0 * {selector})"
    return f"clamp_min({selector} - {before}, 0)"


def _series(prefix: str, metrics: Mapping[str, Metric], labels: tuple[str, ...]) -> dict[str, Series]:
    return {name: Series(f"ray_{prefix}{name}", metric, labels) for name, metric in metrics.items()}


TRAINING_SERIES: Mapping[str, Series] = _series(
    f"{TRAINING}_", {name: Metric("gauge", text) for name, text in TRAINING_METRICS.items()}, ("run", "rank")
)
TUNING_SERIES: Mapping[str, Series] = _series(f"{TUNING}_", TUNING_METRICS, ("model", "gpu_type"))
SERVING_SERIES: Mapping[str, Series] = _series(f"{SERVING}_", SERVING_METRICS, ("application", "replica"))
RAY_SERIES: Mapping[str, Series] = _series("", RAY_METRICS, ())
ALL_SERIES: tuple[Series, ...] = tuple(
    series for family in (TRAINING_SERIES, TUNING_SERIES, SERVING_SERIES, RAY_SERIES) for series in family.values()
)
