"""What the tests of expert parallelism run in each of several gloo processes, against one process alone."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from cluster.memory import MODES, Recipe
from cluster.model import ModelShape
from tests.training.sharding import CPU, LAYERS, Findings, Tensors, _loss, built, configured, gradients, outcome, step
from training.agreement import check_ranks_agree, trainable
from training.config import TrainingConfig
from training.exchange import step_exchange_bytes
from training.modeling.engine import build_model
from training.modeling.expert_load import EXPERT_LOAD
from training.modeling.expert_parallel import ExpertShare, clip_gradients, gather_whole, owned

TOP_K = 2
TOKENS = 64
"""of a worker's micro-batch: see `tests.training.sharding.step`"""


def run(rank: int, world: int, folder: Path, scratch: Path) -> None:
    """One process of `world`; what it finds is written to `scratch`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=world)
    share = ExpertShare.of_all_workers()
    found: Findings = {"steps": {}}
    for base in ("mxfp4", "fp32"):
        config = configured(folder, base)
        whole = built(config)
        expected = _mean([outcome(whole, 10 + other) for other in range(world)], rank)
        for mode in MODES if base == "mxfp4" else ("full",):
            exchanges = Exchanges(rank, world)
            model = sharing(config, mode, share, whole)
            with exchanges.counted():
                made = outcome(DistributedDataParallel(model), 10 + rank)
            found["steps"][f"{base} {mode}"] = _apart(model, made, expected) | exchanges.against(folder, mode)
        if base == "mxfp4":
            found |= _accumulated(model, whole, rank, world) | _agreement(model, rank) | _clipped(model, rank)
            found |= _evaluation(model, whole, rank) | _load(model, whole, rank)
    config = configured(folder, "mxfp4")
    found |= _idle(config, share, rank, world) | _compiled(folder, share, rank) | _dropout(folder, share, rank)
    found |= _construction(config, share)
    (scratch / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def sharing(config: TrainingConfig, mode: Any, share: ExpertShare, whole: PeftModel) -> PeftModel:
    """The engine's model with a share of the experts, its adapters those of `whole`, in training mode."""
    model = build_model(config, CPU, mode, None, share)
    give(model, trainable(whole))
    return model.train()


def give(model: torch.nn.Module, values: Tensors) -> None:
    """Have the adapters be this worker's parts of `values`."""
    for name, weight in trainable(model).items():
        weight.data.copy_(part_of(weight, values[name].detach()))


def part_of(weight: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    place = owned(weight)
    return place.part(whole) if place else whole


def _mean(all_of: list[Tensors], rank: int) -> Tensors:
    """Gradients as DistributedDataParallel averages them, and this worker's loss."""
    mean = {name: torch.stack([each[name] / len(all_of) for each in all_of]).sum(0) for name in all_of[0]}
    return mean | {"loss": all_of[rank]["loss"]}


def _apart(model: torch.nn.Module, made: Tensors, expected: Tensors) -> Findings:
    """How far the loss is off, and the gradients, relative to their largest entry."""
    weights = trainable(model)
    assert made.keys() == expected.keys() == weights.keys() | {"loss"}
    wanted = {name: part_of(weight, expected[name]) for name, weight in weights.items()}
    differences = [float((made[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted]
    loss = float((made["loss"] - expected["loss"]).abs() / expected["loss"])
    return {"loss": loss, "gradients": max(differences)}


class Exchanges:
    """All-to-all exchanges of this process, and the bytes of rows that came from others."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.number = 0
        self.bytes = 0
        self.left = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Within, they are."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_to_all_single", self._exchange(dist.all_to_all_single))
            yield

    def _exchange(self, stock: Any) -> Any:
        def exchange(found: torch.Tensor, rows: torch.Tensor, come: Any = None, go: Any = None, **group: Any) -> None:
            self.number += 1
            if come is None:  # numbers of rows by expert
                self.left += int(rows.sum() - rows.chunk(self.world)[self.rank].sum())
            else:
                others = sum(come) - come[self.rank]
                self.bytes += others * rows.shape[1] * rows.element_size()
            stock(found, rows, come, go, **group)

        return exchange

    def against(self, folder: Path, mode: Any) -> Findings:
        """Of all workers together, by rows that left home, and by the arithmetic, which takes routing to be even."""
        recipe = Recipe("mxfp4", "fp32", 4, 0, 2, TOKENS // 2, mode, 1)
        computed = step_exchange_bytes(ModelShape.from_folder(folder), recipe, self.world, 1)
        even = LAYERS * TOKENS * TOP_K * (self.world - 1) // self.world
        total = torch.tensor([self.bytes, self.left // (2 if mode == "full" else 1)])
        dist.all_reduce(total)
        measured, left = total.tolist()
        return {
            "exchanges": self.number,
            "bytes of a row": [measured / left, computed / even],
            "left": left / self.world / even,
        }


def _accumulated(model: PeftModel, whole: PeftModel, rank: int, world: int) -> Findings:
    """Two micro-batches, of which the first averages nothing."""
    parallel = DistributedDataParallel(model)
    with parallel.no_sync():
        first = step(parallel, 20 + rank)
    made = outcome(parallel, 30 + rank) | {"loss": first}
    expected = _mean([outcome(whole, 20 + other, 30 + other) for other in range(world)], rank)
    return {"accumulated": _apart(model, made, expected | {"loss": first})["gradients"]}


def _agreement(model: PeftModel, rank: int) -> Findings:
    """What workers own differs and is not compared; what all hold is."""
    check_ranks_agree(trainable(model))
    name, weight = next((name, weight) for name, weight in trainable(model).items() if not owned(weight))
    if rank == 1:
        weight.data[0, 0] += 1e-3
    try:
        check_ranks_agree(trainable(model))
        said = ""
    except RuntimeError as error:
        said = str(error)
    if rank == 1:
        weight.data[0, 0] -= 1e-3
    dist.broadcast(weight.data, 0)
    return {"disagreement": said, "disputed": name}


def _clipped(model: PeftModel, rank: int) -> Findings:
    """Norm and clipped gradients are those of all experts together."""
    made = outcome(DistributedDataParallel(model), 10 + rank)
    weights = trainable(model)
    for name, weight in weights.items():
        weight.grad = made[name].clone()
    parts = {name: (made[name], owned(weight)) for name, weight in weights.items()}
    whole = gather_whole({name: (part, place) for name, (part, place) in parts.items() if place})
    norm = clip_gradients(model.parameters(), 0.1)
    unclipped = clip_gradients(model.parameters(), float("inf"))
    clipped = gradients(model)
    found: Findings = {"norm": float(norm), "norm after": float(unclipped)}
    if rank == 0:
        plain = [
            torch.nn.Parameter(part) for part in ({name: part for name, (part, _) in parts.items()} | whole).values()
        ]
        for parameter in plain:
            parameter.grad = parameter.detach().clone()
        found["norm of one"] = float(clip_grad_norm_(plain, 0.1))
        ratios = [(clipped[name] / made[name]).nanmedian() for name in weights]
        found["ratios"] = [float(min(ratios)), float(max(ratios))]
    return found


def _evaluation(model: PeftModel, whole: PeftModel, rank: int) -> Findings:
    """Losses without gradients, of other rows on each worker."""
    with torch.no_grad():
        losses = [[float(_loss(each.eval(), seed)) for seed in (1 + rank, 3 + rank)] for each in (model, whole)]
    for each in (model, whole):
        each.train()
    return {"evaluation": losses}


def _load(model: PeftModel, whole: PeftModel, rank: int) -> Findings:
    """Each worker's figures are those of its own tokens over all experts."""
    seen = []
    for each in (model, whole):
        EXPERT_LOAD.start()
        outcome(each, 40 + rank)
        seen.append(EXPERT_LOAD.take())
        EXPERT_LOAD.stop()
    return {"load": seen}


def _idle(config: TrainingConfig, share: ExpertShare, rank: int, world: int) -> Findings:
    """Every token goes to the first worker's experts, so that no row reaches the others."""
    whole = built(config)
    model = sharing(config, "full", share, whole)
    for each in (whole, model):
        for layer in each.get_base_model().model.layers:
            layer.mlp.router.bias.data[:TOP_K] += 1e4
    expected = _mean([outcome(whole, 10 + other) for other in range(world)], rank)
    made = outcome(DistributedDataParallel(model), 10 + rank)
    weights = trainable(model)
    apart = [
        float((made[name] - part_of(weight, expected[name])).abs().max() / expected[name].abs().max())
        for name, weight in weights.items()
    ]
    nothing = [not made[name].any() for name, weight in weights.items() if owned(weight)]
    return {"idle": max(apart), "idle gradients": sum(nothing), "owned": len(nothing)}


def _compiled(folder: Path, share: ExpertShare, rank: int) -> Findings:
    """Layers through Dynamo and AOTAutograd around the exchanges, twice, against the same uncompiled."""
    whole = built(configured(folder, "mxfp4"))
    model = DistributedDataParallel(sharing(configured(folder, "mxfp4"), "experts", share, whole))
    expected = [outcome(model, rank), outcome(model, 5)]
    stock = torch.compile
    torch.compile = functools.partial(stock, backend="aot_eager")  # type: ignore[assignment]
    try:
        counters.clear()
        model = DistributedDataParallel(sharing(configured(folder, "mxfp4", compile="on"), "experts", share, whole))
        made = [outcome(model, rank), outcome(model, 5)]
    finally:
        torch.compile = stock
    same = [
        all(torch.equal(one[name], other[name]) for name in other) for one, other in zip(made, expected, strict=True)
    ]
    return {"compiled": same, "graphs": counters["stats"]["unique_graphs"]}


def _dropout(folder: Path, share: ExpertShare, rank: int) -> Findings:
    """What is recomputed drops the same inputs."""
    config = configured(folder, "mxfp4")
    config = config.model_copy(update={"lora": config.lora.model_copy(update={"dropout": 0.3})})
    whole, made = built(config), []
    for mode in ("none", "full"):
        model = sharing(config, mode, share, whole)
        torch.manual_seed(3 + rank)
        made.append(outcome(DistributedDataParallel(model), 10 + rank))
    with torch.no_grad():
        without = _loss(model.eval(), 10 + rank)
    return {
        "dropout": [all(torch.equal(each[name], made[0][name]) for name in made[0]) for each in made],
        "dropped": float((made[0]["loss"] - without).abs()),
    }


def _construction(config: TrainingConfig, share: ExpertShare) -> Findings:
    """New adapters and the base are those of one process, in parts."""
    torch.manual_seed(1)
    whole = dict(build_model(config, CPU, "none").named_parameters())
    torch.manual_seed(1)
    model = build_model(config, CPU, "none", None, share)
    parts = dict(model.named_parameters())
    assert parts.keys() == whole.keys()
    adapters = {name: (weight.detach(), owned(weight)) for name, weight in parts.items() if "lora_" in name}
    there = [(name, (weight, place)) for name, (weight, place) in adapters.items() if place]
    joined = gather_whole(dict(there if share.rank == 0 else reversed(there)))  # each has an order of its own
    experts = {
        name: share.own(len(weight)) for name, weight in whole.items() if ".experts." in name and "lora_" not in name
    }
    own = {name: weight[experts[name]] if name in experts else weight for name, weight in whole.items()}
    return {
        "adapters": all(
            torch.equal(weight, part_of(parts[name], whole[name])) for name, (weight, _) in adapters.items()
        ),
        "joined": [len(joined), all(torch.equal(weight, whole[name]) for name, weight in joined.items())],
        "base": all(torch.equal(parts[name], own[name]) for name in whole if "lora_" not in name),
        "trained": all(weight.requires_grad == ("lora_" in name) for name, weight in parts.items()),
        "held": sum(parts[name].nbytes for name in experts) / sum(whole[name].nbytes for name in experts),
    }
