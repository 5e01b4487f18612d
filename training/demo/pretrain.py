"""Pre-trains the demo's base model from random weights, with its experts on the MXFP4 grid throughout."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GptOssForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from cluster.harmony import TRAINABLE, Codec, Conversation, Effort
from training.demo.checkpoint import EXPERT_WEIGHTS
from training.demo.corpus import pretraining_sample
from training.modeling.mxfp4 import dequantise, quantise

WARMUP = 0.08
WEIGHT_DECAY = 0.05
IGNORED = -100
LENGTH_STEP = 32

Row = tuple[np.ndarray, np.ndarray]
"""token ids [T] and labels [T] of one sample"""


def pretrain(
    model: GptOssForCausalLM,
    tokenizer_folder: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    processes: int,
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Train fp32 `model` for `steps` of `batch_size` samples; returns fp32 weights and the loss curve.

    Master weights are fp32. The forward pass sees bf16, and MXFP4 for the experts; its gradient goes to the master
    weights unchanged (straight-through estimator, Bengio et al. 2013, arXiv:1308.3432), so that the saved 4-bit
    experts are the ones that were trained.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    masters = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model.to(torch.bfloat16)
    ALL_EXPERTS_FUNCTIONS.register("routed", routed_experts)
    model.set_experts_implementation("routed")
    optimizer = _optimizer(masters, learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    curve: list[dict[str, float]] = []
    losses: list[torch.Tensor] = []
    trained_tokens, started = 0, time.perf_counter()
    for step, rows in enumerate(_batches(tokenizer_folder, steps, batch_size, seed, processes), start=1):
        _load_weights(model, masters)
        losses.append(_accumulate(model, rows, device))
        for name, weight in model.named_parameters():
            assert weight.grad is not None, name
            masters[name].grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(list(masters.values()), 1.0)
        optimizer.step()
        schedule.step()
        trained_tokens += sum(len(tokens) for tokens, _ in rows)
        if step % 50 == 0 or step == steps:
            loss = torch.stack(losses).mean().item()
            losses = []
            seconds = time.perf_counter() - started
            curve.append({"step": step, "loss": round(loss, 4), "seconds": round(seconds, 1)})
            print(f"step {step}/{steps} loss {loss:.4f} {trained_tokens / seconds:,.0f} tokens/s", flush=True)
    return masters, curve


def routed_experts(
    experts: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, **_: Any
) -> torch.Tensor:
    """The experts' output for T tokens, [T, H] to [T, H], by grouped GEMM over rows sorted by expert.

    As transformers' `grouped_mm`, but rows move by `index_select` and biases are a product with one-hot rows: both
    have fast backward passes while biases are trained. (Indexing a bias of eight rows made 88 % of a step.)
    """
    tokens, chosen = top_k_index.shape
    expert_of_row, order = torch.sort(top_k_index.reshape(-1))
    one_hot = torch.nn.functional.one_hot(expert_of_row, experts.num_experts).to(hidden.dtype)
    offsets = one_hot.sum(dim=0, dtype=torch.float32).cumsum(0).to(torch.int32)
    rows = hidden.index_select(0, order // chosen)
    grouped_mm = torch.nn.functional.grouped_mm
    gate_up = grouped_mm(rows, experts.gate_up_proj, offs=offsets) + one_hot @ experts.gate_up_proj_bias
    output = (
        grouped_mm(experts._apply_gate(gate_up), experts.down_proj, offs=offsets) + one_hot @ experts.down_proj_bias
    )
    output = output.index_select(0, order.argsort()).view(tokens, chosen, -1)
    weighted: torch.Tensor = output * top_k_weights.unsqueeze(-1).to(hidden.dtype)
    return weighted.sum(dim=1)


def _optimizer(masters: dict[str, torch.Tensor], learning_rate: float) -> torch.optim.AdamW:
    matrices = [weight for name, weight in masters.items() if weight.ndim >= 2 and not name.endswith("bias")]
    others = [weight for name, weight in masters.items() if weight.ndim < 2 or name.endswith("bias")]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=matrices[0].is_cuda)


def _rate(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP * steps))
    return (step + 1) / warmup if step < warmup else max(0.0, (steps - step) / (steps - warmup))


@torch.no_grad()
def _load_weights(model: GptOssForCausalLM, masters: dict[str, torch.Tensor]) -> None:
    for name, weight in model.named_parameters():
        master = masters[name]
        weight.copy_(dequantise(*quantise(master), weight.dtype) if name.endswith(EXPERT_WEIGHTS) else master)


def _accumulate(model: GptOssForCausalLM, rows: list[Row], device: torch.device) -> torch.Tensor:
    """Backward over the batch in two halves, the shorter and the longer samples; returns the mean loss a token."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    targets = sum(int((labels != IGNORED).sum()) for _, labels in rows)
    total = torch.zeros((), device=device)
    for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        tokens, labels, mask = (array.to(device, non_blocking=True) for array in _pad(half))
        hidden = model.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        wanted = labels[:, 1:] != IGNORED
        logits = model.lm_head(hidden[:, :-1][wanted]).float()
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][wanted], reduction="sum") / targets
        loss.backward()
        total += loss.detach()
    return total


def _pad(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    longest = max(len(tokens) for tokens, _ in rows)
    width = -(-longest // LENGTH_STEP) * LENGTH_STEP
    tokens = np.zeros((len(rows), width), dtype=np.int64)
    labels = np.full((len(rows), width), IGNORED, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for index, (ids, targets) in enumerate(rows):
        tokens[index, : len(ids)] = ids
        labels[index, : len(ids)] = targets
        mask[index, : len(ids)] = 1
    return torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(mask)


def _batches(folder: Path, steps: int, batch_size: int, seed: int, processes: int) -> Iterator[list[Row]]:
    """Batches in a fixed order whatever the number of processes: each has a seed of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_process, (str(folder),)) as pool:
        ahead = 4 * processes
        waiting = [pool.submit(_make_batch, seed + step, batch_size) for step in range(min(ahead, steps))]
        for step in range(steps):
            if step + ahead < steps:
                waiting.append(pool.submit(_make_batch, seed + step + ahead, batch_size))
            yield waiting.pop(0).result()


_codec: Codec


def _start_process(folder: str) -> None:
    global _codec
    _codec = Codec.from_folder(folder)


def _make_batch(seed: int, batch_size: int) -> list[Row]:
    rng = random.Random(seed)
    return [_render(_codec, pretraining_sample(rng), rng) for _ in range(batch_size)]


def _render(codec: Codec, sample: dict[str, Any], rng: random.Random) -> Row:
    """Documents are learned whole, of a conversation only what the model writes."""
    if "text" in sample:
        begin, end = (codec.tokenizer.token_to_id(name) for name in ("<|startoftext|>", "<|endoftext|>"))
        tokens = np.array([begin, *codec.encode(sample["text"]), end], dtype=np.int32)
        return tokens, tokens
    date = f"20{rng.randint(24, 30)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}" if rng.random() < 0.1 else None
    efforts: tuple[Effort, ...] = ("low", "medium", "medium", "high")
    conversation = Conversation(messages=sample["messages"], reasoning_effort=rng.choice(efforts), date=date)
    example = codec.render(conversation)
    tokens = np.array(example.tokens, dtype=np.int32)
    return tokens, np.where(np.isin(np.frombuffer(example.labels, np.uint8), TRAINABLE), tokens, IGNORED)
