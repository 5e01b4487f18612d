"""A job of a Ray cluster from its submission to its end, and the exit code that says how it ended."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_nodes

from cluster.environment import environment

FAILED, STOPPED, PENDING, LOST, INTERRUPTED = 1, 143, 124, 69, 130
"""exit codes beside the driver's own: it failed without one; it was stopped, as by SIGTERM; it never began, as of
`timeout`; the cluster is gone (`EX_UNAVAILABLE`); Ctrl-C"""
POLL_SECONDS = 1.0
ENDS = {JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED}

OnInterrupt = Literal["ask", "stop", "leave"]


@dataclass(frozen=True)
class Wish:
    """What the driver itself must have; its workers ask for their own."""

    cpus: float | None = None
    gpus: float | None = None


@dataclass(frozen=True)
class Patience:
    """Seconds."""

    pending: float = 300.0
    """until a job that has not begun is stopped"""
    lost: float = 60.0
    """until a cluster that does not answer is given up"""


def alone(address: str) -> AbstractContextManager[None]:
    """Ray lets RAY_API_SERVER_ADDRESS and RAY_ADDRESS win over the address that it is given; here `address` wins."""
    return environment(RAY_API_SERVER_ADDRESS=address)


def follow(client: JobSubmissionClient, job: str, wish: Wish, patience: Patience, output: TextIO) -> int:
    """Write the job's log as it grows, until the job has ended; returns its exit code.

    Raises:
        KeyboardInterrupt: Ctrl-C; the job goes on.
    """
    return asyncio.run(_follow(client, job, wish, patience, output))


async def _follow(client: JobSubmissionClient, job: str, wish: Wish, patience: Patience, output: TextIO) -> int:
    log = asyncio.create_task(_copy_log(client, job, output))
    try:
        code, said = await _wait(client, job, wish, patience)
        if code != LOST:  # what the driver printed last
            await asyncio.wait([log], timeout=10.0)
    finally:
        log.cancel()
        await asyncio.gather(log, return_exceptions=True)
    output.flush()
    print(said, file=sys.stderr, flush=True)
    return code


async def _wait(client: JobSubmissionClient, job: str, wish: Wish, patience: Patience) -> tuple[int, str]:
    """The exit code, and a sentence."""
    began = answered = time.monotonic()
    while True:
        try:
            info = await asyncio.to_thread(client.get_job_info, job)
            answered = time.monotonic()
        except Exception as error:  # requests' and Ray's; all the same to us
            silent = time.monotonic() - answered
            if silent > patience.lost:
                return LOST, f"job {job} is lost: the cluster has not answered for {silent:.0f} s ({_first(error)})"
            await asyncio.sleep(POLL_SECONDS)
            continue
        if info.status in ENDS:
            return outcome(info.status, info.driver_exit_code, f"job {job}", info.message)
        if info.status == JobStatus.PENDING and time.monotonic() - began > patience.pending:
            why = await asyncio.to_thread(why_pending, client, wish)
            await asyncio.to_thread(client.stop_job, job)
            return PENDING, f"job {job} had not begun after {patience.pending:g} s and is stopped: {why}"
        await asyncio.sleep(POLL_SECONDS)


def outcome(status: JobStatus, driver_code: int | None, job: str, message: str | None) -> tuple[int, str]:
    """The exit code and the sentence of a job that has ended; only one that succeeded has 0."""
    if status == JobStatus.SUCCEEDED:
        return 0, f"{job} succeeded"
    if status == JobStatus.STOPPED:
        return STOPPED, f"{job} was stopped"
    if driver_code:  # a signal's is negative
        code = driver_code if driver_code > 0 else 128 - driver_code
        return code & 255 or FAILED, f"{job} failed: its driver ended with exit code {driver_code}"
    return FAILED, f"{job} failed: {(message or 'Ray gives no reason').strip().splitlines()[0]}"


def why_pending(client: JobSubmissionClient, wish: Wish) -> str:
    """What the driver asked for, against what the nodes have; one node must have all of it."""
    asked = {"CPU": wish.cpus or 0.0, "GPU": wish.gpus or 0.0}
    try:
        with alone(client.get_address()):
            nodes = [node for node in list_nodes(address=client.get_address(), detail=True) if node.state == "ALIVE"]
    except Exception as error:
        return f"and the cluster does not say what it has ({_first(error)})"
    totals: list[dict[str, Any]] = [node.resources_total or {} for node in nodes]
    for name, count in asked.items():
        most = max((float(total.get(name, 0)) for total in totals), default=0.0)
        if count > most:
            return (
                f"the driver asks for {count:g} {name}, and no node has more than {most:g}; ask for less, or add nodes"
            )
    if any(asked.values()):
        told = " and ".join(f"{count:g} {name}" for name, count in asked.items() if count)
        return f"the driver asks for {told}, which nodes have, but other work holds"
    return "nothing was asked for, so its environment is still being set up, or the head has no room for a process"


async def _copy_log(client: JobSubmissionClient, job: str, output: TextIO) -> None:
    """Follow the log; a connection that breaks is made again, and what was written already is left out."""
    written = 0
    while True:
        seen = 0
        try:
            async for text in client.tail_job_logs(job):
                fresh = text[max(0, written - seen) :]
                seen += len(text)
                written = max(written, seen)
                output.write(fresh)
                output.flush()
            return
        except Exception:
            await asyncio.sleep(POLL_SECONDS)


def interrupted(client: JobSubmissionClient, job: str, on_interrupt: OnInterrupt, ask: Callable[[], str] | None) -> int:
    """After Ctrl-C: stop the job or leave it. `ask` reads an answer; None without a terminal, where it is left."""
    stop = on_interrupt == "stop"
    if on_interrupt == "ask" and ask is not None:
        print(f"\njob {job} goes on. Stop it? [y/N] ", end="", file=sys.stderr, flush=True)
        try:
            stop = ask().strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt):
            stop = False
    address = client.get_address()
    if stop:
        client.stop_job(job)
        print(f"job {job} is asked to stop", file=sys.stderr)
    else:
        print(f"job {job} goes on; `ray job logs {job} --follow --address {address}` follows it, and `ray job stop "
              f"{job} --address {address}` stops it", file=sys.stderr)  # fmt: skip
    return INTERRUPTED


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
