"""What a run waits for while the cluster has too little: said in one sentence, and ended by a limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import ray
from ray.autoscaler.sdk import request_resources

from cluster.config import ConfigError
from training.config import TrainingConfig

LOOK_SECONDS = 2.0
SAID_SECONDS = 30.0
"""without workers, from which on the log says what the run waits for, and says it again"""

T = TypeVar("T")


def await_cluster(
    seconds: float | None, each: Mapping[str, float], workers: int, look: Callable[[], T], wait: Any = time.sleep
) -> T:
    """What `look` returns, once the cluster has what the run needs.

    Meanwhile an autoscaler, where there is one, is asked for `workers` times `each`.

    Args:
        seconds: to wait at most; None for not at all.
        each: that a worker needs of Ray's resources.
        workers: of the run.
        look: raises ConfigError while something is missing.
        wait: for so many seconds.

    Raises:
        ConfigError: as `look` at last.
    """
    began, said = time.monotonic(), None
    while True:
        try:
            found = look()
        except ConfigError as error:
            if seconds is None:
                raise
            if time.monotonic() - began >= seconds:
                raise ConfigError(f"{error} (after {seconds:g} s of waiting, workers.wait_seconds)") from None
            if said is None:
                request_resources(bundles=[dict(each)] * workers)
            if said is None or time.monotonic() - said >= SAID_SECONDS:
                said = time.monotonic()
                print(f"waiting   up to {seconds:g} s, for {error}", flush=True)
            wait(min(LOOK_SECONDS, seconds))
        else:
            if said is not None:
                request_resources(bundles=[])  # from now on Ray Train asks
            return found


class Watch:
    """Looks at a run that has begun: whether it has workers, and else what they wait for.

    Args:
        config: of the run.
        each: that a worker needs of Ray's resources.
        request: the actor that knows.
    """

    def __init__(self, config: TrainingConfig, each: Mapping[str, float], request: Any) -> None:
        self.config, self.each, self.request = config, each, request
        self._began = self._looked = self._said = time.monotonic()

    def __call__(self) -> None:
        """Say what the run waits for, if it has no workers for a while.

        Raises:
            ConfigError: for longer than `workers.wait_seconds`.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        idle: float | None = ray.get(self.request.idle_seconds.remote())
        limit = self.config.workers.wait_seconds
        if idle is None:
            self._said = now
            return
        idle = min(idle, now - self._began)
        if limit is not None and idle >= limit:
            raise ConfigError(
                f"{self._sentence()}, and after {idle:.0f} s without workers the run ends, as workers.wait_seconds = "
                f"{limit:g} says; the same command goes on from the newest checkpoint once there is room"
            )
        if now - self._said >= SAID_SECONDS:
            self._said = now
            print(f"waiting   {self._sentence()}", flush=True)

    def _sentence(self) -> str:
        return describe_wait(self.config, self.each, ray.cluster_resources(), ray.available_resources())


def describe_wait(
    config: TrainingConfig, each: Mapping[str, float], total: Mapping[str, float], free: Mapping[str, float]
) -> str:
    """Like `4 workers with 1 CPU, 1 GPU each wait for 4 GPU, of which the cluster has 4, and 1 free`."""
    count = config.least_workers
    asked = ", ".join(f"{amount:g} {kind}" for kind, amount in each.items() if amount)
    short = [kind for kind, amount in each.items() if amount * count > free.get(kind, 0.0) + 1e-6]
    waits = " and ".join(
        f"{each[kind] * count:g} {kind}, of which the cluster has {total.get(kind, 0):g}, and {free.get(kind, 0):g} "
        "free"
        for kind in short
    )
    return f"{count} workers with {asked} each wait for {waits or 'nodes that each have room for one'}"
