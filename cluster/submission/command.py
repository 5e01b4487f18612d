"""`python -m cluster submit`: run a command as a job of a Ray cluster, from this directory, and wait for its end."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
from pathlib import Path

from ray.job_submission import JobSubmissionClient

from cluster.config import ConfigError
from cluster.joining import refusal
from cluster.memory import size
from cluster.submission.job import INTERRUPTED, OnInterrupt, Patience, Wish, alone, follow, interrupted
from cluster.submission.packing import package_of
from cluster.tables import positive_number

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb; the command follows `--`."""
    parser.add_argument("--address", help="http://HOST:8265 of the dashboard (RAY_API_SERVER_ADDRESS or RAY_ADDRESS)")
    parser.add_argument("--working-dir", default=".", help="that the job begins in; .gitignore and .rayignore hold")
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="left out too")
    parser.add_argument("--secret", action="append", default=[], metavar="NAME",
                        help="variable of this environment that the job gets, such as HF_TOKEN; Ray's dashboard shows "
                             "a job's environment to whoever may open it")  # fmt: skip
    parser.add_argument("--cpus", type=positive_number, help="of the driver; its workers ask for their own")
    parser.add_argument("--gpus", type=positive_number, help="of the driver")
    parser.add_argument("--pending-seconds", type=positive_number, default=300.0,
                        help="until a job that has not begun is stopped (300)")  # fmt: skip
    parser.add_argument("--lost-seconds", type=positive_number, default=60.0,
                        help="until a cluster that does not answer is given up (60)")  # fmt: skip
    parser.add_argument("--on-interrupt", choices=("ask", "stop", "leave"), default="ask",
                        help="what Ctrl-C does to the job; without a terminal ask is leave")  # fmt: skip
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")


def run(options: argparse.Namespace) -> int:
    """Submit and follow. Returns the driver's exit code, or one of `cluster.submission.job`'s.

    Raises:
        ConfigError: a flag, a secret, the directory or the address is of no use.
    """
    words = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not words:
        raise ConfigError("a command is missing: python -m cluster submit [flags] -- python -m training run …")
    secrets = secrets_of(options.secret)
    package = package_of(Path(options.working_dir), options.exclude)
    if warning := package.warning():
        print(f"warning: {warning}", file=sys.stderr)
    logging.getLogger("ray.dashboard").setLevel(logging.WARNING)
    client = connect(options.address)
    environment = {"working_dir": str(package.folder), "excludes": options.exclude, "env_vars": secrets}
    try:
        job = client.submit_job(
            entrypoint=shlex.join(words),
            runtime_env=environment,
            entrypoint_num_cpus=options.cpus,
            entrypoint_num_gpus=options.gpus,
        )
    except KeyboardInterrupt:
        print(f"interrupted while handing the job over; `ray job list --address {client.get_address()}` shows whether "
              "the cluster has it", file=sys.stderr)  # fmt: skip
        return INTERRUPTED
    except Exception as error:  # requests' and Ray's of a network that was cut, a full store, a refused token
        raise ConfigError(
            f"the cluster at {client.get_address()} did not take the job: {_safe(error, secrets)}"
        ) from None
    print(f"job {job} of {len(package.files)} files, {size(package.total_bytes)}, at {client.get_address()}",
          file=sys.stderr, flush=True)  # fmt: skip
    on_interrupt: OnInterrupt = options.on_interrupt
    patience = Patience(options.pending_seconds, options.lost_seconds)
    try:
        return follow(client, job, Wish(options.cpus, options.gpus), patience, sys.stdout)
    except KeyboardInterrupt:
        return interrupted(client, job, on_interrupt, input if sys.stdin.isatty() else None)


def secrets_of(names: list[str]) -> dict[str, str]:
    """Values of the environment's variables of these names.

    Raises:
        ConfigError: a name is none, or not set. No message holds a value.
    """
    for name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError("--secret takes the name of a variable of this environment, never its value")
        if not os.environ.get(name):
            raise ConfigError(f"--secret {name}: this environment has no such variable, or an empty one; export it")
    return {name: os.environ[name] for name in names}


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the job server.

    Raises:
        ConfigError: no address, nothing answers there, or it does not let this process in.
    """
    address = address or next((os.environ[name] for name in ADDRESSES if os.environ.get(name)), None)
    if not address:
        raise ConfigError(
            "--address is missing: http://HOST:8265 of the cluster's dashboard, or set RAY_API_SERVER_ADDRESS"
        )
    if not re.match(r"https?://", address):
        raise ConfigError(f"--address {address}: the dashboard's address is needed, like http://HOST:8265")
    try:
        with alone(address):
            client = JobSubmissionClient(address)
        client.get_version()
        return client
    except Exception as error:
        if _is_refusal(error):
            raise ConfigError(f"the job server at {address} does not let this process in: {refusal(error)}") from None
        raise ConfigError(f"no job server answers at {address}: {_safe(error, {})}") from None


def _is_refusal(error: BaseException) -> bool:
    text = str(error).lower()
    return "token" in text or "authenticat" in text or "unauthorized" in text


def _safe(error: BaseException, secrets: dict[str, str]) -> str:
    """An error's first line, without secrets."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    for value in secrets.values():
        text = text.replace(value, "***")
    return text[:300]
