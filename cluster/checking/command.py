"""`python -m cluster check`: what each node of a running Ray cluster has, and whether a model trains there."""

from __future__ import annotations

import argparse
import json
import os

from cluster.checking.probe import probe
from cluster.checking.report import Node, describe, make_report
from cluster.config import ConfigError
from cluster.model import KNOWN_SHAPES, ModelShape
from cluster.planning.command import MODELS
from cluster.planning.plan import Job
from cluster.storage import Storage, StorageError, without_secrets
from cluster.tables import positive_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    parser.add_argument("--address", help="HOST:PORT of the cluster's head (RAY_ADDRESS; else this machine alone)")
    parser.add_argument("--storage", help="folder or URI that every node must reach: a small file is kept and deleted")
    parser.add_argument("--model", help="20b, 120b or a checkpoint's folder: must fit (both are told, and need not)")
    parser.add_argument("--limit-seconds", type=positive_number, default=60.0, help="for all nodes to answer (60)")
    parser.add_argument("--json", action="store_true", help="everything, as one JSON object")


def run(options: argparse.Namespace) -> int:
    """Print the report. Returns 0 if a run can start, 1 if something must be mended first.

    Raises:
        ConfigError: the cluster cannot be reached, or a flag cannot be taken; the exit code is 2.
    """
    address = options.address or os.environ.get("RAY_ADDRESS")
    try:
        jobs = _jobs(options.model)
        if options.storage:
            Storage.at(options.storage)
    except (ValueError, StorageError) as error:
        raise ConfigError(str(error)) from None
    if address:
        from cluster.checking.nodes import ask_nodes

        nodes = ask_nodes(address, options.storage, options.limit_seconds)
    else:
        nodes = [Node(**probe(options.storage))]
    shown = without_secrets(options.storage) if options.storage else None
    report = make_report(nodes, jobs, cluster=bool(address), storage=shown, must_fit=bool(options.model))
    print(json.dumps(report.model_dump(mode="json"), indent=2) if options.json else
          describe(report, cluster=bool(address)))  # fmt: skip
    return 0 if report.ready else 1


def _jobs(model: str | None) -> list[Job]:
    if model is None:
        return [Job(name, shape) for name, shape in KNOWN_SHAPES.items()]
    return [Job(model, MODELS.get(model) or ModelShape.from_folder(model))]
