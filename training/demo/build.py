"""Makes the demo from nothing: data sets, tokenizer and the pre-trained base model.

    python -m training.demo.build                 # from random weights, on a GPU
    python -m training.demo.build --continue      # train the model in --out further, on any machine
    python -m training.demo.build --only data     # the data sets alone

Data sets and tokenizer are byte-identical wherever they are made. The model repeats on the same device and versions
up to the order in which a GPU adds numbers; `model/build.json` records each training of the one that is shipped: its
command, device, loss curve and measured shares.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from training.demo.corpus import fine_tuning_samples, heldout_questions, pretraining_sample

FOLDER = Path(__file__).parent
SEED = 20260
SAMPLES_PER_LANGUAGE = 250
QUESTIONS_PER_TASK = 4
TOKENIZER_SAMPLES = 30_000


def main() -> None:
    """Command line of `python -m training.demo.build`."""
    parser = argparse.ArgumentParser(prog="python -m training.demo.build", description=__doc__)
    parser.add_argument("--only", choices=("data",), help="make one part only")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write to (default: training/demo)")
    parser.add_argument("--steps", type=int, default=4000, help="pre-training steps (default: 4000)")
    parser.add_argument("--batch-size", type=int, default=512, help="samples a step (default: 512)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at its peak (default: 2e-3)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of weights and samples (default: {SEED})")
    parser.add_argument("--continue", dest="resume", action="store_true", help="from the model in --out")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that make samples")
    arguments = parser.parse_args()
    build_data(arguments.out / "data")
    if arguments.only != "data":
        build_model(arguments.out, arguments)


def build_data(folder: Path) -> None:
    """Write `train.jsonl` (conversations to fine-tune on) and `heldout.jsonl` (questions with accepted answers)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "train.jsonl", fine_tuning_samples(SEED, SAMPLES_PER_LANGUAGE))
    write_jsonl(folder / "heldout.jsonl", heldout_questions(SEED, QUESTIONS_PER_TASK))


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, UTF-8."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def build_model(folder: Path, options: argparse.Namespace) -> None:
    """Train tokenizer and base model, or the model further, write `model/`, and measure it on the held-out questions.

    `options` are those of the command line; `build.json` gains one record for each training.
    """
    import torch
    from tokenizers import Tokenizer

    from training.demo.checkpoint import demo_config, load_weights, new_model, save_checkpoint
    from training.demo.measure import measure, read_records
    from training.demo.pretrain import pretrain
    from training.demo.tokenizer import save_tokenizer, train_tokenizer

    checkpoint = folder / "model"
    checkpoint.mkdir(parents=True, exist_ok=True)
    if options.resume:
        tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        records = json.loads((checkpoint / "build.json").read_text(encoding="utf-8"))
    else:
        tokenizer, records = train_tokenizer(_tokenizer_texts()), []
        save_tokenizer(tokenizer, checkpoint)
    config = demo_config(tokenizer)
    model = new_model(config, options.seed)
    if options.resume:
        load_weights(model, checkpoint)
    weights, curve = pretrain(
        model,
        checkpoint,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
        processes=options.processes,
    )
    save_checkpoint(weights, config, tokenizer, checkpoint)
    shares = measure(checkpoint, read_records(folder / "data" / "heldout.jsonl"))
    print(json.dumps(shares, indent=2))
    record = {
        "command": "python -m training.demo.build " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "samples": options.steps * options.batch_size,
        "heldout": shares,
        "loss": curve,
    }
    (checkpoint / "build.json").write_text(json.dumps([*records, record], indent=1) + "\n", encoding="utf-8")


def _tokenizer_texts() -> Iterable[str]:
    rng = random.Random(SEED)
    for _ in range(TOKENIZER_SAMPLES):
        sample = pretraining_sample(rng)
        if "text" in sample:
            yield sample["text"]
        for message in sample.get("messages", ()):
            yield message["content"]
            yield message.get("thinking") or ""
    yield from SYSTEM_TEXT * 2000


SYSTEM_TEXT = (
    "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\nCurrent date: 2025-01-01"
    "\n\nReasoning: medium\n\nReasoning: low\n\nReasoning: high\n\n# Valid channels: analysis, commentary, final. "
    "Channel must be included for every message.",
    "# Instructions\n\n",
    "system",
    "developer",
    "user",
    "assistant",
    "analysis",
    "commentary",
    "final",
)


if __name__ == "__main__":
    main()
