"""Files of a merge as Ray tasks. Options and names go to a task, hashes come back; tensors stay where they are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import ray

from cluster.artifacts import ArtifactError
from cluster.storage import Storage, StorageError
from training.driver import connect
from training.merge.options import Options
from training.merge.target import Written

RETRIES = 3
"""times that Ray runs a task again whose process or node is lost"""


def write_in_parallel(options: Options, folder: str, names: Sequence[str]) -> Iterator[tuple[str, Written]]:
    """Make files of the plan on the cluster, `options.parallel` at once; yields each as it is whole.

    Args:
        options: with locations that every node reaches.
        folder: where the files go.
        names: of the files.

    Raises:
        ArtifactError: as `Job`, of any task.
        StorageError: likewise.
    """
    if not names:
        return
    connect()
    gpus = 1.0 if options.device != "cpu" and ray.cluster_resources().get("GPU") else 0.0
    task = ray.remote(_write_file).options(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)
    waiting = list(names)
    running: dict[Any, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < options.parallel:
                name = waiting.pop(0)
                running[task.remote(asdict(options), folder, name)] = name
            (done,), _ = ray.wait(list(running), num_returns=1)
            name = running.pop(done)
            yield name, Written.from_json(_result(done))
    finally:
        for reference in running:
            ray.cancel(reference)


def _write_file(options: dict[str, Any], folder: str, name: str) -> dict[str, Any]:
    from training.merge.job import Job, worker_threads

    job = Job(Options(**options), check=False)
    return job.write_file(Storage.at(folder), name, worker_threads(), lambda _: None).to_json()


def _result(reference: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ArtifactError | StorageError):
            raise cause from None
        raise
    except ray.exceptions.RayError as error:
        raise StorageError(
            f"a task of the merge was lost {RETRIES + 1} times ({str(error).splitlines()[0]}); see that the cluster's "
            "nodes have memory and stay up, and run the same command again: it goes on with the files that are missing"
        ) from None
    return found
