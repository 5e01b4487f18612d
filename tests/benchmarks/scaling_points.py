"""What `scaling` measures: its points, and the settings that fit them to the GPUs."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from cluster.memory import MARGIN, MODES, Recipe, training_memory
from cluster.model import Checkpointing, ModelShape
from tests.benchmarks.scaling_worker import Setting
from tests.benchmarks.train_step import model_config


@dataclass(frozen=True)
class Point:
    """What a row measures."""

    model: str | None = None
    """None: as the command says"""
    one: bool = False
    """a single process; else one for each GPU"""
    sharded: bool = False
    packed: bool = True
    rows: int | None = None
    """of a micro-batch; None: the most that the command says and that fits"""


POINTS = {
    "one_gpu": Point(one=True),
    "data_parallel": Point(),
    "sharded_mxfp4": Point(sharded=True),
    "sharded_bf16": Point(sharded=True, packed=False),
    "sharded_120b": Point(model="gpt-oss-120b", sharded=True),
    "sharded_mxfp4_one_row": Point(sharded=True, rows=1),
    "sharded_bf16_one_row": Point(sharded=True, packed=False, rows=1),
}
ON_CPU = ("one_gpu", "data_parallel", "sharded_mxfp4", "sharded_bf16")
"""points of a CPU"""


def settings_of(options: argparse.Namespace, memory_bytes: int | None) -> dict[str, Setting | None]:
    """The points that were asked for; None where not even one row fits a GPU of `memory_bytes`.

    Those of one model that leave the micro-batch to the command have one: the command's, halved until all of them fit.
    """
    made: dict[str, Setting | None] = dict.fromkeys(options.points.split(","))
    groups: dict[tuple[str, int], list[str]] = {}
    for name in made:
        point = POINTS[name]
        groups.setdefault((point.model or options.model, point.rows or options.micro_batch_size), []).append(name)
    for (model, most), group in groups.items():
        able = [name for name in group if _fitting(name, model, 1, options, memory_bytes)]
        rows, fitting = most, {name: _fitting(name, model, most, options, memory_bytes) for name in able}
        while not all(fitting.values()):
            rows //= 2
            fitting = {name: _fitting(name, model, rows, options, memory_bytes) for name in able}
        made |= fitting
    return made


def _fitting(name: str, model: str, rows: int, options: argparse.Namespace, memory_bytes: int | None) -> Setting | None:
    """A point at a micro-batch of `rows`, recomputing as little as fits the GPU by arithmetic; None if nothing does."""
    point = POINTS[name]
    modes: tuple[Checkpointing, ...] = MODES if options.checkpointing == "auto" else (options.checkpointing,)
    for mode in modes:
        setting = Setting(
            model=model,
            workers=1 if point.one else options.gpus,
            shards=options.gpus if point.sharded else 1,
            packed=point.packed,
            global_micro_batches=options.gpus,
            micro_batch_size=rows,
            sequence_length=options.sequence_length,
            checkpointing=mode,
            compiled=options.compile == "on",
            chunk_tokens=options.chunk_tokens,
            rank=options.rank,
            compared_steps=options.compared_steps,
            steps=options.steps,
        )
        needed = training_memory(shape_of(model), recipe_of(setting)).total * (1 + MARGIN)
        if memory_bytes is None or needed <= memory_bytes:
            return setting
    return None


def shape_of(model: str) -> ModelShape:
    """The model's, as the arithmetic has it."""
    return ModelShape.from_config({**model_config(model).to_dict(), "model_type": "gpt_oss"})


def recipe_of(setting: Setting) -> Recipe:
    """The point in the terms of `cluster.memory`."""
    shape, precision = shape_of(setting.model), "bf16" if torch.cuda.is_available() else "fp32"
    return Recipe(
        base_precision="mxfp4" if setting.packed else precision,  # type: ignore[arg-type]
        precision=precision,  # type: ignore[arg-type]
        rank=setting.rank,
        trainable_parameters=shape.lora_parameters(setting.rank, True, shape.num_hidden_layers),
        rows=setting.micro_batch_size,
        sequence_length=setting.sequence_length,
        checkpointing=setting.checkpointing,
        chunk_tokens=setting.chunk_tokens,
        eager_attention=not torch.cuda.is_available(),
        workers=setting.workers,
        shards=setting.shards,
    )
