"""Weights of channels in the loss, through TRL's own loss path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig

from cluster.harmony import Label
from training.config import ModelConfig
from training.data.collator import IGNORED, Collator
from training.modeling.base import load_base
from training.modeling.isolation import isolate_documents
from training.trainer import WeightedTrainer

BASE = "training/demo/model"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(2):
        labels = np.array([Label.USER] * 6 + [Label.ANALYSIS] * 8 + [Label.FINAL] * 6, np.uint8)
        tokens = rng.integers(0, 3000, 20).astype(np.int32)
        made.append({"tokens": tokens, "labels": labels, "lengths": [10, 10], "size": 20})
    return made


@pytest.fixture(scope="module")
def trainer(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> WeightedTrainer:
    model = load_base(ModelConfig(path=BASE, precision="fp32"), torch.device("cpu"))
    isolate_documents(model)
    return WeightedTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path_factory.mktemp("out")),
            bf16=False,
            router_aux_loss_coef=0.0,
            use_cpu=True,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            report_to=[],
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=Collator({"final": 1.0}),
        processing_class=AutoTokenizer.from_pretrained(Path(BASE)),
    )


def by_hand(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Σ weight · negative log-likelihood / number of trained tokens, from plain logits."""
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[:, :-1]
    labels, weights = batch["labels"][:, 1:], batch["loss_weights"][:, 1:]
    each = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2).float(), labels, reduction="none", ignore_index=IGNORED
    )
    return (each * weights).sum() / (labels != IGNORED).sum()


@pytest.mark.parametrize("weights", [{"analysis": 0.25, "final": 2.0}, {"analysis": 0.5, "final": 0.5}])
def test_the_loss_is_the_weighted_mean(
    trainer: WeightedTrainer, rows: list[dict[str, Any]], weights: dict[str, float]
) -> None:
    batch = Collator(weights)(rows)
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, dict(batch))
        assert float(found) == pytest.approx(float(by_hand(trainer.model, batch)), rel=1e-5)


def test_without_weights_the_loss_is_trls(trainer: WeightedTrainer, rows: list[dict[str, Any]]) -> None:
    plain = Collator({"analysis": 1.0, "final": 1.0})(rows)
    doubled = Collator({"analysis": 2.0, "final": 2.0})(rows)
    with torch.no_grad():
        once = trainer.compute_loss(trainer.model, dict(plain))
        twice = trainer.compute_loss(trainer.model, dict(doubled))
    assert "loss_weights" not in plain
    assert float(twice) == pytest.approx(2 * float(once), rel=1e-6)
