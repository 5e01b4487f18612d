"""What the tests of sharding run in each of several gloo processes: a tiny gpt-oss on disk, and what became of it."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import save_file
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import GptOssConfig, GptOssForCausalLM

from cluster.artifacts import WEIGHTS
from training.config import TrainingConfig
from training.modeling.engine import build_model
from training.modeling.mxfp4 import quantise
from training.modeling.sharding import GatherCounter, gathered_bytes, sharding_mesh

CPU = torch.device("cpu")
VOCABULARY, EXPERTS, HIDDEN, INTERMEDIATE, LAYERS = 97, 4, 64, 256, 3
DEMO_TOKENIZER = Path("training/demo/model/tokenizer.json")

Findings = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def write_checkpoint(folder: Path, *, packed: bool = True, **sizes: int) -> Path:
    """A random gpt-oss whose layers are nearly all experts, as gpt-oss's are: a sliding, a full and a sliding layer."""
    torch.manual_seed(0)
    given = {"num_local_experts": EXPERTS, "num_hidden_layers": LAYERS, "intermediate_size": INTERMEDIATE, **sizes}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8}
    config = GptOssConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_experts_per_tok=2, **given, **heads)
    tensors: Tensors = {}
    for name, weight in GptOssForCausalLM(config).state_dict().items():
        values = torch.randn(weight.shape) * 0.3 if "sinks" in name or "proj" in name else weight
        if packed and name.endswith(("gate_up_proj", "down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = quantise(values)
        else:
            tensors[name] = values.to(torch.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    settings = config.to_dict() | ({"quantization_config": {"quant_method": "mxfp4"}} if packed else {})
    (folder / "config.json").write_text(json.dumps(settings))
    shutil.copy(DEMO_TOKENIZER, folder)
    return folder


def configured(folder: Path | str, base_precision: str, precision: str = "fp32", **model: object) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "model": {"path": str(folder), "precision": precision, "base_precision": base_precision, **model},
            "lora": {"rank": 4},
            "workers": {"gpus": 0},
        }
    )


@contextmanager
def alone(scratch: Path) -> Iterator[None]:
    """This process is all there are."""
    dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def pretended(rank: int, world: int) -> Iterator[None]:
    """This process is one of `world` that exchange nothing: enough to load a share."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def built(config: TrainingConfig, mode: Any = "none", mesh: DeviceMesh | None = None, seed: int = 5) -> PeftModel:
    """The engine's model with adapters that do something, in training mode."""
    model = build_model(config, CPU, mode, mesh)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


def step(model: torch.nn.Module, seed: int) -> torch.Tensor:
    """Loss of two rows of two documents each, and its gradients added to the adapters'."""
    loss = _loss(model, seed)
    loss.backward()
    return loss.detach()


def _loss(model: torch.nn.Module, seed: int) -> torch.Tensor:
    tokens = torch.randint(0, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat((torch.arange(13), torch.arange(19))).expand(2, -1)
    logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def gradients(model: torch.nn.Module) -> Tensors:
    """Of the adapters, by name; taken off the model."""
    found = {
        name.removeprefix("module."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    return found


def outcome(model: torch.nn.Module, *seeds: int) -> Tensors:
    """Gradients and the sum of losses of one or more micro-batches."""
    losses = [step(model, seed) for seed in seeds]
    return gradients(model) | {"loss": torch.stack(losses).sum()}


def same(one: Tensors, other: Tensors) -> bool:
    """Equal to the bit, and none of it zero throughout."""
    return (
        one.keys() == other.keys()
        and len(one) > 4 * LAYERS
        and all(torch.equal(one[name], other[name]) and bool(one[name].any()) for name in one)
    )


def layer_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if ".layers." in name and "lora_" not in name}


def local_share(model: torch.nn.Module) -> float:
    """Bytes of the layers' weights that this process holds, as a share of all."""
    weights = layer_weights(model).values()
    held = sum(weight.to_local().nbytes for weight in weights if isinstance(weight, DTensor))
    return held / sum(weight.numel() * weight.element_size() for weight in weights)


def run(rank: int, world: int, shards: int, folder: Path, scratch: Path) -> None:
    """One process of `world`; what it finds is written to `scratch`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=world)
    mesh = sharding_mesh(CPU, shards)
    found: Findings = {"ranks": mesh.mesh.tolist(), "same": {}}
    for base in ("mxfp4", "fp32"):
        config = configured(folder, base)
        whole = built(config)
        expected = outcome(whole, 0)
        for mode in ("none", "experts", "full") if world == 2 else ("full",):
            model = built(config, mode, mesh)
            counter = GatherCounter.of(model)
            found["same"][f"{base} {mode}"] = same(outcome(model, 0), expected)
            found[f"gathers {base} {mode}"] = [counter.gathers, counter.bytes, 2 * gathered_bytes(model)]
        found[f"share {base}"] = local_share(model)
        if base == "mxfp4":
            found |= _evaluation(model, whole) | _data_parallel(config, mesh, whole, rank, world)
    if world == 2:
        found |= _counted(folder, mesh)
    (scratch / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _evaluation(model: PeftModel, whole: PeftModel) -> Findings:
    """Losses without gradients, twice, and a step of training after them."""
    with torch.no_grad():
        losses = [[float(_loss(each.eval(), seed)) for seed in (1, 2)] for each in (model, whole)]
    sharded = all(isinstance(weight, DTensor) for weight in layer_weights(model).values())
    after = same(outcome(model.train(), 3), outcome(whole.train(), 3))
    return {"evaluation": losses, "sharded after evaluation": sharded, "training after evaluation": after}


def _data_parallel(config: TrainingConfig, mesh: DeviceMesh, whole: PeftModel, rank: int, world: int) -> Findings:
    """DistributedDataParallel over all workers, each with adapters and inputs of its own to begin with."""
    model = built(config, "none", mesh, seed=5 + rank)
    parallel = DistributedDataParallel(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapters = all(torch.equal(model.get_parameter(name), whole.get_parameter(name)) for name in trained)
    apart = outcome(parallel, 10 + rank)
    expected = [outcome(whole, 10 + other) for other in range(world)]
    averaged = _mean(expected) | {"loss": expected[rank]["loss"]}
    with parallel.no_sync():
        first = step(parallel, 20 + rank)
    accumulated = outcome(parallel, 30 + rank) | {"loss": first}
    both = [outcome(whole, 20 + other, 30 + other) for other in range(world)]
    mean = _mean(both) | {"loss": first}
    return {
        "adapters broadcast": adapters,
        "mean": _difference(apart, averaged),
        "accumulated mean": _difference(accumulated, mean),
        "moved": model.to(CPU) is model and same(outcome(model, 0), outcome(whole, 0)),
    }


def _mean(all_of: list[Tensors]) -> Tensors:
    """Each divided before they are added up, as DistributedDataParallel does."""
    return {name: torch.stack([each[name] / len(all_of) for each in all_of]).sum(0) for name in all_of[0]}


def _difference(one: Tensors, other: Tensors) -> float:
    """The largest, relative to each tensor's largest entry."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max() / other[name].abs().max()) for name in one)


def _counted(folder: Path, mesh: DeviceMesh) -> Findings:
    """Bytes gathered in a step with the experts in four bits and in bf16."""
    counts = []
    for base in ("mxfp4", "bf16"):
        model = built(configured(folder, base, "bf16"), "none", mesh)
        counter = GatherCounter.of(model)
        outcome(model, 0)
        counts.append(counter.bytes)
    return {"ratio": counts[0] / counts[1]}


class Compiled(NamedTuple):
    """What Dynamo made of two steps."""

    difference: float
    graphs: int
    breaks: int


def compiled(folder: Path, mesh: DeviceMesh) -> Compiled:
    """Layers through Dynamo and AOTAutograd, as inductor gets them, inside DistributedDataParallel."""
    expected = outcome(built(configured(folder, "mxfp4"), "experts"), 0)
    stock = torch.compile
    torch.compile = functools.partial(stock, backend="aot_eager")  # type: ignore[assignment]
    try:
        model = DistributedDataParallel(built(configured(folder, "mxfp4", compile="on"), "experts", mesh))
        counters.clear()
        difference = _difference(outcome(model, 0), expected)
        outcome(model, 1)
    finally:
        torch.compile = stock
    return Compiled(difference, counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
