"""How much of an adapter's effect each way of merging keeps, by the size of the adapter.

python -m tests.benchmarks.merge_effect

One expert of gpt-oss's size, its weights normal and put in MXFP4 by the specification's scales; an adapter of rank 8
whose Δ has `size` times the norm of W. Figures are errors of the effect, ‖(W' − W) − Δ‖/‖Δ‖, and on activations the
same of products with white inputs: 0 is lossless, 1 is lost, above 1 it does more harm than to leave the adapter out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.record import RESULTS, keep
from training.merge.arithmetic import fold_packed
from training.merge.requantise import requantise
from training.modeling.mxfp4 import dequantise, quantise

INPUTS, OUTPUTS, RANK, ROWS = 2880, 2880, 8, 512
SIZES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def main(folder: Path = RESULTS) -> int:
    """Measure all sizes and keep them in one file."""
    rows = [measure(size) for size in SIZES]
    for row in rows:
        print(row)
    print(
        keep(
            "merge_effect",
            "gpt-oss-20b",
            f"cpu{os.cpu_count()}",
            "python -m tests.benchmarks.merge_effect",
            rows,
            folder,
        )
    )
    return 0


def measure(size: float) -> dict[str, Any]:
    """Errors for an adapter of one relative size."""
    torch.manual_seed(0)
    blocks, scales = quantise(torch.randn(1, INPUTS, OUTPUTS) * 0.02)
    base = _weights(blocks, scales)
    a, b = torch.randn(RANK, INPUTS), torch.randn(OUTPUTS, RANK)
    b *= size * base.norm() / (b @ a).norm()
    delta, inputs = b @ a, torch.randn(INPUTS, ROWS)

    dense = torch.empty(INPUTS, OUTPUTS, dtype=torch.bfloat16)
    fold_packed(blocks[0], scales[0], (a, b), 1.0, dense)
    new_blocks, new_scales, effect = requantise(blocks[0], scales[0], (a, b), 1.0)
    merged = {
        "bf16": dense.T.float(),
        "mxfp4": _weights(new_blocks[None], new_scales[None]),
        "specified_scales": _weights(*quantise((base + delta).T[None].contiguous())),
    }
    row: dict[str, Any] = {"name": f"{size:g}"}
    for name, weights in merged.items():
        error = weights - base - delta
        row[name] = round(float(error.norm() / delta.norm()), 4)
        row[f"{name}_on_activations"] = round(float((error @ inputs).norm() / (delta @ inputs).norm()), 4)
    return {**row, "mxfp4_kept": round(effect.kept, 4)}


def _weights(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[O, I]."""
    return dequantise(blocks, scales, torch.float32)[0].T


if __name__ == "__main__":
    sys.exit(main())
