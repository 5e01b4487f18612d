"""How fast a run trains and what it waits for: tokens a second, MFU, data wait, memory, and the experts' load.

Each line of the log has the figures of the steps since the line before it, so what is compiled in a run's first step
weighs on its first line alone.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch

from cluster.hardware import profile_of
from cluster.model import ModelShape
from training.config import TrainingConfig
from training.data.documents import Counts
from training.memory import adapted_expert_layers
from training.modeling.expert_load import EXPERT_LOAD

Batch = TypeVar("Batch")


class Meter:
    """Figures of the steps since the last line of the log.

    Training time is wall time without what lies in `paused`, as evaluations and checkpoints should. Every worker has a
    meter of its own, and all call `figures` together.

    Args:
        device: that this worker trains on.
        flops_per_token: floating-point operations that a trained token cannot do without; see `flops_per_token`.
        peak_flops: of all workers' devices together, a second; see `peak_flops`. None leaves MFU out.
        clock: seconds.
    """

    def __init__(
        self,
        device: torch.device,
        flops_per_token: float,
        peak_flops: float | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.device = device
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops
        self.clock = clock
        self.training_seconds = 0.0
        """up to the last line, since `start`; the same on all workers"""
        self.own: dict[str, float] = {}
        """`memory_gib` and `data_wait` of this worker alone, up to the last line"""
        self.forward_seconds: list[float] = []
        """of each worker in a step, the mean over those up to the last line; what it computes alone"""
        self._since: float | None = None
        self._step = 0
        self._tokens = 0.0
        self._pausing = False
        self._paused = 0.0
        self._waited = 0.0
        self._gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._computed = 0.0
        self._passes: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, step: int) -> None:
        """Training begins, or goes on, after `step` optimizer steps."""
        self._step, self.training_seconds = step, 0.0
        self._begin_line()
        EXPERT_LOAD.start()

    def stop(self) -> None:
        """Training is over; the experts' load is no longer looked at."""
        EXPERT_LOAD.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within is no training: its time does not count, nor where its tokens go. May be nested."""
        if self._pausing:
            yield
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the steps so far are training
        began, self._pausing = self.clock(), True
        try:
            with EXPERT_LOAD.paused():
                yield
        finally:
            self._paused += self.clock() - began
            self._pausing = False

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; what the training waits for each of them counts as data wait.

        On a GPU only the time counts in which the device has nothing left to do: the next batch is made while it still
        computes. CUDA events on the device's own timeline tell, and nothing is waited for.
        """
        while True:
            with self._waiting():
                try:
                    batch = next(batches)
                except StopIteration:
                    return
            yield batch

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A forward pass happens within, in which no worker waits for another unless they share the base."""
        if self.device.type == "cuda":
            begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            yield
            done.record()
            self._passes.append((begun, done))
        else:
            began = self.clock()
            yield
            self._computed += self.clock() - began

    def figures(self, tokens: float, step: int) -> dict[str, float]:
        """Figures since the last call, or since `start`, the same on all workers; then the next line begins.

        `tokens_per_second` (of all workers), `step_seconds`, `mfu` (0 to 1), `memory_gib` and `data_wait` (0 to 1; both
        of the worker where they are largest), `expert_load_max` and `experts_idle` (see `ExpertLoad.take`). What is not
        known is left out. A collective call wherever there is more than one worker. Empty if no step was done.

        Args:
            tokens: of documents that went through the model since the last call, padding left out, over all workers.
            step: optimizer steps done in the run.

        Raises:
            RuntimeError: the meter was not started.
        """
        if self._since is None:
            raise RuntimeError("Meter.figures was called before Meter.start")
        self._tokens += tokens
        steps, self._step = step - self._step, step
        if steps == 0:
            return {}
        load = EXPERT_LOAD.take()
        seconds = self.clock() - self._since - self._paused
        self.own = {"memory_gib": memory_gib(self.device), "data_wait": self._take_waited() / seconds}
        loads = (load.get(name, math.nan) for name in ("expert_load_max", "experts_idle"))
        shared = self._of_all([seconds, *self.own.values(), *loads, self._take_computed() / steps])
        seconds, memory, data_wait = shared[:, :3].amax(0).tolist()
        load_max, idle = shared[:, 3:5].mean(0).tolist()
        self.forward_seconds = shared[:, 5].tolist()
        speed = self._tokens / seconds
        self.training_seconds += seconds
        self._begin_line()
        found = {
            "tokens_per_second": speed,
            "step_seconds": seconds / steps,
            "mfu": speed * self.flops_per_token / self.peak_flops if self.peak_flops else math.nan,
            "memory_gib": memory,
            "data_wait": data_wait,
            "expert_load_max": load_max,
            "experts_idle": idle,
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def _begin_line(self) -> None:
        self._since, self._tokens, self._paused = self.clock(), 0.0, 0.0
        self._waited, self._gaps = 0.0, []
        self._computed, self._passes = 0.0, []

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        if self.device.type == "cuda":
            idle, busy = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            idle.record()
            yield
            busy.record()
            self._gaps.append((idle, busy))
        else:
            began = self.clock()
            yield
            self._waited += self.clock() - began

    def _take_waited(self) -> float:
        """Seconds since the last line in which there was nothing to do but wait for data."""
        for idle, busy in self._gaps:
            busy.synchronize()  # long done: later steps' losses are known
            self._waited += idle.elapsed_time(busy) / 1000
        return self._waited

    def _take_computed(self) -> float:
        """Seconds of forward passes since the last line."""
        for begun, done in self._passes:
            done.synchronize()
            self._computed += begun.elapsed_time(done) / 1000
        return self._computed

    def _of_all(self, own: list[float]) -> torch.Tensor:
        """Values [W, n] of all W workers."""
        values = torch.tensor(own, dtype=torch.float64)
        if not torch.distributed.is_initialized():
            return values[None]
        values = values.to(self.device)
        everyone = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(everyone, values)
        return torch.stack(everyone).cpu()


def flops_per_token(config: TrainingConfig, shape: ModelShape, counts: Mapping[str, int]) -> float:
    """Floating-point operations a token of the run, by `ModelShape.flops_per_token`.

    Args:
        config: of the run.
        shape: of its model.
        counts: of the prepared training data, as `Prepared` keeps them.
    """
    channels = config.data.loss_weights
    return shape.flops_per_token(
        rank=config.lora.rank,
        attention=config.lora.attention,
        expert_layers=adapted_expert_layers(config, shape),
        document_tokens=round(counts["tokens"] / counts["documents"]),
        trained_share=Counts(counts).trained(name for name in channels if channels[name]) / counts["tokens"],
    )


def peak_flops(device: torch.device, workers: int) -> float | None:
    """What the GPUs of `workers` such workers could do in bf16, a second; None on a CPU or a GPU without a profile."""
    if device.type != "cuda":
        return None
    profile = profile_of(torch.cuda.get_device_name(device))
    return profile.bf16_flops * workers if profile else None


def memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: what was allocated on its GPU, or what it held itself on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
