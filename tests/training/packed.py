"""A tiny gpt-oss and documents for it, packed and apart: what the tests of packing measure, on any device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import GptOssConfig, GptOssForCausalLM

from cluster.harmony import Label
from training.data.collator import IGNORED, Collator
from training.data.documents import Document
from training.data.packing import Row, pack
from training.modeling.isolation import isolate_documents

Form = Literal["positions", "mask", "tokens"]
"""what a batch holds beside its tokens: position ids as the collator's, a padding mask, or nothing"""


def tiny_model(attention: str = "eager", device: str = "cpu") -> GptOssForCausalLM:
    """A sliding and a full layer, with a window shorter than the documents, and sinks that matter."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16}
    config = GptOssConfig(vocab_size=97, num_hidden_layers=2, **sizes, **heads)
    config._attn_implementation = attention
    config._experts_implementation = "eager"
    model = GptOssForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "sinks" in name or "proj" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model.to(device)


def documents(count: int, seed: int = 0, longest: int = 60) -> list[Document]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(rng.integers(5, longest))
        labels = rng.choice([Label.USER, Label.ANALYSIS, Label.FINAL], length).astype(np.uint8)
        made.append(Document(rng.integers(0, 97, length).astype(np.int32), labels))
    return made


class MeanLosses(NamedTuple):
    """Negative log-likelihood a target: of rows with the isolation, without it, and of each document alone."""

    packed: float
    leaking: float
    apart: float


def mean_losses(model: GptOssForCausalLM, stock: GptOssForCausalLM) -> MeanLosses:
    """The same documents three times; `stock` has the same weights and reads each of them alone, with eager attention.

    Its batches hold no position ids and it has no isolation, so nothing of ours takes part in `apart`.
    """
    assert stock.config._attn_implementation == "eager"
    given = documents(24)
    rows, alone = list(pack(given, 128, "0:0")), list(pack(given, 128, "0:0", alone=True))
    assert len(rows) < 10
    leaking, targets = losses(model, rows)
    apart = [losses(stock, [row], "tokens") for row in alone]
    handle = isolate_documents(model)
    try:
        packed, packed_targets = losses(model, rows)
    finally:
        handle.remove()
    assert packed_targets == targets == sum(number for _, number in apart)
    return MeanLosses(packed / targets, leaking / targets, sum(total for total, _ in apart) / targets)


def losses(model: GptOssForCausalLM, rows: Sequence[Row], form: Form = "positions") -> tuple[float, int]:
    """Sum of the negative log-likelihood over all targets, and their number."""
    inputs, labels = batch(rows, form, model.device)
    with torch.no_grad():
        logits = model(**inputs).logits
    return float(_total_loss(logits.double(), labels)), int((labels[:, 1:] != IGNORED).sum())


class Outcome(NamedTuple):
    """What a model makes of documents: `logits` [length, V] by a document's tokens, `gradients` by a weight's name."""

    logits: dict[tuple[int, ...], Tensor]
    gradients: dict[str, Tensor]


def outcome(
    model: GptOssForCausalLM, batches: Iterable[Sequence[Row]], form: Form, *, backward: bool = True
) -> Outcome:
    """Of all batches together; the loss is the sum over all targets, so it does not matter how they are batched."""
    model.zero_grad()
    logits: dict[tuple[int, ...], Tensor] = {}
    for rows in batches:
        inputs, labels = batch(rows, form, model.device)
        with torch.set_grad_enabled(backward):
            found = model(**inputs).logits
            if backward:
                _total_loss(found, labels).backward()
        for row, of_row in zip(rows, found.detach().cpu(), strict=True):
            for start, end in spans(row):
                logits[tuple(row.tokens[start:end].tolist())] = of_row[start:end]
    gradients = {
        name: weight.grad.cpu().clone() for name, weight in model.named_parameters() if weight.grad is not None
    }
    model.zero_grad()
    return Outcome(logits, gradients)


def spans(row: Row) -> list[tuple[int, int]]:
    """Where each document of a row begins and ends."""
    ends = np.cumsum(row.lengths).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def batch(rows: Sequence[Row], form: Form, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], Tensor]:
    """Keywords of a forward pass, and the labels [B, T]; on a GPU of one length, for kernels compiled for it."""
    multiple = 128 if torch.device(device).type == "cuda" else 1
    made = Collator({"analysis": 1.0, "final": 1.0}, multiple=multiple)([row._asdict() for row in rows])
    labels = made.pop("labels").to(device)
    if form != "positions":
        del made["position_ids"]
    if form == "mask":
        used = torch.tensor([[len(row.tokens)] for row in rows])
        made["attention_mask"] = (torch.arange(labels.shape[1]) < used).long()
    return {name: tensor.to(device) for name, tensor in made.items()}, labels


def _total_loss(logits: Tensor, labels: Tensor) -> Tensor:
    predicted, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(predicted, wanted, reduction="sum", ignore_index=IGNORED)


def rows_of_documents(*, alone: bool) -> list[Row]:
    """Documents of up to 200 tokens: longer than the window and than a block of a mask."""
    return list(pack(documents(10, longest=200), 300, "0:0", alone=alone))


def one_by_one(device: str = "cpu") -> Outcome:
    """What stock transformers makes of the documents, each in a batch of its own, without anything of ours."""
    return outcome(tiny_model("eager", device), ([row] for row in rows_of_documents(alone=True)), "tokens")


def isolated(implementation: str, device: str = "cpu") -> GptOssForCausalLM:
    model = tiny_model(implementation, device)
    isolate_documents(model)
    return model


def assert_same(found: Outcome, expected: Outcome, tolerance: float = 1e-5) -> None:
    assert found.logits.keys() == expected.logits.keys()
    for tokens, logits in found.logits.items():
        assert torch.allclose(logits, expected.logits[tokens], rtol=0, atol=tolerance), len(tokens)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in found.gradients.items():
        scale = float(expected.gradients[name].abs().max())
        assert scale > 0, name
        assert torch.allclose(gradient, expected.gradients[name], rtol=0, atol=tolerance * scale + 1e-7), name


def random_positions(rows: int, length: int, seed: int) -> Tensor:
    """Positions [B, T] of documents of one token up to the whole row."""
    rng = np.random.default_rng(seed)
    positions = np.empty((rows, length), np.int64)
    for row in positions:
        start = 0
        while start < length:
            size = min(int(rng.choice([1, 7, 60, 128, 300, 1024]) * rng.uniform(0.5, 1)) + 1, length - start)
            row[start : start + size] = np.arange(size)
            start += size
    return torch.from_numpy(positions)


def allowed(positions: Tensor, window: int | None) -> Tensor:
    """Bool [B, T, T]: the definition of causal attention inside a document and a window, entry by entry."""
    document = (positions == 0).cumsum(dim=1)
    queries = torch.arange(positions.shape[1], device=positions.device)
    behind = queries[:, None] - queries
    causal = (behind >= 0) & (behind < (window or positions.shape[1]))
    return causal & (document[:, :, None] == document[:, None, :])


def defined(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, sinks: Tensor) -> Tensor:
    """The definition [B, T, heads, D]: softmax over a query's scores and its head's sink, whose share is dropped."""
    scores, value = masked_scores(query, key, value, seen, query.shape[-1] ** -0.5)
    sink = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    shares = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    return (shares @ value).transpose(1, 2)


def masked_scores(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scores [B, heads, T, T], and the values of each query head."""
    times = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(times, 1).transpose(-1, -2) * scale
    return scores.masked_fill(~seen[:, None], -torch.inf), value.repeat_interleave(times, 1)


def dense_attend(
    query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scaling: float, kernel_options: Any
) -> tuple[Tensor, Tensor]:
    """In place of FlexAttention where it has no backward pass: the same two results, from a dense softmax."""
    rows, _, queries, keys = block_mask.shape
    assert (queries, keys) == (query.shape[2], key.shape[2])
    seen = create_mask(block_mask.mask_mod, rows, 1, queries, keys, str(query.device))[:, 0]
    scores, value = masked_scores(query, key, value, seen, scaling)
    return scores.softmax(dim=-1) @ value, scores.logsumexp(dim=-1)
