"""python -m serving bench: flags, the load, and its report."""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from serving.bench import page, prompts, report
from serving.bench.load import Bodies, Load, Plan, drive, new_load
from serving.bench.transport import Transport
from serving.client.connection import (
    DEFAULT_URL,
    KEY_VARIABLE,
    RefusedError,
    authorization,
    base_url,
    connect,
    only_model,
    silence,
)

_PROGRESS_SECONDS = 0.5
_LINE_SECONDS = 10.0
"""between lines of progress where the output is no terminal"""
_OPEN_FILES = 65536


def parser() -> argparse.ArgumentParser:
    """The flags of the verb."""
    found = argparse.ArgumentParser(
        prog="python -m serving bench",
        description="Drives any OpenAI-compatible chat completions endpoint, streaming, and reports latencies and "
        f"throughput. An API key is taken from {KEY_VARIABLE}. Exit code 1 when a request failed.",
        allow_abbrev=False,
    )
    add = found.add_argument
    add("--url", default=DEFAULT_URL, help="address of the endpoint (default: %(default)s)")
    add("--model", help="model to ask; the endpoint's only one if not given")
    load = found.add_mutually_exclusive_group()
    load.add_argument("--rate", type=_positive, metavar="R", help="open loop: R requests/s arrive, a Poisson process")
    load.add_argument(
        "--concurrency",
        type=_count,
        metavar="N",
        help="closed loop: N requests are always under way (default: 8)",
    )
    add("--requests", type=_count, metavar="N", help="requests to send (default: 100, or no bound with --seconds)")
    add("--seconds", type=_positive, metavar="S", help="send no more requests after S seconds")
    add("--warmup", type=int, default=0, metavar="N", help="requests before the load that are not counted (default: 0)")
    add("--prompts", type=Path, metavar="FILE", help="JSONL, on each line an object with messages or prompt; in turns")
    add("--words", type=_count, default=64, metavar="N", help="words of a synthetic prompt (default: %(default)s)")
    add("--max-tokens", type=_count, default=256, metavar="N", help="max_tokens of each request (default: %(default)s)")
    add("--language", help="reasoning_language of each request: a field of Raysoner's, sent only if given")
    add("--temperature", type=float, help="temperature of each request; the server's own if not given")
    add(
        "--field",
        action="append",
        default=[],
        type=_field,
        metavar="NAME=JSON",
        help="a further field of each request, such as ignore_eos=true; may be given several times",
    )
    add("--no-usage", action="store_true", help="do not ask for usage, for servers that refuse stream_options")
    add(
        "--timeout",
        type=_positive,
        default=600.0,
        metavar="S",
        help="longest time of a request (default: 600)",
    )
    add(
        "--completions",
        action="store_true",
        help="drive /v1/completions with the text of the last message, for models without a chat template",
    )
    add("--seed", type=int, default=0, help="of arrivals and synthetic prompts (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the report there as JSON")
    add("--html", type=Path, metavar="FILE", help="write the report there as a page with plots")
    return found


def main(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit status: 0, 1 when a request failed, 130 when stopped by Ctrl-C before any did."""
    flags_parser = parser()
    flags = flags_parser.parse_args(list(arguments))
    try:
        url, headers = base_url(flags.url), authorization()
        conversation = prompts.source(flags.prompts, flags.words, flags.seed)
        _require_writable(flags.json, flags.html)
    except ValueError as error:
        flags_parser.error(str(error))
    try:
        with connect(url) as http:
            model = flags.model or only_model(http)
    except httpx.TransportError as error:
        print(silence(url, error), file=sys.stderr)
        return 1
    except RefusedError as error:
        print(error, file=sys.stderr)
        return 1
    fields = request_fields(flags, model)

    def bodies(number: int) -> bytes:
        messages = conversation(number)
        asked = {"prompt": messages[-1].get("content")} if flags.completions else {"messages": messages}
        return json.dumps({**fields, **asked}, ensure_ascii=False).encode()

    plan = _plan(flags)
    load = new_load(plan)
    spent = time.process_time()
    stopped = False
    try:
        spent = asyncio.run(_run(load, bodies, url, headers, flags))
    except KeyboardInterrupt:
        stopped = True
        spent = time.process_time() - spent
    found = report.make(
        url, model, plan, _described(flags), flags.max_tokens, load.exchanges, spent / max(load.clock(), 1e-9)
    )
    report.show(found, Console())
    if flags.json:
        flags.json.write_text(json.dumps(found.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if flags.html:
        flags.html.write_text(page.render(found), encoding="utf-8")
    return 1 if found.summary.failed else 130 if stopped else 0


def request_fields(flags: argparse.Namespace, model: str) -> dict[str, Any]:
    """Every request but its messages."""
    usage = None if flags.no_usage else {"include_usage": True}
    fields = {
        "model": model,
        "stream": True,
        "stream_options": usage,
        "max_tokens": flags.max_tokens,
        "temperature": flags.temperature,
        "reasoning_language": flags.language,
    }
    return {name: value for name, value in fields.items() if value is not None} | dict(flags.field)


async def _run(load: Load, bodies: Bodies, url: str, headers: dict[str, str], flags: argparse.Namespace) -> float:
    """Warms up, runs the load with a line of progress; returns the processor seconds that the load took."""
    _allow_open_files()
    path = "/v1/completions" if flags.completions else "/v1/chat/completions"
    async with Transport(url + path, headers, flags.timeout) as transport:
        if flags.warmup > 0:
            concurrency = min(flags.warmup, load.plan.concurrency or 8)
            first = replace(load.plan, rate=None, concurrency=concurrency, requests=flags.warmup, seconds=None)
            # Other prompts than the load's: a prefix cache must not know those already.
            await drive(new_load(first), transport, lambda number: bodies(-1 - number))
        before = time.process_time()
        progress = asyncio.create_task(_report_progress(load))
        try:
            await drive(load, transport, bodies)
        finally:
            progress.cancel()
            with suppress(asyncio.CancelledError):
                await progress
        return time.process_time() - before


async def _report_progress(load: Load) -> None:
    """A line that is written over on a terminal; else one now and then."""
    terminal = sys.stderr.isatty()
    chunks_before, before = 0, load.clock()
    try:
        while True:
            await asyncio.sleep(_PROGRESS_SECONDS if terminal else _LINE_SECONDS)
            # Chunks: what running requests take in tokens is told at their end only.
            chunks, now = load.chunks, load.clock()
            of = f"/{load.plan.requests}" if load.plan.requests else ""
            line = (
                f"{now:.0f} s: {load.ended}{of} requests ended, {load.failed} of them failed, "
                f"{len(load.running)} under way, {(chunks - chunks_before) / max(now - before, 1e-9):,.0f} chunks/s"
            )
            print(f"\r\033[K{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
            chunks_before, before = chunks, now
    finally:
        if terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _plan(flags: argparse.Namespace) -> Plan:
    return Plan(
        rate=flags.rate,
        concurrency=None if flags.rate else flags.concurrency or 8,
        requests=flags.requests or (None if flags.seconds else 100),
        seconds=flags.seconds,
        seed=flags.seed,
    )


def _described(flags: argparse.Namespace) -> str:
    return f"prompts of {flags.prompts}" if flags.prompts else f"synthetic prompts of {flags.words} words"


def _require_writable(*paths: Path | None) -> None:
    """Raises ValueError if a report could not be written: better before the load than after it."""
    for path in filter(None, paths):
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: no file can be written there; its folder must exist")


def _allow_open_files() -> None:
    """A connection is an open file, and the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _field(text: str) -> tuple[str, Any]:
    name, mark, value = text.partition("=")
    if not (name and mark):
        raise argparse.ArgumentTypeError(f"must be NAME=JSON, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{name}: {value!r} is not JSON; write text in double quotes") from None
