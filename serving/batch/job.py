"""The Ray Data job: actors that load an engine once, and answer one part after the other."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Generator as Stream
from contextlib import closing
from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster.config import ConfigError
from cluster.storage import Storage, StorageError
from serving.batch import inputs, outputs
from serving.batch.inputs import Part
from serving.batch.outputs import Format
from serving.batch.rows import Answering, Drawing, Row, answer_all
from serving.config import ServingConfig
from serving.engines.base import CheckpointError, Engine, EngineError
from serving.replica import load_checkpoint

PARTS_AT_A_TIME = 2
"""parts that an actor answers side by side: while the last rows of one end, the next keeps the engine busy"""
_LARGEST_PLAN = 4096
"""blocks of the data set that lists the parts"""


class Job(BaseModel):
    """Everything an actor needs to know. Locations are of storages that every node reaches."""

    model_config = ConfigDict(frozen=True)

    config: ServingConfig
    input: str
    output: str
    format: Format
    drawing: Drawing
    in_flight: int
    strict: bool


class PartDone(BaseModel):
    """What came of a part: it was written, or `failure` says in one sentence why the whole batch has to stop."""

    model_config = ConfigDict(frozen=True)

    rows: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    outcomes: dict[str, int] = {}
    """of answers, by outcome"""
    errors: dict[str, int] = {}
    """rows without an answer, by the error's code"""
    failure: str = ""


class Generator:
    """An actor of the job.

    Errors travel in `PartDone`: what an actor raises, Ray Data tries again or hides in a trace.

    Args:
        raw: a `Job` as `model_dump(mode="json")` gives it.
    """

    def __init__(self, raw: dict[str, Any]) -> None:
        self._engine: Engine | None = None
        self.job = Job.model_validate(raw)
        self.failure = ""
        self.output = Storage.at(self.job.output)
        self._places = asyncio.Semaphore(self.job.in_flight)
        try:
            self.input, _ = inputs.open_input(self.job.input)
            self._engine, codec = load_checkpoint(self.job.config)
        except (CheckpointError, ConfigError, EngineError, MemoryError) as error:
            self.failure = str(error)
            return
        self._answering = Answering(self.job.config, self._engine, codec, self.job.drawing, strict=self.job.strict)

    async def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Answers the one part that `batch` names; Ray Data runs several of these calls on one event loop."""
        done = await self._answer(Part.model_validate_json(str(batch["part"][0])))
        return {"done": [done.model_dump_json()]}

    async def _answer(self, part: Part) -> PartDone:
        if self.failure:
            return PartDone(failure=self.failure)
        began = time.monotonic()
        try:
            lines = await asyncio.to_thread(inputs.read, self.input, part)
            rows = await answer_all(self._answering, lines, self._places)
            await asyncio.to_thread(outputs.write, self.output, part, rows, self.job.format)
        except EngineError as error:
            return PartDone(failure=f"the engine failed: {error}")
        except (StorageError, FileNotFoundError) as error:
            return PartDone(failure=str(error))
        except ValueError as error:
            if not self.job.strict:
                raise
            return PartDone(failure=str(error))
        return _counted(part, rows, time.monotonic() - began)

    def __del__(self) -> None:
        if self._engine is not None:
            self._engine.stop()


def run(job: Job, parts: list[Part], actors: int) -> Stream[PartDone, None, None]:
    """Answers `parts` on at most `actors` actors; what came of each, as it comes. Ray must be initialised.

    Stop at the first that has a `failure`: closing the iterator ends the actors.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    replicas = job.config.replicas
    items = [{"part": part.model_dump_json()} for part in parts]
    done = ray.data.from_items(items, override_num_blocks=min(len(items), _LARGEST_PLAN)).map_batches(
        Generator,
        fn_constructor_args=(job.model_dump(mode="json"),),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=actors, max_tasks_in_flight_per_actor=2 * PARTS_AT_A_TIME
        ),
        num_cpus=replicas.cpus,
        num_gpus=replicas.gpus,
        max_concurrency=PARTS_AT_A_TIME,
    )
    # Closing ends the actors at once; an iterator that is only dropped ends them some time later.
    with closing(iter(done.iter_batches(batch_size=None, prefetch_batches=0))) as blocks:
        for block in blocks:
            for row in block["done"]:
                yield PartDone.model_validate_json(str(row))


def _counted(part: Part, rows: list[Row], seconds: float) -> PartDone:
    usages = [row["usage"] for row in rows if "usage" in row]
    return PartDone(
        rows=part.rows,
        seconds=seconds,
        prompt_tokens=sum(usage["prompt_tokens"] for usage in usages),
        completion_tokens=sum(usage["completion_tokens"] for usage in usages),
        outcomes=Counter(row["outcome"] for row in rows if "outcome" in row),
        errors=Counter(str(row["error"]["code"]) for row in rows if "error" in row),
    )
