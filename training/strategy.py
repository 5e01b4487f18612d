"""How many workers share one copy of the base: the choice between data parallelism and sharding, by arithmetic.

No torch, no ray. Pure data parallelism moves nothing but the adapters' gradients, so it comes first. Where the base is
too large for it, the workers of a node share one copy (hybrid: gathers stay on the node's links), and where that is not
enough, all workers do. Expert parallelism is never chosen but by name: what it gains hangs on links and on how evenly
the router spreads tokens, of which nothing is known here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Literal

from cluster.config import ConfigError
from cluster.memory import MODES, size, step_gather_bytes, weight_bytes
from cluster.model import Checkpointing, ModelShape
from training.config import TrainingConfig
from training.exchange import step_exchange_bytes
from training.memory import choose_checkpointing, memory_of, needed_bytes, recipe_of, remedies

Name = Literal["data_parallel", "hybrid", "sharded", "expert_parallel"]

MOST_WORKERS = 1024
"""more are not thought of: experts are split no further than one a worker"""


@dataclass(frozen=True)
class Strategy:
    """How a run's workers hold the base."""

    shards: int
    """workers that share one copy of the base's layers, 1 in pure data parallelism; divides their number"""
    checkpointing: Checkpointing
    """what the backward pass computes again"""
    reason: str
    """for a person, with the bytes that decided"""
    expert_workers: int = 1
    """workers that share out each layer's experts, 1 where each has all of them"""


def choose_strategy(
    config: TrainingConfig, shape: ModelShape, workers_per_node: int, memory_bytes: int | None
) -> Strategy:
    """What `workers.strategy` and `batch.activation_checkpointing` come to on a cluster.

    A strategy that is set is taken, with the checkpointing that `choose_checkpointing` finds for it. `auto` is
    data_parallel on a CPU, else the first of data_parallel, hybrid and sharded that fits each worker's GPU with any
    mode of activation checkpointing; where a mode is set and fits in none, the strategy that needs least.

    Args:
        config: of the run.
        shape: of its model.
        workers_per_node: workers that a node runs, the same on each; see `workers_within_a_node` where it is not.
        memory_bytes: of a worker's GPU, as CUDA reports the total, the smallest of all; None without a GPU.

    Raises:
        ConfigError: nothing fits; the nodes' workers do not divide the run's; the run's do not divide the experts that
            they are to share out; or `lora.expert_layers` names a layer that the model lacks.
        ValueError: `auto` on a GPU whose memory is not given.
    """
    asked = config.workers.strategy
    check_experts(config, shape)
    if asked != "auto":
        return _strategy(config, shape, asked, shards_of(config, asked, workers_per_node), memory_bytes, asked=True)
    if config.workers.gpus == 0:
        return _strategy(config, shape, "data_parallel", 1, memory_bytes, asked=False)
    if memory_bytes is None:
        raise ValueError("workers.strategy = auto needs the memory of the GPU")
    offers = list(candidates(config, workers_per_node))
    mode = config.batch.activation_checkpointing
    least: Checkpointing = "full" if mode == "auto" else mode
    for name, shards in offers:
        if needed_bytes(config, shape, least, shards) <= memory_bytes:
            return _strategy(config, shape, name, shards, memory_bytes, asked=False)
    if mode == "auto":
        raise ConfigError(_does_not_fit(config, shape, offers, memory_bytes))
    name, shards = min(offers, key=lambda offer: needed_bytes(config, shape, least, offer[1]))
    return _strategy(config, shape, name, shards, memory_bytes, asked=False)


def workers_within_a_node(workers_of_nodes: Sequence[int]) -> int:
    """The largest size of groups, all alike, that lie within nodes when ranks are dealt to them in their order.

    Ray Train numbers the workers of a node one after the other. Nodes with 4 and 2 workers have groups of 2; with 3 and
    2 each worker is alone.

    Args:
        workers_of_nodes: number of workers on each node, in any order and as often as one likes; none is 0.
    """
    return gcd(*workers_of_nodes)


def shards_of(config: TrainingConfig, name: Name, workers_per_node: int) -> int:
    """Workers that share one copy of the base in the strategy `name`.

    Raises:
        ConfigError: hybrid, and the workers of a node do not divide `workers.count`.
    """
    count = config.workers.count
    if name in ("data_parallel", "expert_parallel"):
        return 1
    if name == "sharded":
        return count
    if count % workers_per_node:
        raise ConfigError(
            f'workers.strategy = "hybrid" has the {workers_per_node} workers of each node share one copy of the base, '
            f"and workers.count = {count} is no multiple of {workers_per_node}: make it one, or set workers.strategy = "
            '"sharded"'
        )
    return workers_per_node


def check_experts(config: TrainingConfig, shape: ModelShape) -> None:
    """Where workers are to share out the experts, see that they can do so evenly.

    Raises:
        ConfigError: they cannot.
    """
    count, experts = config.expert_workers, shape.num_local_experts
    if experts % count:
        fitting = ", ".join(str(number) for number in range(2, experts + 1) if experts % number == 0)
        raise ConfigError(
            f'workers.strategy = "expert_parallel" gives each of the {count} workers as many of the {experts} experts '
            f"of {config.model.path}: set workers.count to one of {fitting}, or another strategy"
        )


def candidates(config: TrainingConfig, workers_per_node: int) -> Iterator[tuple[Name, int]]:
    """What `auto` chooses from, in its order, with the number of shards of each."""
    count = config.workers.count
    yield "data_parallel", 1
    if not config.can_shard:
        return
    if 1 < workers_per_node < count and count % workers_per_node == 0:
        yield "hybrid", workers_per_node
    if count > 1:
        yield "sharded", count


def describe(config: TrainingConfig, shape: ModelShape, shards: int) -> str:
    """What a worker holds of the base, and what it gathers or receives in a step."""
    recipe = recipe_of(config, shape, "full", shards)
    held = size(weight_bytes(shape, recipe))
    if (workers := config.expert_workers) > 1:
        experts = shape.num_local_experts
        moved = {
            mode: size(step_exchange_bytes(shape, recipe_of(config, shape, mode), workers, config.accumulation))
            for mode in MODES
        }
        own = size(memory_of(config, shape, "full").weights)
        return (
            f"a worker holds {own} of the base's {held}, {experts // workers} of each layer's {experts} experts and "
            f"their adapters, and receives {moved['none']} of routed tokens a step where routing is even, "
            f"{moved['full']} where layers are recomputed"
        )
    if shards == 1:
        return f"a worker holds the whole base, {held}"
    gathered = size(step_gather_bytes(shape, recipe, config.accumulation))
    whole = size(weight_bytes(shape, recipe_of(config, shape, "full")))
    return f"a worker holds {held} of the base's {whole} and gathers {gathered} a step"


def _strategy(
    config: TrainingConfig, shape: ModelShape, name: Name, shards: int, memory_bytes: int | None, *, asked: bool
) -> Strategy:
    checkpointing, why = choose_checkpointing(config, shape, memory_bytes, shards)
    source = "as workers.strategy says" if asked else _why_auto(config, shape, shards, memory_bytes)
    sharing = max(shards, config.expert_workers)
    over = f" over {sharing} workers" if sharing > 1 else ""
    reason = f"{name}{over}: {source}; {describe(config, shape, shards)}; activation checkpointing {why}"
    return Strategy(shards, checkpointing, reason, config.expert_workers)


def _why_auto(config: TrainingConfig, shape: ModelShape, shards: int, memory_bytes: int | None) -> str:
    if memory_bytes is None:
        return "auto, there is no GPU to fit"
    mode = config.batch.activation_checkpointing
    least: Checkpointing = "full" if mode == "auto" else mode
    if needed_bytes(config, shape, least, shards) > memory_bytes:
        return "auto, it needs least and nothing fits"
    if shards == 1:
        return "auto, it fits"
    needed = size(needed_bytes(config, shape, least))
    return f'auto, for data_parallel needs {needed} with "{least}" and the GPU has {size(memory_bytes)}'


def _does_not_fit(config: TrainingConfig, shape: ModelShape, offers: list[tuple[Name, int]], memory_bytes: int) -> str:
    """The sentence: what each strategy needs, and how many GPUs or which settings would do."""
    needs = [
        size(needed_bytes(config, shape, "full", shards))
        + (f" as {name} over {shards}" if shards > 1 else f" as {name}")
        for name, shards in offers
    ]
    count = enough_workers(config, shape, memory_bytes) if config.can_shard else None
    settings, enough = remedies(config, shape, memory_bytes, offers[-1][1])
    ways = [f'workers.count = {count} with workers.strategy = "sharded"'] if count else []
    ways += [f"{setting} ({size(needed)})" for setting, needed in settings.items() if enough]
    return (
        f"{config.model.path} needs {' or '.join(needs)} on each worker even with activation_checkpointing = "
        f'"full", and the GPU has {size(memory_bytes)}; '
        + (f"{count} such GPUs would be enough: " if count else "no number of such GPUs would be enough: ")
        + (f"set {' or '.join(ways)}, or " if ways else "")
        + "use a GPU with more memory"
    )


def enough_workers(config: TrainingConfig, shape: ModelShape, memory_bytes: int) -> int | None:
    """The least number of workers over which the base can be sharded to fit, with "full"; None if none is."""
    for count in range(2, MOST_WORKERS + 1):
        workers = config.workers.model_copy(update={"count": count})
        if needed_bytes(config.model_copy(update={"workers": workers}), shape, "full", count) <= memory_bytes:
            return count
    return None
