"""python -m serving batch IN OUT: flags, the job, and its progress."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from cluster.config import ConfigError, ConfigParser
from cluster.local import OBJECT_STORE_BYTES
from cluster.storage import Storage, StorageError, is_uri
from cluster.tables import duration
from serving.batch import inputs, outputs
from serving.batch.inputs import Part
from serving.batch.job import Job, PartDone, run
from serving.batch.rows import Drawing
from serving.config import ServingConfig

_LINE_SECONDS = 10.0
"""between lines of progress where the output is no terminal"""


def main(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit status: 0 when every row has its answer or its error, 1 when the job failed.

    Raises:
        ConfigError: a flag, a setting, IN or OUT is no good.
    """
    parser = _parser()
    config, flags = parser.load(ServingConfig, arguments)
    # Actors run in other folders than this process: only an absolute path means the same to them.
    config, location = config.with_absolute_paths(), _place(flags.input)
    drawing = _drawing(flags, config)
    storage, names = inputs.open_input(location)
    suffix: outputs.Format = flags.format or ("parquet" if names[0].endswith(".parquet") else "jsonl")
    files, parts = inputs.split(storage, names, flags.part_rows)
    try:
        output = Storage.at(_place(flags.output))
    except StorageError as error:
        raise ConfigError(f"OUT: {error}") from None
    manifest = outputs.Manifest(
        files=files,
        part_rows=flags.part_rows,
        format=suffix,
        model=config.model,
        default_effort=config.default_effort,
        policy=config.policy,
        prompt_tokens=config.limits.prompt_tokens,
        drawing=drawing,
    )
    outputs.claim(output, manifest)
    todo = outputs.missing(output, parts, suffix)
    rows, left = sum(part.rows for part in parts), sum(part.rows for part in todo)
    print(f"{rows:,} rows in {len(parts):,} parts, {rows - left:,} rows answered before", flush=True)
    if not todo:
        return 0
    job = Job(
        config=config,
        input=location,
        output=_place(flags.output),
        format=suffix,
        drawing=drawing,
        in_flight=flags.in_flight or 2 * config.engine.maximum_concurrent,
        strict=flags.strict,
    )
    status = _on_ray(config, lambda: _run(job, todo, flags.actors or config.replicas.maximum))
    if status == 0:
        outputs.remove_scratch(output)
    return status


def _parser() -> ConfigParser:
    parser = ConfigParser(
        ServingConfig,
        prog="python -m serving batch",
        description="Answers prompts without an endpoint, with the same engines, prompts and parsing. IN is a JSONL or "
        "Parquet file, or a folder of either: each row has messages (or prompt), and may have reasoning_language, "
        "reasoning_effort and id. OUT is a folder that gets a part for every so many rows, in their order; a row that "
        "is no good becomes an error with its file and line. The same command again goes on where it was stopped. Runs "
        "on the Ray cluster that RAY_ADDRESS names, whose nodes must reach IN and OUT, or on a local Ray.",
    )
    add = parser.add_argument
    add("input", metavar="IN", help="file or folder of prompts: a path or a URI such as s3://bucket/prompts")
    add("output", metavar="OUT", help="folder of answers: a path or a URI")
    add("--format", choices=("jsonl", "parquet"), help="of the parts; that of IN if not given")
    add("--part-rows", type=_count, default=1000, metavar="N", help="rows of a part (default: 1000)")
    add("--actors", type=_count, metavar="N", help="engines side by side (default: replicas.maximum)")
    add("--in-flight", type=_count, metavar="N", help="rows an engine is given at a time (default: twice its batch)")
    add("--maximum-tokens", type=_count, metavar="N", help="budget of a row (default: engine.default_output_tokens)")
    add("--temperature", type=float, help="0 always takes the most likely token (default: 1)")
    add("--top-p", type=float, help="share of the probability that tokens are drawn from (default: 1)")
    add("--seed", type=int, default=0, help="of the batch; each row draws with one that follows from it (default: 0)")
    add("--strict", action="store_true", help="stop at the first row that is no good instead of noting its error")
    return parser


def _drawing(flags: argparse.Namespace, config: ServingConfig) -> Drawing:
    """Raises ConfigError for what every row would be refused for."""
    budget = flags.maximum_tokens or config.engine.default_output_tokens
    if budget > config.engine.maximum_output_tokens:
        raise ConfigError(
            f"--maximum-tokens {budget} exceeds engine.maximum_output_tokens = {config.engine.maximum_output_tokens}"
        )
    if flags.temperature is not None and not 0 <= flags.temperature <= 2:
        raise ConfigError(f"--temperature must be between 0 and 2, got {flags.temperature:g}")
    if flags.top_p is not None and not 0 < flags.top_p <= 1:
        raise ConfigError(f"--top-p must be above 0 and at most 1, got {flags.top_p:g}")
    return Drawing(maximum_tokens=budget, temperature=flags.temperature, top_p=flags.top_p, seed=flags.seed)


def _on_ray(config: ServingConfig, work: Callable[[], int]) -> int:
    """Runs `work` on the cluster of RAY_ADDRESS, or on a Ray of its own."""
    import ray

    from serving.deployment import connect_to_cluster, require_resources

    try:
        if "RAY_ADDRESS" in os.environ:
            connect_to_cluster()
        else:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
                object_store_memory=OBJECT_STORE_BYTES,
            )
            require_resources(config.replicas.model_copy(update={"minimum": 1}))
        return work()
    finally:
        ray.shutdown()


def _run(job: Job, todo: list[Part], actors: int) -> int:
    progress = Progress(sum(part.rows for part in todo))
    try:
        with closing(run(job, todo, actors)) as results:
            for done in results:
                if done.failure:
                    progress.close()
                    print(f"{done.failure}; the parts that are done stay", file=sys.stderr)
                    return 1
                progress.add(done)
    except KeyboardInterrupt:
        progress.close()
        print("stopped; the same command goes on with the parts that are missing", file=sys.stderr)
        return 130
    progress.close()
    progress.summarise()
    return 0


class Progress:
    """Rows done, rows/s and the time that is left; a line that is written over on a terminal.

    Args:
        total: rows of this run.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.rows = 0
        self.tokens = 0
        self.outcomes: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self._began: float | None = None
        self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def add(self, done: PartDone) -> None:
        """A part was written. The clock starts with the first part, not with its engine."""
        now = time.monotonic()
        self._began = min(self._began or now, now - done.seconds)
        self.rows += done.rows
        self.tokens += done.completion_tokens
        self.outcomes.update(done.outcomes)
        self.errors.update(done.errors)
        if self._terminal or now - self._shown >= _LINE_SECONDS:
            self._shown = now
            print(
                f"\r\033[K{self.line}" if self._terminal else self.line,
                end="" if self._terminal else "\n",
                file=sys.stderr,
                flush=True,
            )

    @property
    def line(self) -> str:
        """Where the job is."""
        rate = self.rows / self._seconds
        left = (self.total - self.rows) / rate
        return (
            f"{self.rows:,}/{self.total:,} rows, {rate:,.1f} rows/s, {self.tokens / self._seconds:,.0f} tokens/s, "
            f"{sum(self.errors.values()):,} errors, {duration(left)} left"
        )

    def close(self) -> None:
        """Leave the line."""
        if self._terminal and self.rows:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def summarise(self) -> None:
        """What came of the rows of this run."""
        print(f"{self.rows:,} rows and {self.tokens:,} tokens in {duration(self._seconds)}")
        for what, found in (("outcomes", self.outcomes), ("errors", self.errors)):
            if found:
                print(f"{what}: {', '.join(f'{count:,} {name}' for name, count in found.most_common())}")

    @property
    def _seconds(self) -> float:
        return max(time.monotonic() - (self._began or time.monotonic()), 1e-3)


def _place(location: str) -> str:
    return location if is_uri(location) else str(Path(location).expanduser().absolute())


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value
