"""What the plan says about memory; its counts are tested with the driver."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.config import load_files
from cluster.memory import MODES, size, step_gather_bytes
from cluster.model import GPT_OSS_20B
from tests.conftest import DEMO
from training.config import TrainingConfig
from training.memory import memory_of, needed_bytes, recipe_of
from training.plan import Plan, make_plan


def plan(
    *, gpus: int, checkpointing: str = "auto", base_precision: str = "mxfp4", count: int = 1, strategy: str = "auto"
) -> tuple[TrainingConfig, list[str]]:
    """A run's configuration, and the lines on model and memory of its plan if gpt-oss-20b lay in a folder."""
    config = TrainingConfig.model_validate(
        {
            "model": {"path": "openai/gpt-oss-20b", "base_precision": base_precision},
            "batch": {"activation_checkpointing": checkpointing},
            "workers": {"gpus": gpus, "count": count, "strategy": strategy},
        }
    )
    lines = str(Plan(config, None, None, None, GPT_OSS_20B, 1)).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("model"))
    return config, lines[start : start + 4]


def test_auto_on_a_gpu_shows_every_mode_and_no_verdict() -> None:
    config, (model, memory, parts, _) = plan(gpus=1)
    assert "20,914.8 M parameters, 3,608.3 M active" in model
    assert model.endswith("experts in mxfp4, the rest in bf16")
    needs = [f"{size(needed_bytes(config, GPT_OSS_20B, mode))} with {mode}" for mode in MODES]
    assert memory == (
        f"memory    a worker needs {', '.join(needs)}: activation_checkpointing auto takes the first that its GPU has"
    )
    assert parts.strip() == f"with none: {memory_of(config, GPT_OSS_20B, 'none')}"
    assert "weights 12.8 GiB" in parts


@pytest.mark.parametrize(("gpus", "checkpointing", "mode"), [(1, "full", "full"), (0, "auto", "none")])
def test_a_mode_that_is_known_is_the_only_one(gpus: int, checkpointing: str, mode: str) -> None:
    config, (_, memory, parts, _) = plan(gpus=gpus, checkpointing=checkpointing)
    need = size(needed_bytes(config, GPT_OSS_20B, mode))  # type: ignore[arg-type]
    assert memory == f"memory    a worker needs {need} for model and step, with a margin of 6%"
    assert parts.strip().startswith(f"with {mode}: weights 12.8 GiB")


def test_a_dense_base_is_weighed_as_one() -> None:
    _, (model, _, parts, _) = plan(gpus=1, base_precision="bf16")
    assert model.endswith("experts in bf16, the rest in bf16")
    assert "weights 39.0 GiB" in parts


def test_a_hub_model_that_is_not_here_is_not_weighed() -> None:
    text = str(replace(make_plan(load_files(TrainingConfig, DEMO)), shape=None))
    assert "fetched from the hub by the workers" in text
    assert "memory" not in text


def test_the_demo_is_weighed() -> None:
    assert "experts in mxfp4, the rest in fp32" in (text := str(make_plan(load_files(TrainingConfig, DEMO))))
    assert "\nmemory    a worker needs " in text


def test_one_worker_holds_the_whole_base() -> None:
    _, (*_, strategy) = plan(gpus=1)
    assert strategy == "strategy  data_parallel, as auto is with one worker: a worker holds the whole base, 12.8 GiB"


def test_workers_without_gpus_hold_the_whole_base() -> None:
    _, (*_, strategy) = plan(gpus=0, count=4)
    assert strategy.startswith("strategy  data_parallel, as auto is on a CPU: a worker holds the whole base")


def test_auto_over_gpus_shows_what_each_strategy_needs() -> None:
    config, (_, memory, _, strategy) = plan(gpus=1, count=6)
    assert memory.startswith("memory    a worker with the whole base needs ")
    needs = [f"{size(needed_bytes(config, GPT_OSS_20B, 'full'))} with the whole base"]
    for shards in (2, 3, 6):
        gathered = step_gather_bytes(GPT_OSS_20B, recipe_of(config, GPT_OSS_20B, "full", shards), 4)
        needed = size(needed_bytes(config, GPT_OSS_20B, "full", shards))
        needs.append(f"{needed} with one shared by {shards} ({size(gathered)} gathered a step)")
    assert strategy.startswith(f"strategy  with full a worker needs {', '.join(needs)}: auto takes the first ")


def test_hybrid_depends_on_the_nodes() -> None:
    _, (*_, strategy) = plan(gpus=1, count=4, strategy="hybrid")
    assert "with the whole base" not in strategy
    assert "shared by 2" in strategy
    assert strategy.endswith(": hybrid shares it among the workers of a node")


@pytest.mark.parametrize("gpus", [0, 1])
def test_sharded_over_all_is_known(gpus: int) -> None:
    config, (_, memory, parts, strategy) = plan(gpus=gpus, count=4, strategy="sharded", checkpointing="full")
    assert memory.startswith(f"memory    a worker needs {size(needed_bytes(config, GPT_OSS_20B, 'full', 4))} for model")
    assert "weights 4.8 GiB, gathered layers 1.3 GiB, " in parts
    gathered = step_gather_bytes(GPT_OSS_20B, recipe_of(config, GPT_OSS_20B, "full", 4), 4)
    assert strategy == (
        "strategy  sharded over 4 workers: a worker holds 4.8 GiB of the base's 12.8 GiB and gathers "
        f"{size(gathered)} a step"
    )
