"""Rows of `scaling`: figures of a point, what they must reach, and what arithmetic expects of them."""

from __future__ import annotations

import operator
from statistics import median
from typing import Any

import torch

from cluster.hardware import profile_of
from cluster.memory import step_gather_bytes, training_memory
from cluster.scaling import Layout, Links, Work, predict
from tests.benchmarks.scaling_points import recipe_of, shape_of
from tests.benchmarks.scaling_worker import Setting

SAME = {"adapters_identical": "== 1"}
COUNTED = {"gathered_over_arithmetic": "== 1"}
NEAR = {"largest_loss_difference": "<= 0.01", "largest_gradient_difference": "<= 0.02"}
"""in bf16, of losses of about 12 nats"""
EXACT = {"largest_loss_difference": "<= 1e-5", "largest_gradient_difference": "<= 1e-5"}
"""in fp32"""
MUST = {
    "one_gpu": {},
    "data_parallel": {"efficiency": ">= 0.92", **SAME, **NEAR},
    "sharded_mxfp4": {"efficiency": ">= 0.8", **SAME, **COUNTED, **NEAR},
    "sharded_bf16": {"step_over_mxfp4": ">= 1.2", **SAME, **COUNTED, **NEAR},
    "sharded_120b": {**SAME, **COUNTED},
    "sharded_mxfp4_one_row": {**SAME, **COUNTED},
    "sharded_bf16_one_row": {"step_over_mxfp4": ">= 1.2", **SAME, **COUNTED},
}
"""what figures of a row must reach on GPUs"""
MUST_ON_CPU = {
    "one_gpu": {},
    "data_parallel": SAME | EXACT,
    "sharded_mxfp4": SAME | COUNTED | EXACT,
    "sharded_bf16": SAME | COUNTED | EXACT,
}
AIM = {
    "data_parallel": {"efficiency": ">= 0.98"},
    "sharded_mxfp4": {"efficiency": ">= 0.93"},
    "sharded_bf16": {"step_over_mxfp4": ">= 3"},
    "sharded_120b": {"tokens_per_second_per_gpu": ">= 3000"},
    "sharded_bf16_one_row": {"step_over_mxfp4": ">= 3"},
}
COMPARED = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}

Row = dict[str, Any]


def row_of(name: str, setting: Setting, figures: Row, others: dict[str, tuple[Setting, Row]]) -> Row:
    """A row of the result: a point's figures, against those of `others` with the same model and micro-batch."""
    row: Row = {"name": name, **_described(setting)}
    if "seconds" not in figures:
        return row | {"not measured": figures["not measured"]}
    row |= _speed(setting, figures) | _memory(setting, figures)
    comparable = {
        other: found
        for other, (theirs, found) in others.items()
        if "seconds" in found and theirs.model == setting.model and theirs.micro_batch_size == setting.micro_batch_size
    }
    one, whole = comparable.get("one_gpu"), comparable.get("data_parallel")
    packed = comparable.get(name.replace("bf16", "mxfp4"))
    step = median(figures["seconds"])
    if setting.workers > 1 and one:
        row["efficiency"] = round(median(one["seconds"]) / step, 4)
        row |= _difference(figures, one)
    if setting.workers > 1:
        row["adapters_identical"] = figures["adapters_identical"]
    if setting.shards > 1:
        row |= _gathers(setting, figures, median(whole["seconds"]) if whole and setting.packed else None)
    row |= _predicted(setting, figures, median(one["seconds"]) if one and setting.packed else None)
    if packed:
        row["step_over_mxfp4"] = round(step / median(packed["seconds"]), 3)
    if "not measured" in figures:
        row["not measured"] = f"gathers: {figures['not measured']}"
    gpu = torch.cuda.is_available()
    must, aim = (MUST if gpu else MUST_ON_CPU)[name], AIM.get(name, {}) if gpu else {}
    row |= {"must": must, "holds": reaches(row, must)}
    return row | ({"aim": aim, "reached": reaches(row, aim)} if aim else {})


def reaches(row: Row, limits: dict[str, str]) -> bool:
    """Whether all figures are there and within their limits."""
    for figure, limit in limits.items():
        sign, bound = limit.split()
        if row.get(figure) is None or not COMPARED[sign](row[figure], float(bound)):
            return False
    return True


def _described(setting: Setting) -> Row:
    return {
        "workers": setting.workers,
        "base_precision": recipe_of(setting).base_precision,
        "micro_batch_size": setting.micro_batch_size,
        "sequence_length": setting.sequence_length,
        "activation_checkpointing": setting.checkpointing,
    }


def _speed(setting: Setting, figures: Row) -> Row:
    seconds = figures["seconds"]
    middle = median(seconds)
    return {
        "tokens_per_second_per_gpu": round(setting.micro_batch_size * setting.sequence_length / middle, 1),
        "step_seconds": round(middle, 4),
        "spread": round((max(seconds) - min(seconds)) / middle, 3),
        "trainable_parameters": figures["trainable_parameters"],
        "losses": [round(loss, 6) for loss in figures["losses"]],
    }


def _memory(setting: Setting, figures: Row) -> Row:
    if not torch.cuda.is_available():
        return {}
    return {
        "peak_memory_gb": [round(peak / 1e9, 2) for peak in figures["peak_memory_bytes"]],
        "predicted_memory_gb": round(training_memory(shape_of(setting.model), recipe_of(setting)).total / 1e9, 2),
    }


def _difference(figures: Row, one: Row) -> Row:
    """Of losses and of gradients' norms in the steps that several workers and one take over the same rows."""
    losses = zip(figures["losses"], one["losses"], strict=True)
    norms = zip(figures["gradient_norms"], one["gradient_norms"], strict=True)
    return {
        "largest_loss_difference": max(abs(ours - theirs) for ours, theirs in losses),
        "largest_gradient_difference": max(abs(ours / theirs - 1) for ours, theirs in norms),
    }


def _gathers(setting: Setting, figures: Row, whole_seconds: float | None) -> Row:
    """What gathers move and how much of their time is hidden; `whole_seconds` is the step with nothing to gather."""
    step = median(figures["seconds"])
    computed = step_gather_bytes(shape_of(setting.model), recipe_of(setting), 1)
    row: Row = {
        "gathers": figures["gathers"],
        "gathered_gb": round(figures["gathered_bytes"] / 1e9, 4),
        "gathered_over_arithmetic": round(figures["gathered_bytes"] / computed, 4),
    }
    if not (measured := figures.get("gathers_alone")):
        return row
    alone, links = measured["seconds"], measured["seconds"] - measured["seconds_without_links"]
    exposed = max(0.0, step - measured["step_seconds_without_links"])
    row |= {
        "gather_seconds": round(alone, 4),
        "link_seconds": round(links, 4),
        "link_gb_per_second": round(figures["gathered_bytes"] / links / 1e9, 1) if links > 0 else None,
        "step_seconds_without_links": round(measured["step_seconds_without_links"], 4),
        "links_hidden": round(max(0.0, 1 - exposed / links), 3) if links > 0 else None,
    }
    if whole_seconds is not None:
        row["hidden"] = round(max(0.0, 1 - max(0.0, step - whole_seconds) / alone), 3)
    return row


def _predicted(setting: Setting, figures: Row, one_seconds: float | None) -> Row:
    """What `cluster.scaling` says of a point on several GPUs, from one GPU's step, else from the step without links."""
    profile = profile_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    alone = figures.get("gathers_alone")
    if profile is None or setting.workers == 1:
        return {}
    layout = Layout(setting.workers, setting.workers, setting.shards)
    links = Links.of(profile, network_gbit_per_second=1.0)  # of one host, whose network nothing passes
    shape, recipe, memory = shape_of(setting.model), recipe_of(setting), profile.bandwidth_bytes_per_second
    if one_seconds is not None:
        source, seconds = "one_gpu", one_seconds
    elif alone is not None:
        source, seconds = "step_seconds_without_links", alone["step_seconds_without_links"]
        seconds -= predict(Work(shape, recipe, 1, seconds, memory), layout, links).copy_seconds  # which it holds
    else:
        return {}
    expected = predict(Work(shape, recipe, 1, seconds, memory), layout, links)
    return {
        "predicted": {
            "from": source,
            "step_seconds": round(expected.step_seconds, 4),
            "efficiency": round(expected.efficiency, 4),
            "gather_seconds": round(expected.gather_seconds, 4),
            "copy_seconds": round(expected.copy_seconds, 4),
            "average_seconds": round(expected.average_seconds, 4),
        }
    }
