"""How many micro-batches of a step each worker gets where their GPUs differ in speed.

A step's rows are the same however they are dealt, and its loss is a mean over all its trained tokens, so gradients are
those of one worker with all rows. Workers exchange nothing before their last micro-batch of a step; where they share a
base they do, in each, and must have as many.
"""

from __future__ import annotations

import heapq
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from cluster.hardware import profile_of
from training.agreement import of_all_ranks
from training.arguments import row_multiple
from training.config import TrainingConfig
from training.finder import probe_passes
from training.profile import profiled_tokens_per_second

WARM_PASSES = 2
"""before the one that is timed: the first compiles"""
TIMED_PASSES = 3


def deal(micro_batches: int, seconds: Sequence[float]) -> list[int]:
    """Micro-batches of each worker in a step, with which the slowest ends as early as can be; each has at least one.

    Each goes to the worker that would be done with it first (Horowitz and Sahni 1976, "Exact and approximate algorithms
    for scheduling nonidentical processors": for jobs of one size this is the optimum).

    Args:
        micro_batches: of a step; where they are fewer than the workers, some have one of fillers alone.
        seconds: that each worker takes for one.

    Raises:
        ValueError: a time is not above zero.
    """
    if not all(0 < each < float("inf") for each in seconds):
        raise ValueError(f"seconds must be above zero, not {list(seconds)}")
    shares = [1] * len(seconds)
    ends = [(2 * each, rank) for rank, each in enumerate(seconds)]
    heapq.heapify(ends)
    for _ in range(micro_batches - len(seconds)):
        _, rank = ends[0]
        shares[rank] += 1
        heapq.heapreplace(ends, ((shares[rank] + 1) * seconds[rank], rank))
    return shares


def micro_batches_of(config: TrainingConfig) -> int:
    """Micro-batches of a step over all workers, the least that hold its rows."""
    return -(-config.global_batch_size // config.batch.rows)


def shares_by_speed(config: TrainingConfig, device: torch.device, trainer: Any) -> list[int]:
    """Micro-batches of each worker in a step of the run; every worker must call it, and rank 0 says what it came to.

    What each GPU takes for one is what its tuning profile measured, where each worker's has one for this micro-batch;
    else every worker times real passes now, alone, with no exchange.

    Args:
        config: of the run, whose micro-batch is a number.
        device: of this worker.
        trainer: that the passes are made with; it is left as it was.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU of {socket.gethostname()}"
    gpu = profile_of(name)
    profiled = profiled_tokens_per_second(config, gpu) if gpu else None
    tokens = config.batch.rows * config.data.sequence_length
    own = tokens / profiled[0] if profiled and profiled[1] == "measured" else None
    seconds = of_all_ranks(own)
    source = "by tuning profiles"
    if None in seconds:
        length = -(-config.data.sequence_length // row_multiple(config)) * row_multiple(config)
        seconds = of_all_ranks(timed(lambda: probe_passes(trainer, config.batch.rows, length)))
        source = "by passes timed now"
    names = of_all_ranks(gpu.name if gpu else name)
    shares = deal(micro_batches_of(config), seconds)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"shares    {describe(shares, seconds, names)}, {source}", flush=True)
    return shares


def timed(work: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that `work` takes once it is warm, the least of `TIMED_PASSES`. It returns when its device is done."""
    for _ in range(WARM_PASSES):
        work()
    found = []
    for _ in range(TIMED_PASSES):
        began = clock()
        work()
        found.append(clock() - began)
    return min(found)


def describe(shares: Sequence[int], seconds: Sequence[float], names: Sequence[str]) -> str:
    """Like `6 micro-batches a step to each of 2 × H100 (0.310 s for one), 2 to 1 × L40S (0.910 s for one)`."""
    kinds: dict[tuple[str, int], list[float]] = {}
    for share, each, name in zip(shares, seconds, names, strict=True):
        kinds.setdefault((name, share), []).append(each)
    parts = [
        f"to {'each of ' if len(each) > 1 else ''}{len(each)} × {name} ({sum(each) / len(each):.3f} s for one)"
        for (name, _), each in kinds.items()
    ]
    counts = [share for _, share in kinds]
    first = f"{counts[0]} micro-batches a step {parts[0]}"
    return ", ".join([first, *(f"{count} {part}" for count, part in zip(counts[1:], parts[1:], strict=True))])
