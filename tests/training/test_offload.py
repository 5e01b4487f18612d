"""Activations in host memory: what comes back is what went away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.test_trainer import take_step
from training.modeling import offload


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_that_were_away_come_back_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    whole = take_step(tmp_path, 8, 1)
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 1)
    away = 0
    leave = offload.Offload._leave

    def counted(*given: Any) -> Any:
        nonlocal away
        kept = leave(*given)
        away += isinstance(kept, offload.Away)
        return kept

    monkeypatch.setattr(offload.Offload, "_leave", counted)
    step = take_step(tmp_path, 8, 1, activation_offload=True, gradient_checkpointing=checkpointing)
    assert away > 5
    for name, gradient in whole.gradients.items():
        assert torch.equal(step.gradients[name], gradient), name
