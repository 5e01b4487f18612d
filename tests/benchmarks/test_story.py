"""The benchmark of what to adapt: its rows, and that runs are not taken for others. The runs are real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cluster.local import LocalRay
from tests.benchmarks import story
from tests.benchmarks.story import VARIANTS, rows, run_name, train


def figures(adherence: float, right: float) -> dict[str, Any]:
    def interval(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    return {
        "all": {"answers": 180, "correct": interval(right)},
        "outside_english": {"thinking": {"adherence": interval(adherence)}},
    }


def test_rows_of_runs_and_over_their_seeds(tmp_path: Path) -> None:
    targets: list[dict[str, Any]] = [{"name": "base", "figures": figures(0.1, 0.9)}]
    for variant in VARIANTS:
        for seed in (0, 1):
            name = run_name(variant, seed)
            targets.append({"name": name, "figures": figures(0.5 + seed / 4, 0.75)})
            (tmp_path / name / "adapter").mkdir(parents=True)
            save_file(
                {"a": torch.ones(3, 4), "b": torch.ones(5)}, tmp_path / name / "adapter/adapter_model.safetensors"
            )
    seconds = {target["name"]: 1.0 for target in targets}
    found = {row["name"]: row for row in rows({"targets": targets}, tmp_path, seconds, 2)}
    assert len(found) == 1 + 3 * len(VARIANTS)
    assert found["base"]["adherence_interval"] == [0.0, 0.2]
    assert found["attention, all experts, seed 1"]["adherence"] == 0.75
    whole = found["attention, all experts"]
    assert (whole["adherence"], whole["adherence_least"], whole["adherence_most"]) == (0.625, 0.5, 0.75)
    assert whole["trainable_parameters"] == 17


def test_a_run_that_ended_is_found_again_and_not_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, ...]] = []

    def made(_: LocalRay | None, *words: str) -> None:
        called.append(words)
        (tmp_path / "one").mkdir()

    monkeypatch.setattr(story, "python", made)
    ray: Any = None
    seconds = train(ray, tmp_path, "one", "all", 0, 90)
    assert train(ray, tmp_path, "one", "all", 0, 90) == seconds
    assert len(called) == 1
    assert json.loads((tmp_path / "one" / "made.json").read_text())["words"] == list(called[0][2:])
    with pytest.raises(SystemExit, match="was made with other settings"):
        train(ray, tmp_path, "one", "all", 0, 30)
