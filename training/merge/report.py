"""What each layer keeps of its adapter in MXFP4, and the refusal where it is too little."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from cluster.artifacts import ArtifactError
from cluster.model import EXPERT_PARAMETERS
from training.merge.requantise import Effect

DEFINITION = "1 - |(W' - W) - D|^2 / |D|^2 over a weight's elements: W the base's, W' the merged, D = s*A*B"


def report(effects: Mapping[str, Effect]) -> dict[str, Any]:
    """For the manifest: the share of the adapter's effect that is kept, by layer and projection and of all."""
    layers: dict[str, dict[str, float]] = {}
    for name, effect in sorted(effects.items(), key=lambda item: (_layer(item[0]), item[0])):
        layers.setdefault(str(_layer(name)), {})[name.rpartition(".")[2]] = round(effect.kept, 6)
    whole = sum(effects.values(), start=Effect(0.0, 0.0))
    return {"definition": DEFINITION, "kept": round(whole.kept, 6), "layers": layers}


def table(found: Mapping[str, Any]) -> str:
    """The report as text: a line for each layer."""
    lines = ["kept of the adapter's effect, by layer", f"{'layer':>6}" + "".join(f"{p:>14}" for p in EXPERT_PARAMETERS)]
    for layer, kept in found["layers"].items():
        cells = (f"{kept[p]:14.3f}" if p in kept else f"{'':>14}" for p in EXPERT_PARAMETERS)
        lines.append(f"{layer:>6}" + "".join(cells))
    lines.append(f"{'all':>6}{found['kept']:14.3f}")
    return "\n".join(lines)


def refuse_lost(effects: Mapping[str, Effect], keep_at_least: float) -> None:
    """Raises ArtifactError where a weight keeps less than `keep_at_least`; the message names the worst."""
    if not effects:
        return
    worst = min(effects, key=lambda name: effects[name].kept)
    kept = effects[worst].kept
    if kept < keep_at_least or math.isnan(kept):
        raise ArtifactError(
            f"in MXFP4 {worst} keeps {kept:.1%} of the adapter's effect, the least of all, and --keep-at-least asks "
            f"for {keep_at_least:.1%}: the steps of the format are too coarse for this adapter; take --format bf16, or "
            "--format adapter for a small checkpoint that loses nothing (--keep-at-least 0 writes it all the same, "
            "from what is merged already)"
        )


def _layer(name: str) -> int:
    found = re.search(r"\.layers\.(\d+)\.", f".{name}")
    return int(found[1]) if found else -1
