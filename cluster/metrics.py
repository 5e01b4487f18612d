"""Numbers for Prometheus, through `ray.util.metrics`. Needs a running Ray when used, and none to be imported.

Each node's metrics agent serves them at the node's metrics port as `ray_<name>`, counters as `ray_<name>_total` and
histograms as `_bucket`, `_sum` and `_count`, with the tags given here beside Ray's own. The file
`<temp-dir>/prom_metrics_service_discovery.json` of the head tells Prometheus where the agents are.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, NamedTuple

_logger = logging.getLogger(__name__)

RESEND_SECONDS = 5.0
"""Ray's agent drops a gauge 20 s after it was last set, which is less than many a line of a log or step takes"""

TRAINING = "raysoner_training"
"""prefix of the gauges of a training run; their tags are `run`, its name, and `rank`, the worker's in the world"""

TRAINING_METRICS: Mapping[str, str] = {
    "step": "optimizer steps done",
    "loss": "weighted negative log-likelihood of a trained token since the last line of the log, nats",
    "evaluation_loss": "the same on the held-out data, nats",
    "evaluation_adherence": "share of held-out questions whose thinking was in the language asked for, 0 to 1",
    "evaluation_complete": "share of held-out questions whose answer kept to the channels and came to its end, 0 to 1",
    "evaluation_right": "share of held-out questions whose answer ended up with the right number, 0 to 1",
    "gradient_norm": "norm of the adapters' gradient before clipping",
    "learning_rate": "learning rate of the last step",
    "skipped_steps": "optimizer steps left out because loss or gradient was not finite, since the worker started",
    "tokens_per_second": "tokens trained in a second of training time, over all workers",
    "step_seconds": "seconds of training time in an optimizer step, without evaluation and checkpoints",
    "mfu": "model FLOP utilisation: floating-point operations a step cannot do without, as a share of the peak, 0 to 1",
    "expert_load_max": "rows of a layer's busiest expert over the mean of its experts, 1 when even",
    "experts_idle": "share of a layer's experts that a micro-batch sends no token to, 0 to 1",
    "memory_gib": "peak memory of this worker: of its GPU as allocated, else of its process, GiB",
    "data_wait": "share of the training time in which this worker waited for data, 0 to 1",
}
"""what is measured in training, with its unit; one worker sends what concerns the run, each its memory and data wait"""


class Metric(NamedTuple):
    """What is measured: its kind, what it means and in which unit, the names of its tags, a histogram's upper bounds.

    A tag never holds a request's content, nor an API key, only a key's name.
    """

    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tags: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


SERVING = "raysoner_serving"
"""prefix of an endpoint's metrics; all carry the tags `application` and `replica` beside their own"""

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
_TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)

SERVING_METRICS: Mapping[str, Metric] = {
    "first_token_seconds": Metric(
        "histogram", "from a request's arrival to the first token of a choice, seconds", buckets=_SECONDS
    ),
    "inter_token_seconds": Metric(
        "histogram", "mean time between two tokens of a choice, one value a choice, seconds", buckets=_TOKEN_SECONDS
    ),
    "queue_wait_seconds": Metric("histogram", "what a generation waited for its place, seconds", buckets=_SECONDS),
    "request_seconds": Metric(
        "histogram", "from a request's arrival to the end of its answer, seconds", buckets=_SECONDS
    ),
    "requests": Metric("counter", "requests answered, by HTTP status and name of the API key", ("status", "key")),
    "outcomes": Metric("counter", "choices ended, by the outcome of their completion", ("outcome",)),
    "language_verdicts": Metric(
        "counter",
        "choices with a wish for a language of thinking, by that language and how thinking or answer kept to it",
        ("language", "part", "verdict"),
    ),
    "prompt_tokens": Metric("counter", "tokens of prompts, by name of the API key", ("key",)),
    "generated_tokens": Metric("counter", "tokens generated, those of given-up attempts included", ("key",)),
    "retries": Metric("counter", "further attempts at a choice, by what was wrong with the one before", ("reason",)),
    "rescues": Metric("counter", "choices whose thinking was closed so that an answer came within the budget"),
    "queue_seconds": Metric("gauge", "age of the oldest waiting request, seconds; 0 when none waits"),
    "tokens_in_flight": Metric("gauge", "tokens that running requests may come to take, prompts and budgets"),
    "running": Metric("gauge", "requests that the engine works on"),
    "waiting": Metric("gauge", "requests that wait for a place"),
}
"""what an endpoint measures, by name without the prefix; Prometheus sees `ray_raysoner_serving_…`"""

TUNING = "raysoner_tuning"
"""prefix of a search's metrics; all carry the tags `model`, its name, and `gpu_type` beside their own"""

_TRIAL_SECONDS = (5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0)

TUNING_METRICS: Mapping[str, Metric] = {
    "trials": Metric("counter", "trials ended, by outcome, since the search was last started", ("outcome",)),
    "trial_seconds": Metric("histogram", "what a trial took in all, seconds", buckets=_TRIAL_SECONDS),
    "running_trials": Metric("gauge", "trials that run now"),
    "known_trials": Metric("gauge", "trials in the journal, those of searches before this one among them"),
    "trial_budget": Metric("gauge", "trials after which the search is over"),
    "space_points": Metric("gauge", "points that fit into memory by arithmetic"),
    "best_tokens_per_second": Metric("gauge", "speed of the fastest point measured to its end; none before one is"),
    "best_memory_gib": Metric("gauge", "peak memory of the fastest point on a worker, GiB"),
    "best_held_out_loss": Metric("gauge", "of a search for quality: the last loss of its best candidate, nats"),
}
"""what a search measures on a GPU type, by name without the prefix"""


class Gauges:
    """Gauges of one source, which keep their last value until `close`.

    A thread sets the last values again every `period`; it ends with the process, with Ray, or at `close`, after which
    the gauges vanish within 20 s.

    Args:
        prefix: of the names, such as `TRAINING`; Ray puts `ray_` before it.
        descriptions: of the gauges, with their units, by name without the prefix.
        tags: of all values.
        period: seconds.

    Raises:
        RuntimeError: Ray is not initialised in this process.
    """

    def __init__(
        self, prefix: str, descriptions: Mapping[str, str], tags: Mapping[str, str], period: float = RESEND_SECONDS
    ) -> None:
        import ray
        from ray.util.metrics import Gauge

        if not ray.is_initialized():
            raise RuntimeError(f"{prefix}: metrics go to Ray, which is not initialised here; call ray.init first")
        self._gauges: dict[str, Any] = {
            name: Gauge(f"{prefix}_{name}", description=text, tag_keys=tuple(tags)).set_default_tags(dict(tags))
            for name, text in descriptions.items()
        }
        self._values: dict[str, float] = {}
        self._period = period
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._resend, name=f"{prefix}-gauges", daemon=True)
        self._thread.start()

    def set(self, values: Mapping[str, float | None]) -> None:
        """Set the gauges that `values` names; the others stay as they are.

        A value that is None, NaN or infinite takes its gauge off, within 20 s, rather than leave an old value standing.

        Raises:
            KeyError: a name without a description.
            RuntimeError: the gauges are closed.
        """
        if unknown := values.keys() - self._gauges.keys():
            raise KeyError(f"no gauge is called {sorted(unknown)[0]}")
        if self._closed.is_set():
            raise RuntimeError("these gauges are closed")
        with self._lock:
            for name, value in values.items():
                if value is None or not math.isfinite(value):
                    self._values.pop(name, None)
                else:
                    self._values[name] = float(value)
                    self._gauges[name].set(self._values[name])

    def close(self) -> None:
        """Stop keeping the values; a second call does nothing."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Gauges:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _resend(self) -> None:
        import ray

        while not self._closed.wait(self._period) and ray.is_initialized():
            with self._lock:
                for name, value in self._values.items():
                    self._gauges[name].set(value)


@dataclass
class _Histogram:
    """Values counted by upper bound, the last of them infinity."""

    counts: list[int]
    total: float = 0.0


class Recorder:
    """Counts in memory, and hands everything to Ray every few seconds from a thread of its own, if Ray runs here.

    Counting costs a lock and an addition, whatever Ray does; nothing is sent to Ray from the thread that counts.

    Args:
        prefix: of the names, such as `SERVING`; Ray puts `ray_` before it.
        metrics: by name without the prefix.
        tags: of all values, beside those of each metric.
        gauges: asked for the values of all gauges whenever they are sent.
        period: seconds; less than 20, after which Ray drops a gauge.
    """

    def __init__(
        self,
        prefix: str,
        metrics: Mapping[str, Metric],
        tags: Mapping[str, str] | None = None,
        *,
        gauges: Callable[[], Mapping[str, float]] = dict,
        period: float = RESEND_SECONDS,
    ) -> None:
        self._metrics = metrics
        self._gauges = gauges
        self._lock = threading.Lock()
        self._counts: defaultdict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
        self._histograms: dict[tuple[str, tuple[str, ...]], _Histogram] = {}
        self._sent: dict[str, Any] = {}
        self._pending = _Pending()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._reporting = _ray_runs()
        if self._reporting:
            self._sent = _ray_metrics(prefix, metrics, dict(tags or {}))
            self._thread = threading.Thread(target=self._resend, args=(period,), name=f"{prefix}-metrics", daemon=True)
            self._thread.start()

    def count(self, name: str, amount: float = 1.0, **tags: str) -> None:
        """Add to a counter; nothing happens when `amount` is 0.

        Raises:
            KeyError: no counter has that name, or the tags are not the metric's.
        """
        key = self._key(name, "counter", tags)
        if amount:
            with self._lock:
                self._counts[key] += amount
                if self._reporting:
                    self._pending.counts[key] += amount

    def observe(self, name: str, value: float, **tags: str) -> None:
        """Put a value into a histogram.

        Raises:
            KeyError: no histogram has that name, or the tags are not the metric's.
        """
        key = self._key(name, "histogram", tags)
        buckets = self._metrics[name].buckets
        with self._lock:
            histogram = self._histograms.setdefault(key, _Histogram([0] * (len(buckets) + 1)))
            histogram.counts[bisect_left(buckets, value)] += 1
            histogram.total += value
            if self._reporting:
                self._pending.values.append((key, value))

    def total(self, name: str, **tags: str) -> float:
        """What a counter has come to, or how many values a histogram holds, over all tags that are not given."""
        position = {tag: place for place, tag in enumerate(self._metrics[name].tags)}
        with self._lock:
            counts = {**self._counts, **{key: sum(each.counts) for key, each in self._histograms.items()}}
        return sum(
            value
            for (of, values), value in counts.items()
            if of == name and all(values[position[tag]] == text for tag, text in tags.items())
        )

    def gauges(self) -> Mapping[str, float]:
        """The gauges' values now."""
        return self._gauges()

    def close(self) -> None:
        """Send what is left and end the thread; a second call does nothing."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _key(self, name: str, kind: str, tags: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
        metric = self._metrics.get(name)
        if metric is None or metric.kind != kind:
            raise KeyError(f"no {kind} is called {name}")
        if len(tags) != len(metric.tags):
            raise KeyError(f"{name} has the tags {', '.join(metric.tags) or 'none'}")
        return name, tuple(tags[tag] for tag in metric.tags)

    def _resend(self, period: float) -> None:
        """Body of the thread; ends with Ray, or at `close`."""
        ended = False
        while not ended:
            ended = self._closed.wait(period)
            if not _ray_runs():
                break
            try:
                self._send()
            except Exception:
                _logger.exception("what was counted since the last report did not reach Ray")
        with self._lock:
            self._reporting, self._pending = False, _Pending()

    def _send(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, _Pending()
        for (name, values), amount in pending.counts.items():
            self._sent[name].inc(amount, tags=self._named(name, values))
        for (name, values), value in pending.values:
            self._sent[name].observe(value, tags=self._named(name, values))
        for name, value in self._gauges().items():
            if math.isfinite(value):
                self._sent[name].set(value)

    def _named(self, name: str, values: Sequence[str]) -> dict[str, str]:
        return dict(zip(self._metrics[name].tags, values, strict=True))


@dataclass
class _Pending:
    """What Ray has not been told yet."""

    counts: defaultdict[tuple[str, tuple[str, ...]], float] = field(default_factory=lambda: defaultdict(float))
    values: list[tuple[tuple[str, tuple[str, ...]], float]] = field(default_factory=list)


def _ray_runs() -> bool:
    """Whether this process is part of a Ray; does not import it."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _ray_metrics(prefix: str, metrics: Mapping[str, Metric], tags: dict[str, str]) -> dict[str, Any]:
    from ray.util.metrics import Counter, Gauge, Histogram

    made: dict[str, Any] = {}
    for name, metric in metrics.items():
        keys = (*tags, *metric.tags)
        if metric.kind == "histogram":
            made[name] = Histogram(f"{prefix}_{name}", metric.description, list(metric.buckets), keys)
        else:
            kind = Counter if metric.kind == "counter" else Gauge
            made[name] = kind(f"{prefix}_{name}", metric.description, keys)
        made[name].set_default_tags(tags)
    return made
