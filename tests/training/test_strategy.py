"""The choice of strategy: what is set is taken, auto takes the first that fits, and what is missing is said."""

from __future__ import annotations

import re

import pytest
from pydantic import ValidationError

from cluster.config import ConfigError
from cluster.hardware import GIB
from cluster.memory import MODES
from cluster.model import GPT_OSS_20B, GPT_OSS_120B
from tests.training.test_memory import configured, gpu
from training.config import TrainingConfig
from training.memory import needed_bytes
from training.strategy import choose_strategy, enough_workers, workers_within_a_node


def over(count: int, **fields: object) -> TrainingConfig:
    return configured(workers__count=count, **fields)


@pytest.mark.parametrize(
    ("strategy", "shards"), [("data_parallel", 1), ("hybrid", 4), ("sharded", 8)], ids=lambda value: str(value)
)
def test_a_strategy_that_is_set_is_taken(strategy: str, shards: int) -> None:
    config = over(8, workers__strategy=strategy)
    chosen = choose_strategy(config, GPT_OSS_20B, 4, gpu("H100"))
    assert chosen.shards == shards
    assert chosen.checkpointing == "none"
    assert chosen.reason.startswith(strategy + (f" over {shards} workers" if shards > 1 else ""))
    assert "as workers.strategy says" in chosen.reason
    on_cpu = choose_strategy(over(8, workers__strategy=strategy, workers__gpus=0), GPT_OSS_20B, 4, None)
    assert (on_cpu.shards, on_cpu.checkpointing) == (shards, "none")


def test_hybrid_needs_whole_nodes() -> None:
    with pytest.raises(ConfigError, match=r"workers\.count = 6 is no multiple of 4: make it one, or set") as caught:
        choose_strategy(over(6, workers__strategy="hybrid"), GPT_OSS_20B, 4, gpu("H100"))
    assert "\n" not in str(caught.value)


def test_auto_is_data_parallel_where_that_fits() -> None:
    chosen = choose_strategy(over(8), GPT_OSS_20B, 4, gpu("RTX-4090"))
    assert (chosen.shards, chosen.checkpointing) == (1, "full")
    assert chosen.reason.startswith("data_parallel: auto, it fits; a worker holds the whole base, 12.8 GiB; ")


def test_auto_is_data_parallel_on_a_cpu() -> None:
    chosen = choose_strategy(over(8, workers__gpus=0), GPT_OSS_120B, 8, None)
    assert (chosen.shards, chosen.checkpointing) == (1, "none")


@pytest.mark.parametrize(
    ("count", "per_node", "name", "shards"),
    [(8, 4, "hybrid", 4), (8, 8, "sharded", 8), (8, 1, "sharded", 8), (8, 3, "sharded", 8), (2, 2, "sharded", 2)],
)
def test_auto_shards_within_a_node_before_over_all(count: int, per_node: int, name: str, shards: int) -> None:
    """gpt-oss-120b needs 83 GiB in data parallelism, and an H100 has 79."""
    chosen = choose_strategy(over(count), GPT_OSS_120B, per_node, gpu("H100"))
    assert chosen.shards == shards
    assert re.match(
        rf'{name} over {shards} workers: auto, for data_parallel needs 83\.1 GiB with "full" and the GPU has 79\.1 '
        r"GiB; a worker holds [\d.]+ GiB of the base's 60\.8 GiB and gathers [\d.]+ GiB a step; activation "
        r"checkpointing ",
        chosen.reason,
    )


@pytest.mark.parametrize(
    ("nodes", "within"), [((8, 8), 8), ((4, 2, 4), 2), ((3, 2), 1), ((6, 4), 2), ((1,), 1), ((5, 5, 5), 5)]
)
def test_groups_lie_within_nodes(nodes: tuple[int, ...], within: int) -> None:
    """Ranks are dealt to nodes in their order, and to groups in theirs."""
    assert workers_within_a_node(nodes) == within
    places = [node for node, count in enumerate(nodes) for _ in range(count)]
    groups = [places[first : first + within] for first in range(0, len(places), within)]
    assert all(len(set(group)) == 1 for group in groups)


def test_auto_shards_over_all_where_a_node_is_not_enough() -> None:
    chosen = choose_strategy(over(8), GPT_OSS_120B, 2, gpu("A100-40G"))
    assert (chosen.shards, chosen.checkpointing) == (8, "full")


@pytest.mark.parametrize("mode", MODES)
def test_the_first_fit_is_exact(mode: str) -> None:
    """One byte less than data_parallel needs with "full" makes it hybrid, whatever mode that allows."""
    config = over(4)
    needed = needed_bytes(config, GPT_OSS_120B, "full")
    assert choose_strategy(config, GPT_OSS_120B, 2, needed).shards == 1
    assert choose_strategy(config, GPT_OSS_120B, 2, needed - 1).shards == 2
    fits_two = needed_bytes(config, GPT_OSS_120B, mode, 2)  # type: ignore[arg-type]
    if fits_two < needed:
        assert choose_strategy(config, GPT_OSS_120B, 2, fits_two).checkpointing == mode


def test_a_mode_that_is_set_decides_what_fits() -> None:
    config = over(4, batch__activation_checkpointing="none")
    chosen = choose_strategy(config, GPT_OSS_120B, 2, gpu("H100"))
    assert (chosen.shards, chosen.checkpointing) == (4, "none")
    crammed = choose_strategy(config, GPT_OSS_120B, 2, gpu("RTX-4090"))
    assert (crammed.shards, crammed.checkpointing) == (4, "none")
    assert "it needs least and nothing fits" in crammed.reason
    assert "which does not fit by arithmetic" in crammed.reason


@pytest.mark.parametrize(("name", "enough"), [("A100-40G", 5), ("L40S", 4)])
def test_what_is_missing_is_said(name: str, enough: int) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_strategy(over(2), GPT_OSS_120B, 1, gpu(name))
    message = str(caught.value)
    assert message == (
        "openai/gpt-oss-20b needs 83.1 GiB as data_parallel or 57.2 GiB as sharded over 2 on each worker even with "
        f'activation_checkpointing = "full", and the GPU has {gpu(name) / GIB:.1f} GiB; {enough} such GPUs would be '
        f'enough: set workers.count = {enough} with workers.strategy = "sharded", or use a GPU with more memory'
    )
    fixed = choose_strategy(over(enough, workers__strategy="sharded"), GPT_OSS_120B, 1, gpu(name))
    assert "does not fit" not in fixed.reason
    with pytest.raises(ConfigError):
        choose_strategy(over(enough - 1, workers__strategy="sharded"), GPT_OSS_120B, 1, gpu(name))


def test_adapters_that_do_not_fit_are_not_sharded_away() -> None:
    with pytest.raises(ConfigError, match=r"no number of such GPUs would be enough: use a GPU with more memory$"):
        choose_strategy(over(64), GPT_OSS_120B, 8, gpu("RTX-4090"))
    assert enough_workers(over(1), GPT_OSS_120B, gpu("RTX-4090")) is None


def test_one_worker_is_told_of_more_and_of_less() -> None:
    with pytest.raises(ConfigError) as caught:
        choose_strategy(over(1), GPT_OSS_120B, 1, gpu("H100"))
    assert '; 2 such GPUs would be enough: set workers.count = 2 with workers.strategy = "sharded" or ' in str(
        caught.value
    )
    assert "batch.micro_batch_size = 1 (78.1 GiB)" in str(caught.value)


def test_experts_of_transformers_are_never_sharded_by_auto() -> None:
    config = over(8, model__base_precision="bf16", model__experts="grouped_mm")
    with pytest.raises(ConfigError, match="as data_parallel on each worker"):
        choose_strategy(config, GPT_OSS_20B, 8, gpu("L40S"))


def test_auto_on_a_gpu_asks_for_its_memory() -> None:
    with pytest.raises(ValueError, match="needs the memory of the GPU"):
        choose_strategy(over(2), GPT_OSS_20B, 2, None)


@pytest.mark.parametrize("strategy", ["sharded", "hybrid"])
@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model__base_precision": "bf16", "model__experts": "grouped_mm"}, "set it so and model.kernels = false, or"),
        (
            {"model__base_precision": "bf16", "model__kernels": True, "lora__expert_layers": ()},
            'or workers.strategy = "data_parallel"',
        ),
        ({"batch__activation_offload": True}, "set it to false"),
    ],
)
def test_what_cannot_be_sharded_is_refused_at_once(strategy: str, fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(f'workers.strategy = "{strategy}"')) as caught:
        over(4, workers__strategy=strategy, **fields)
    assert sentence in str(caught.value)
