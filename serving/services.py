"""What stands between the interface and the engine: who may come, who is next, and what is counted."""

from __future__ import annotations

from dataclasses import dataclass

from serving.admission import Admission
from serving.config import ServingConfig
from serving.engines.base import Engine
from serving.keys import Keys
from serving.metrics import ServingMetrics


@dataclass(frozen=True)
class Services:
    """One replica's admission, API keys and metrics."""

    admission: Admission
    keys: Keys
    metrics: ServingMetrics

    @classmethod
    def of(cls, config: ServingConfig, engine: Engine, replica: str) -> Services:
        """Those that a configuration asks for; `replica` is the id that metrics carry.

        Raises:
            ConfigError: the file of API keys cannot be read.
        """
        keys = Keys(config.security.keys)
        admission = Admission.of(
            config, engine, keys=lambda: len(keys), waited=lambda seconds: metrics.queue_wait(seconds)
        )
        metrics = ServingMetrics(config.endpoint.application, replica, admission.gauges)
        return cls(admission, keys, metrics)

    @classmethod
    def local(cls, config: ServingConfig, engine: Engine) -> Services:
        """The same for an endpoint without Ray Serve, as in tests."""
        return cls.of(config, engine, "local")

    def close(self) -> None:
        """Let nobody in any more, and report what was counted."""
        self.admission.close()
        self.metrics.close()
