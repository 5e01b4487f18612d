"""Command line of tuning: `python -m tuning search | report | predict`."""

from __future__ import annotations

import re
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType

from cluster.artifacts import ArtifactError
from cluster.config import ConfigError, ConfigParser
from cluster.verbs import run_verb
from training.data.conversations import DataError
from tuning.config import SearchConfig

USAGE = """usage: python -m tuning VERB [flags]

  search  find the fastest batch of a training run on each GPU type of a cluster, or its best learning rate
  report  tables and one HTML page of what was found
  predict the batch that arithmetic expects to be fastest, for a GPU that is not at hand

`python -m tuning VERB --help` lists the flags of a verb."""

SEARCH = """Find the fastest batch of a training run on each GPU type of a Ray cluster, by real training steps.

Give the files of the run as `training run` takes them; every setting of the search is a flag --tuning.NAME or a key of
a table [tuning]:

  python -m tuning search --config training/configs/gpt-oss-20b.toml --data.train train.jsonl --gpu-type H100,A100
  python -m tuning search --config training/configs/gpt-oss-20b.toml --tuning.trials 12 --tuning.minutes 20

With --objective quality it searches rows of a step, learning rate and rank instead, by the held-out loss of whole runs:

  python -m tuning search --objective quality --config training/configs/gpt-oss-20b.toml --data.train train.jsonl \\
      --data.evaluation heldout.jsonl

Each GPU type is searched at the same time. What is found is written to tuning/profiles, where `training run --profile
auto` finds it. The same command again goes on where it was interrupted, and measures nothing twice."""


PREDICT = """Write profiles by arithmetic, for GPUs that are not at hand, where no measured one is there.

  python -m tuning predict --config training/configs/gpt-oss-20b.toml --gpu-type L40S,RTX-4090"""


def main(arguments: list[str]) -> int:
    """Run one verb; returns the exit code: 0 done, 1 failed, 2 something that the user can mend, 130 interrupted."""
    verbs = {"search": _search, "report": _report, "predict": _predict}
    return run_verb(arguments, verbs, USAGE, (ConfigError, DataError, ArtifactError))


def _search(arguments: list[str]) -> int:
    config = _load("search", SEARCH, arguments)
    command = shlex.join(["python", "-m", "tuning", "search", *arguments])
    objectives = {"throughput": _search_batch, "quality": _search_quality}
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return objectives[config.tuning.objective](config, command)
    except KeyboardInterrupt as interrupt:
        print("stopped   what was measured is kept; the same command goes on from there", flush=True)
        return 143 if interrupt.args else 130


def _search_batch(config: SearchConfig, command: str) -> int:
    from tuning.result import write_result
    from tuning.search import search

    results = search(config, command)
    for result in results:
        print(f"written   {write_result(result, Path(config.tuning.profiles))}", flush=True)
    return 0 if all(result.chosen for result in results) else 1


def _search_quality(config: SearchConfig, command: str) -> int:
    from tuning.quality.result import write_result
    from tuning.quality.search import search

    result = search(config, command)
    print(f"written   {write_result(result, Path(config.tuning.profiles))}", flush=True)
    return 0 if result.chosen else 1


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt("terminated")


def _predict(arguments: list[str]) -> int:
    config = _load("predict", PREDICT, arguments)

    from tuning.predict import predict, write_predictions
    from tuning.report import table

    results = predict(config, shlex.join(["python", "-m", "tuning", "predict", *arguments]))
    for result in results:
        print(table(result))
    write_predictions(results, Path(config.tuning.profiles))
    return 0


def _load(verb: str, description: str, arguments: list[str]) -> SearchConfig:
    """The settings of a verb, whose flags `--gpu-type` and `--objective` are short for those of the table [tuning]."""
    parser = ConfigParser(SearchConfig, prog=f"python -m tuning {verb}", description=description)
    parser.add_argument("--gpu-type", help="short for --tuning.gpu_types: names with commas between them, or all")
    parser.add_argument("--objective", help="short for --tuning.objective: throughput or quality")
    words = [re.sub(r"^--gpu-type(?==|$)", "--tuning.gpu_types", word) for word in arguments]
    words = [re.sub(r"^--objective(?==|$)", "--tuning.objective", word) for word in words]
    return parser.load(SearchConfig, words)[0]


def _report(arguments: list[str]) -> int:
    from tuning.report import main as report

    return report(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
