"""Times what turns conversations into packed rows, against `apply_chat_template` for each of the same conversations.

python -m tests.benchmarks.data

Both use gpt-oss's real vocabulary on one core, in turns within one process. The rival renders and tokenises with the
hub's chat template (as trl ships it); it makes no labels and packs nothing.
"""

from __future__ import annotations

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from cluster.harmony import Codec
from tests.benchmarks.record import keep
from tests.o200k import save_o200k_tokenizer
from training.data.conversations import parts, read_part
from training.data.documents import Counts, read_documents
from training.data.packing import pack
from training.demo import problems
from training.demo.phrasebook import LANGUAGES
from training.sections import DataConfig

SAMPLES = 600
TOKENS = 1000
ROUNDS = 5
SEQUENCE_LENGTH = 4096
COPIES = (20, 100)


def main() -> int:
    """Measure, print, and write the result file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.jsonl"
        codec = Codec.from_folder(save_o200k_tokenizer(Path(folder)))
        records = make_records(codec)
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
        template = files("trl").joinpath("chat_templates", "gptoss.jinja").read_text(encoding="utf-8")
        rival = PreTrainedTokenizerFast(tokenizer_file=str(Path(folder) / "tokenizer.json"), chat_template=template)
        counts = Counts()
        config = DataConfig(train=str(path), sequence_length=SEQUENCE_LENGTH)

        def ours() -> None:
            found = (item for part in parts(str(path)) for item in read_part(part, config.columns))
            for _ in pack(read_documents(found, codec, config, counts), SEQUENCE_LENGTH, "0:0"):
                pass

        def theirs() -> None:
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    rival.apply_chat_template(json.loads(line)["messages"], tokenize=True)

        seconds = in_turns({"raysoner: read, render, label, tokenise, pack": ours, "apply_chat_template": theirs})
        memory = {copies: peak_memory_mib(path, copies) for copies in COPIES}
    tokens = counts["tokens"] / counts["conversations"]
    rows = [
        {
            "name": name,
            "samples_per_minute": round(SAMPLES / best * 60),
            "tokens_per_second": round(SAMPLES * tokens / best),
            "times_faster": round(seconds["apply_chat_template"] / best, 2),
        }
        for name, best in seconds.items()
    ]
    for row in rows:
        print(row)
    sizes: list[dict[str, Any]] = [{"name": "sample", "tokens": round(tokens)}]
    for copies, mib in memory.items():
        sizes.append({"name": f"raysoner on {SAMPLES * copies} samples", "peak_memory_mib": mib})
    print(sizes)
    command = "python -m tests.benchmarks.data"
    print(keep("data", "o200k", f"cpu{os.cpu_count()}", command, [*rows, *sizes]))
    return 0


def peak_memory_mib(path: Path, copies: int) -> int:
    """Peak memory of a process that streams the samples `copies` times over."""
    code = (
        "import resource, sys\n"
        "from tests.benchmarks.data import stream\n"
        "stream(sys.argv[1], int(sys.argv[2]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    command = [sys.executable, "-c", code, str(path), str(copies)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)


def stream(path: str, copies: int) -> None:
    """Read, render, label, tokenise and pack the samples at `path`, `copies` times over, keeping nothing."""
    config = DataConfig(train=path, sequence_length=SEQUENCE_LENGTH)
    found = (item for _ in range(copies) for part in parts(path) for item in read_part(part, config.columns))
    codec = Codec.from_folder(Path(path).parent)
    for _ in pack(read_documents(found, codec, config, Counts()), SEQUENCE_LENGTH, "0:0"):
        pass


def make_records(codec: Codec) -> list[dict[str, Any]]:
    """Conversations of about `TOKENS` tokens in the demo's nine languages."""
    rng = random.Random(0)
    records = []
    for number in range(SAMPLES):
        language = LANGUAGES[number % len(LANGUAGES)]
        thinking = ""
        while len(codec.encode(thinking)) < TOKENS - 160:
            problem = problems.draw(rng.choice(problems.TASKS), rng, "train")
            thinking += f"{problems.steps(problem, language)}\n"
        messages = [
            {"role": "developer", "content": "reasoning language: French"},
            {"role": "user", "content": problems.question(problem, language, rng, "train")},
            {"role": "assistant", "thinking": thinking, "content": problems.answer(problem, language)},
        ]
        records.append({"messages": messages})
    return records


def in_turns(contestants: dict[str, Callable[[], None]]) -> dict[str, float]:
    """The best of `ROUNDS` for each, in seconds, one after the other in every round."""
    best = dict.fromkeys(contestants, float("inf"))
    for _ in range(ROUNDS):
        for name, work in contestants.items():
            started = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


if __name__ == "__main__":
    sys.exit(main())
