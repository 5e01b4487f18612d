"""Predictions of plans against every training step that was measured on GPUs and kept in the repository.

The shares in `cluster.step_time` and `cluster.scaling` come from these very steps, so this says that one set of shares
describes all of them, not that it describes others.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.hardware import GpuProfile, profile_of
from cluster.memory import Recipe, step_gather_bytes, training_memory
from cluster.model import GPT_OSS_20B, GPT_OSS_120B, ModelShape
from cluster.scaling import Layout, Links, Work, predict
from cluster.step_time import MEASURED, PREDICTED_WITHIN, Kernels, measured_step, step_seconds

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
OURS = ("train_step*-gpt-oss-*-h100.json", "scaling-gpt-oss-*-2xh200.json", "distributed-gpt-oss-*-h200.json")
RIVALS = {"seed": (3, Kernels(compiled=False, eager_experts=True)), "transformers-peft": (24, Kernels(compiled=False))}
"""recipes that a plan does not offer and a search may: layers whose experts PEFT merges, and how they are run"""

MEMORY_OVER, MEMORY_UNDER = 0.12, 0.01
"""predicted memory may be more than measured, but not less: the caller's margin is not for the arithmetic's errors"""
EFFICIENCY_WITHIN = 0.05
"""absolute, of many GPUs' from one GPU's measured step"""


@dataclass(frozen=True)
class Measured:
    """A row of a result."""

    name: str
    profile: GpuProfile
    shape: ModelShape
    recipe: Recipe
    document_tokens: int
    row: dict[str, Any]

    @property
    def memory_gb(self) -> float:
        peak = self.row["peak_memory_gb"]
        return float(max(peak) if isinstance(peak, list) else peak)


def read(rivals: bool = False) -> list[Measured]:
    """Every step on a GPU, of ours or of the rivals."""
    found = []
    for path in sorted({path for pattern in OURS for path in RESULTS.glob(pattern)}):
        result = json.loads(path.read_text())
        profile = profile_of(result["device"])
        assert profile is not None, path
        shape = GPT_OSS_120B if "120b" in path.name else GPT_OSS_20B
        for row in result["rows"]:
            steps = {row["name"]: row, **row.get("variants", {})}
            for name, step in steps.items():
                if "peak_memory_gb" in step and (name in RIVALS) is rivals:
                    found.append(_measured(f"{path.name}:{name}", profile, shape, step, result["command"]))
    return found


def _measured(name: str, profile: GpuProfile, shape: ModelShape, row: dict[str, Any], command: str) -> Measured:
    workers, length = row.get("workers", 1), row["sequence_length"]
    words = command.split()
    chunk = int(words[words.index("--chunk-tokens") + 1]) if "--chunk-tokens" in words else 2048
    recipe = Recipe(
        base_precision=row.get("base_precision", "mxfp4"),
        precision="bf16",
        rank=8,
        trainable_parameters=row.get("trainable_parameters", shape.lora_parameters(8, True, shape.num_hidden_layers)),
        rows=row["micro_batch_size"],
        sequence_length=length,
        checkpointing=row.get("activation_checkpointing", "none"),
        chunk_tokens=chunk,
        workers=workers,
        shards=workers if "sharded" in name and workers > 1 else 1,
    )
    return Measured(name, profile, shape, recipe, length if "--one-document" in words else length // 3, row)


STEPS = read()
IDS = [step.name for step in STEPS]


def predicted(measured: Measured, one_gpu_seconds: float) -> Any:
    """Of a step over NVLink."""
    work = Work(measured.shape, measured.recipe, 1, one_gpu_seconds, measured.profile.bandwidth_bytes_per_second)
    layout = Layout(measured.recipe.workers, 8, measured.recipe.shards)
    return predict(work, layout, Links.of(measured.profile, 400))


def test_all_results_are_read() -> None:
    assert len(STEPS) == 15
    assert {step.recipe.shards for step in STEPS} == {1, 2}
    assert {step.recipe.base_precision for step in STEPS} == {"mxfp4", "bf16"}


@pytest.mark.parametrize("step", STEPS, ids=IDS)
def test_seconds_by_arithmetic_alone(step: Measured) -> None:
    one_gpu = step_seconds(step.shape, step.recipe, step.profile, step.document_tokens)
    assert predicted(step, one_gpu).step_seconds == pytest.approx(step.row["step_seconds"], rel=PREDICTED_WITHIN)


@pytest.mark.parametrize("step", read(rivals=True), ids=lambda step: step.name)
def test_seconds_of_rival_recipes(step: Measured) -> None:
    """transformers' kernels and stock PEFT on bf16 weights, one document a row."""
    name = step.name.rpartition(":")[2]
    merged, kernels = RIVALS[name]
    recipe = replace(
        step.recipe, base_precision="bf16", merged_expert_layers=merged, eager_attention=kernels.eager_experts
    )
    seconds = step_seconds(step.shape, recipe, step.profile, recipe.sequence_length, kernels=kernels)
    assert seconds == pytest.approx(step.row["step_seconds"], rel=PREDICTED_WITHIN)


def test_seconds_of_a_step_between_checkpoints() -> None:
    """Eight rows of 2048 tokens, as `tests.benchmarks.distributed` has them unless it is told otherwise."""
    result = json.loads((RESULTS / "distributed-gpt-oss-20b-h100.json").read_text())
    profile, row = profile_of(result["device"]), result["rows"][1]
    assert profile is not None
    assert not {"--micro-batch-size", "--sequence-length", "--checkpointing"} & set(result["command"].split())
    like = next(step for step in STEPS if step.name == "train_step-gpt-oss-20b-h100.json:raysoner")
    seconds = step_seconds(GPT_OSS_20B, like.recipe, profile, like.document_tokens)
    assert seconds == pytest.approx(row["step_seconds"], rel=PREDICTED_WITHIN)


@pytest.mark.parametrize("step", STEPS, ids=IDS)
def test_memory(step: Measured) -> None:
    found = training_memory(step.shape, step.recipe).total / 1e9
    assert step.memory_gb * (1 - MEMORY_UNDER) <= found <= step.memory_gb * (1 + MEMORY_OVER)


def test_efficiency_from_a_measured_step() -> None:
    compared = [step for step in STEPS if "efficiency" in step.row and step.recipe.base_precision == "mxfp4"]
    assert len(compared) == 2
    for step in compared:
        one_gpu = measured_step(step.profile, step.shape, step.recipe)
        assert one_gpu is not None
        found = predicted(step, one_gpu.step_seconds)
        assert found.efficiency == pytest.approx(step.row["efficiency"], abs=EFFICIENCY_WITHIN)


def test_bytes_that_are_gathered() -> None:
    sharded = [step for step in STEPS if "gathered_gb" in step.row]
    assert len(sharded) == 5
    for step in sharded:
        found = step_gather_bytes(step.shape, step.recipe, 1) / 1e9
        assert found == pytest.approx(step.row["gathered_gb"], rel=1e-4)


@pytest.mark.parametrize("figure", MEASURED, ids=lambda figure: figure.source)
def test_shipped_figures_are_those_of_the_results(figure: Any) -> None:
    step = next(step for step in STEPS if step.name == figure.source)
    assert (figure.step_seconds, figure.memory_gb) == (step.row["step_seconds"], step.memory_gb)
    assert (figure.gpu, figure.shape) == (step.profile.name, step.shape)
    assert measured_step(step.profile, step.shape, step.recipe) == figure
    assert measured_step(step.profile, step.shape, replace(step.recipe, rank=16)) is None
