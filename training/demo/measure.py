"""Measures a demo checkpoint with real, greedy generation on the held-out questions."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cluster.harmony import Codec, Conversation, Reply
from training.demo.grading import adheres, is_right

MAXIMUM_TOKENS = 256


def measure(checkpoint: Path, questions: Path, *, batch_size: int = 60) -> dict[str, Any]:
    """Shares of 1 over the questions: `accuracy`, `adherence` outside English, and both by language and task."""
    records = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    replies = generate(checkpoint, records, batch_size=batch_size)
    right: dict[str, list[bool]] = defaultdict(list)
    adhering: dict[str, list[bool]] = defaultdict(list)
    for record, reply in zip(records, replies, strict=True):
        for key in ("all", record["language"], record["task"]):
            right[key].append(is_right(record, reply.final))
        foreign = ["all"] if record["language"] != "en" else []
        for key in (*foreign, record["language"], record["task"]):
            adhering[key].append(adheres(record, reply.analysis))
    return {
        "questions": len(records),
        "accuracy": _share(right.pop("all")),
        "adherence": _share(adhering.pop("all")),
        "accuracy_by": {key: _share(values) for key, values in right.items()},
        "adherence_by": {key: _share(values) for key, values in adhering.items()},
    }


def generate(checkpoint: Path, records: list[dict[str, Any]], *, batch_size: int = 60) -> list[Reply]:
    """Greedy replies to the records' messages, left-padded batches through transformers' `generate`."""
    codec = Codec.from_folder(checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16 if device == "cuda" else torch.float32
    )
    model = model.to(device).eval()
    prompts = [codec.prompt(Conversation(messages=record["messages"])) for record in records]
    padding = model.generation_config.pad_token_id
    replies: list[Reply] = []
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        width = max(map(len, batch))
        tokens = torch.tensor([[padding] * (width - len(prompt)) + prompt for prompt in batch], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch], device=device)
        output = model.generate(
            tokens,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=MAXIMUM_TOKENS,
            eos_token_id=[*codec.stop_tokens],
        )
        replies += [codec.parse(_until_stop(row, codec.stop_tokens)) for row in output[:, width:].tolist()]
    return replies


def _until_stop(tokens: list[int], stop_tokens: tuple[int, ...]) -> list[int]:
    ends = [index for index, token in enumerate(tokens) if token in stop_tokens]
    return tokens[: ends[0] + 1] if ends else tokens


def _share(values: list[bool]) -> float:
    return round(sum(values) / len(values), 4)
