"""Measures a demo checkpoint with real, greedy generation, on held-out questions or on others like them.

    python -m training.demo.measure CHECKPOINT [CHECKPOINT ...]

asks questions that are in no shipped file. The demo's settings are chosen by these: the shipped held-out questions
judge, and a set that one has chosen by judges no more.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from cluster.harmony import Codec, Conversation, Reply
from training.demo.corpus import heldout_questions
from training.demo.grading import adheres, is_right

MAXIMUM_TOKENS = 256
SEED = 20261
QUESTIONS_PER_TASK = 12
HELDOUT = Path(__file__).parent / "data" / "heldout.jsonl"


def main() -> None:
    """Command line of `python -m training.demo.measure`."""
    parser = argparse.ArgumentParser(prog="python -m training.demo.measure", description=__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="folder of a checkpoint")
    parser.add_argument(
        "--per-task", type=int, default=QUESTIONS_PER_TASK, help="questions for each language and task (default: 12)"
    )
    arguments = parser.parse_args()
    records = validation_questions(arguments.per_task)
    for checkpoint in arguments.checkpoints:
        print(json.dumps({"checkpoint": str(checkpoint), **measure(checkpoint, records)}), flush=True)


def validation_questions(per_task: int) -> list[dict[str, Any]]:
    """Questions made as the held-out ones are, of the same material, none of which is in the shipped file."""
    shipped = {_asked(record) for record in read_records(HELDOUT)}
    return [record for record in heldout_questions(SEED, per_task) if _asked(record) not in shipped]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file of questions."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measure(checkpoint: Path, records: list[dict[str, Any]], *, batch_size: int = 60) -> dict[str, Any]:
    """Shares of 1 over the questions: `accuracy`, `adherence` outside English, and both by language and task."""
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


def _asked(record: dict[str, Any]) -> str:
    return str(record["messages"][-1]["content"])


def _until_stop(tokens: list[int], stop_tokens: tuple[int, ...]) -> list[int]:
    ends = [index for index, token in enumerate(tokens) if token in stop_tokens]
    return tokens[: ends[0] + 1] if ends else tokens


def _share(values: list[bool]) -> float:
    return round(sum(values) / len(values), 4)


if __name__ == "__main__":
    main()
