"""A tiny gpt-oss and documents for it, packed and apart: what the tests of packing measure, on any device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from transformers import GptOssConfig, GptOssForCausalLM

from cluster.harmony import Label
from training.data.collator import IGNORED, Collator
from training.data.documents import Document
from training.data.packing import Row, pack
from training.modeling.isolation import isolate_documents


def tiny_model(attention: str = "eager", device: str = "cpu") -> GptOssForCausalLM:
    """A sliding and a full layer, with a window shorter than the documents, and sinks that matter."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16}
    config = GptOssConfig(vocab_size=97, num_hidden_layers=2, **sizes, **heads)
    config._attn_implementation = attention
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


def mean_losses(model: GptOssForCausalLM) -> MeanLosses:
    """The same documents three times."""
    given = documents(24)
    rows, alone = list(pack(given, 128, "0:0")), list(pack(given, 128, "0:0", alone=True))
    assert len(rows) < 10
    leaking, targets = losses(model, rows)
    apart = [losses(model, [row]) for row in alone]
    handle = isolate_documents(model)
    try:
        packed, packed_targets = losses(model, rows)
    finally:
        handle.remove()
    assert packed_targets == targets == sum(number for _, number in apart)
    return MeanLosses(packed / targets, leaking / targets, sum(total for total, _ in apart) / targets)


def losses(model: GptOssForCausalLM, rows: list[Row]) -> tuple[float, int]:
    """Sum of the negative log-likelihood over all targets, and their number."""
    batch = Collator({"analysis": 1.0, "final": 1.0})([row._asdict() for row in rows])
    labels = batch.pop("labels")[:, 1:]
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = labels.to(model.device)
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1]
    wanted = labels != IGNORED
    total = torch.nn.functional.cross_entropy(logits[wanted].double(), labels[wanted], reduction="sum")
    return float(total), int(wanted.sum())
