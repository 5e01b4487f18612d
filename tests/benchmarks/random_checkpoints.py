"""Bases and adapters of any of gpt-oss's sizes with random weights, written as a stream: nothing is built in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

from cluster.artifacts import INDEX, write_manifest
from cluster.model import ATTENTION_LINEARS, EXPERT_PARAMETERS, ModelShape
from tests.benchmarks.checkpoints import SHARD_BYTES
from training.merge.headers import make_header, tensor_bytes

DEMO = Path("training/demo/model")
PIECE_BYTES = 1 << 24
SCALES = range(118, 121)
"""of a weight of about 0.02, as in `train_models`"""

Write = Callable[[memoryview], object]
Tensor = tuple[str, str, tuple[int, ...]]
"""name, dtype and shape"""


def write_base(folder: Path, shape: ModelShape) -> None:
    """A checkpoint with MXFP4 experts and bf16 for the rest, in files of at most 5 GB with an index."""
    folder.mkdir(parents=True)
    files: list[list[Tensor]] = [[]]
    room = SHARD_BYTES
    for name, dtype, size in _tensors(shape):
        needed = tensor_bytes(dtype, size)
        if needed > room:
            files.append([])
            room = SHARD_BYTES
        room -= needed
        files[-1].append((name, dtype, size))
    generator = np.random.default_rng(0)
    where: dict[str, str] = {}
    for number, tensors in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        where |= dict.fromkeys([name for name, *_ in tensors], file)
        # As the safetensors library orders them: the widest first, then by name.
        tensors.sort(key=lambda tensor: (tensor[1] != "BF16", tensor[0]))
        with (folder / file).open("wb") as stream:
            stream.write(make_header(tensors))
            for tensor in tensors:
                _write_random(stream.write, *tensor, generator)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    settings = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    settings |= {key: value for key, value in asdict(shape).items() if key != "packed"}
    settings["layer_types"] = [("sliding", "full")[n % 2] + "_attention" for n in range(shape.num_hidden_layers)]
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / name, folder)


def write_adapter(folder: Path, base: Path, shape: ModelShape, rank: int, size: float = 0.02) -> None:
    """A PEFT adapter of all attention linears and all experts, none of it zero.

    Args:
        folder: of the adapter.
        base: that its manifest names.
        shape: of the base.
        rank: R.
        size: standard deviation of A's and B's numbers.
    """
    folder.mkdir(parents=True)
    tensors = list(_factors(shape, rank))
    generator = torch.Generator().manual_seed(1)
    with (folder / "adapter_model.safetensors").open("wb") as stream:
        stream.write(make_header(tensors))
        for _, _, dimensions in tensors:
            stream.write(torch.randn(dimensions, generator=generator).mul_(size).numpy().data)
    parameters = [
        f"layers.{n}.mlp.experts.{name}" for n in range(shape.num_hidden_layers) for name in EXPERT_PARAMETERS
    ]
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(ATTENTION_LINEARS),
        target_parameters=parameters,
        inference_mode=True,
    )
    settings.save_pretrained(str(folder))
    write_manifest(folder, "adapter", str(base), {})


def _tensors(shape: ModelShape) -> Iterator[Tensor]:
    hidden, inner, experts = shape.hidden_size, shape.intermediate_size, shape.num_local_experts
    yield "lm_head.weight", "BF16", (shape.vocab_size, hidden)
    yield "model.embed_tokens.weight", "BF16", (shape.vocab_size, hidden)
    yield "model.norm.weight", "BF16", (hidden,)
    for layer in range(shape.num_hidden_layers):
        at = f"model.layers.{layer}."
        yield f"{at}input_layernorm.weight", "BF16", (hidden,)
        yield f"{at}post_attention_layernorm.weight", "BF16", (hidden,)
        yield f"{at}self_attn.sinks", "BF16", (shape.num_attention_heads,)
        for name, outputs, inputs in _linears(shape):
            yield f"{at}self_attn.{name}.weight", "BF16", (outputs, inputs)
            yield f"{at}self_attn.{name}.bias", "BF16", (outputs,)
        yield f"{at}mlp.router.weight", "BF16", (experts, hidden)
        yield f"{at}mlp.router.bias", "BF16", (experts,)
        for name, outputs, inputs in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            yield f"{at}mlp.experts.{name}_blocks", "U8", (experts, outputs, inputs // 32, 16)
            yield f"{at}mlp.experts.{name}_scales", "U8", (experts, outputs, inputs // 32)
            yield f"{at}mlp.experts.{name}_bias", "BF16", (experts, outputs)


def _linears(shape: ModelShape) -> Iterator[tuple[str, int, int]]:
    """Name, output and input features of the attention linears."""
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    yield from (("q_proj", queries, shape.hidden_size), ("k_proj", keys, shape.hidden_size))
    yield from (("v_proj", keys, shape.hidden_size), ("o_proj", shape.hidden_size, queries))


def _factors(shape: ModelShape, rank: int) -> Iterator[Tensor]:
    hidden, inner, rows = shape.hidden_size, shape.intermediate_size, rank * shape.num_local_experts
    for layer in range(shape.num_hidden_layers):
        at = f"base_model.model.model.layers.{layer}."
        for name, outputs, inputs in _linears(shape):
            yield f"{at}self_attn.{name}.lora_A.weight", "F32", (rank, inputs)
            yield f"{at}self_attn.{name}.lora_B.weight", "F32", (outputs, rank)
        # The wrapper of down_proj is around that of gate_up_proj.
        for nesting, inputs, outputs in (("base_layer.", hidden, 2 * inner), ("", inner, hidden)):
            yield f"{at}mlp.experts.{nesting}lora_A.weight", "F32", (rows, inputs)
            yield f"{at}mlp.experts.{nesting}lora_B.weight", "F32", (outputs, rows)


def _write_random(write: Write, name: str, dtype: str, size: tuple[int, ...], generator: Any) -> None:
    """Bytes of a tensor in pieces. Numbers in bf16 are normal, and are drawn once and repeated."""
    left = tensor_bytes(dtype, size)
    while left:
        count = min(left, PIECE_BYTES)
        if name.endswith("_scales"):
            data = generator.integers(SCALES.start, SCALES.stop, count, dtype=np.uint8).data
        elif dtype == "U8":
            data = memoryview(generator.bytes(count))
        elif "norm" in name:
            data = torch.ones(count // 2, dtype=torch.bfloat16).view(torch.uint8).numpy().data
        else:
            data = memoryview(_NORMAL)[:count]
        write(data)
        left -= count


_NORMAL = (
    torch.randn(PIECE_BYTES // 2, generator=torch.Generator().manual_seed(2)).mul_(0.02).to(torch.bfloat16)
).view(torch.uint8).numpy().tobytes()  # fmt: skip
