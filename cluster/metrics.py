"""Numbers for Prometheus, through `ray.util.metrics`. Needs a running Ray when used, and none to be imported.

Each node's metrics agent serves them at the node's metrics port as `ray_<name>`, with the tags given here beside Ray's
own; `<temp-dir>/prom_metrics_service_discovery.json` of the head tells Prometheus where the agents are.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

RESEND_SECONDS = 5.0
"""Ray's agent drops a gauge 20 s after it was last set, which is less than many a line of a log or step takes"""

TRAINING = "raysoner_training"
"""prefix of the gauges of a training run; their tags are `run`, its name, and `rank`, the worker's in the world"""

TRAINING_METRICS: Mapping[str, str] = {
    "step": "optimizer steps done",
    "loss": "weighted negative log-likelihood of a trained token since the last line of the log, nats",
    "evaluation_loss": "the same on the held-out data, nats",
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
