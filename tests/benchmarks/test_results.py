"""The kept results of training steps: the memory arithmetic holds against each, and the README repeats them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.memory import Recipe, training_memory
from cluster.model import GPT_OSS_20B, GPT_OSS_120B
from tests.benchmarks.record import RESULTS

SHAPES = {"gpt-oss-20b": GPT_OSS_20B, "gpt-oss-120b": GPT_OSS_120B}
MEASURED = sorted(path for path in RESULTS.glob("train_step*.json") if "gpt-oss" in path.name)


def ours(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    record = json.loads(path.read_text())
    return record, next(row for row in record["rows"] if row["name"] == "raysoner")


def option(record: dict[str, Any], name: str, otherwise: str) -> str:
    words = record["command"].split()
    return words[words.index(name) + 1] if name in words else otherwise


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_arithmetic_is_within_a_tenth_of_the_measured_peak(path: Path) -> None:
    record, row = ours(path)
    shape = SHAPES[option(record, "--model", "gpt-oss-20b")]
    recipe = Recipe(
        base_precision="mxfp4",
        precision="bf16",
        rank=int(option(record, "--rank", "8")),
        trainable_parameters=row["trainable_parameters"],
        rows=row["micro_batch_size"],
        sequence_length=row["sequence_length"],
        checkpointing=row["activation_checkpointing"],
        chunk_tokens=int(option(record, "--chunk-tokens", "2048")),
    )
    assert training_memory(shape, recipe).total / 1e9 == pytest.approx(row["peak_memory_gb"], rel=0.1)


def test_the_readme_repeats_what_was_measured() -> None:
    record = json.loads((RESULTS / "train_step-gpt-oss-20b-h100.json").read_text())
    readme = Path("README.md").read_text(encoding="utf-8")
    slowest = min(row["tokens_per_second"] for row in record["rows"])
    assert record["commit"] in readme
    for row in record["rows"]:
        speed, times = row["tokens_per_second"], round(row["tokens_per_second"] / slowest, 1)
        assert f"| {speed:,.0f} | {row['peak_memory_gb']:.1f} | {times:g} × |" in readme, row["name"]
    for name in ("train_step_smallest-gpt-oss-20b-h100", "train_step_longest-gpt-oss-20b-h100"):
        assert f"{ours(RESULTS / f'{name}.json')[1]['peak_memory_gb']:.1f} GB" in readme
    assert f"{ours(RESULTS / 'train_step-gpt-oss-120b-h100.json')[1]['tokens_per_second']:,.0f} tokens/s" in readme
