"""Asks a target everything that its journal does not hold yet, many at a time."""

from __future__ import annotations

import asyncio
import email.utils
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

from cluster.languages import reasoning_instruction
from cluster.tables import duration
from serving.client.connection import error_message
from serving.evaluation.answers import Answer, Asking, Journal, Sampling
from serving.evaluation.targets import Target

PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""HTTP statuses that may be gone at the next try"""
LONGEST_WAIT_SECONDS = 120.0
"""of one wait between two tries; a Retry-After that says more is cut to it"""
_FIRST_WAIT_SECONDS = 0.5
_TERMINAL_SECONDS, _LINE_SECONDS = 0.5, 10.0
_REASON_LENGTH = 300


@dataclass(frozen=True)
class Effort:
    """How hard a run tries.

    Attributes:
        concurrency: answers under way at a time.
        retries: further tries of one answer, after a failure that may pass.
        patience: answers in a row that may fail, or tries in a row that may time out, before the run gives up.
        first_wait_seconds: before the second try; doubled before each further one.
        timeout_seconds: longest time of one try, from sending to the end of the answer.
    """

    concurrency: int = 16
    retries: int = 6
    patience: int = 16
    first_wait_seconds: float = _FIRST_WAIT_SECONDS
    timeout_seconds: float = 300.0


@dataclass
class Run:
    """What came of a run so far: answers in the journal, and failures that were not overcome, by reason."""

    wanted: int
    answered: int = 0
    answered_before: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    gave_up: str = ""
    """why the run ended before everything was asked"""
    seconds: float = 0.0
    tokens: int = 0
    failed_in_a_row: int = 0
    stalled_in_a_row: int = 0


class _FailedError(Exception):
    """A try that failed; `passing` says whether another may not, and `wait_seconds` when the endpoint wants it."""

    def __init__(self, message: str, *, passing: bool, wait_seconds: float | None = None) -> None:
        super().__init__(message)
        self.passing = passing
        self.wait_seconds = wait_seconds


async def run(
    target: Target,
    wanted: Sequence[Asking],
    sampling: Sampling,
    journal: Journal,
    effort: Effort,
    *,
    found: Run | None = None,
    quiet: bool = False,
) -> Run:
    """Asks what the journal lacks, and writes each answer into it as it comes. Returns `found`, which it keeps current.

    Ends early, with what it has, where `effort.patience` answers in a row fail in a way that may pass: the endpoint is
    gone, or stalls. When cancelled, answers that have come are in the journal.
    """
    left = [asking for asking in wanted if asking.key not in journal.answers]
    found = found or Run(len(wanted))
    found.answered = found.answered_before = len(wanted) - len(left)
    queue = iter(left)
    began, stop = time.monotonic(), asyncio.Event()

    async def worker() -> None:
        for asking in queue:
            answer, passing = await _ask(target, asking, sampling, effort, found)
            journal.add(answer)
            found.tokens += answer.completion_tokens or 0
            if not answer.error:
                found.answered += 1
                found.failed_in_a_row = found.stalled_in_a_row = 0
                continue
            found.failures[answer.error] += 1
            found.failed_in_a_row += passing
            if max(found.failed_in_a_row, found.stalled_in_a_row) >= effort.patience:
                found.gave_up = answer.error
                stop.set()
                return

    progress = asyncio.create_task(_report(target.name, found, len(left), began)) if not quiet else None
    workers = [asyncio.create_task(worker()) for _ in range(min(effort.concurrency, len(left)))]
    stopped = asyncio.create_task(stop.wait())
    try:
        while workers and not stop.is_set():
            await asyncio.wait([*workers, stopped], return_when=asyncio.FIRST_COMPLETED)
            for done in [one for one in workers if one.done()]:
                workers.remove(done)
                done.result()
    finally:
        found.seconds = time.monotonic() - began
        for task in (*workers, stopped, *([progress] if progress else [])):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    return found


async def _ask(target: Target, asking: Asking, sampling: Sampling, effort: Effort, found: Run) -> tuple[Answer, bool]:
    """The answer, or why there is none after all tries, and whether that may pass. Tries that time out are noted."""
    body = request_body(target, asking, sampling)
    wait = effort.first_wait_seconds
    jitter = random.Random(asking.key)
    for number in range(1, effort.retries + 2):
        began = time.monotonic()
        try:
            async with asyncio.timeout(effort.timeout_seconds):
                response = await target.http.post("/v1/chat/completions", json=body)
            return to_answer(asking, response, time.monotonic() - began, number), False
        except _FailedError as error:
            fault = error
        except (TimeoutError, httpx.TimeoutException):
            found.stalled_in_a_row += 1
            fault = _FailedError("the endpoint did not answer in time", passing=True)
        except httpx.TransportError as error:
            fault = _FailedError(f"no connection ({str(error) or type(error).__name__})"[:_REASON_LENGTH], passing=True)
        if not fault.passing or number > effort.retries or found.stalled_in_a_row >= effort.patience:
            break
        pause = fault.wait_seconds if fault.wait_seconds is not None else wait * (0.5 + jitter.random())
        await asyncio.sleep(min(pause, LONGEST_WAIT_SECONDS))
        wait *= 2
    return Answer(key=asking.key, error=str(fault), seconds=time.monotonic() - began, tries=number), fault.passing


def request_body(target: Target, asking: Asking, sampling: Sampling) -> dict[str, Any]:
    """The request for one answer, whole and not as a stream."""
    item, turns = asking.item, asking.item.turns
    body: dict[str, Any] = {
        "model": target.model,
        "messages": turns,
        "temperature": sampling.temperature,
        "seed": asking.seed(sampling.seed),
        "top_p": sampling.top_p,
        "max_completion_tokens": sampling.maximum_tokens,
        "reasoning_effort": asking.effort,
    }
    if item.reasoning_language and target.asked_by == "field":
        body["reasoning_language"] = item.reasoning_language
    elif item.reasoning_language and target.asked_by == "instruction":
        body["messages"] = _instructed(turns, reasoning_instruction(item.reasoning_language))
    if item.json_schema is not None:
        form = {"name": "answer", "schema": item.json_schema}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    return {name: value for name, value in body.items() if value is not None}


def _instructed(turns: list[dict[str, str]], instruction: str) -> list[dict[str, str]]:
    """With the wish for a language first in the developer message, as Raysoner's endpoint writes it."""
    if turns[0]["role"] in ("system", "developer"):
        return [{**turns[0], "content": f"{instruction}\n\n{turns[0]['content']}"}, *turns[1:]]
    return [{"role": "system", "content": instruction}, *turns]


def to_answer(asking: Asking, response: httpx.Response, seconds: float, tries: int = 1) -> Answer:
    """The answer of a response.

    Raises:
        _FailedError: it is an error, or no chat completion.
    """
    try:
        body: Any = response.json()
    except ValueError:
        body = None
    if response.is_error:
        passing = response.status_code in PASSING
        reason = (error_message(body) or response.reason_phrase or "no reason given")[:_REASON_LENGTH]
        wait = _retry_after(response.headers.get("Retry-After")) if passing else None
        raise _FailedError(f"HTTP {response.status_code}: {reason}", passing=passing, wait_seconds=wait)
    try:
        choice = body["choices"][0]
        message = choice["message"]
        usage = body.get("usage") or {}
        details = usage.get("completion_tokens_details") or {}
        calls = len(message.get("tool_calls") or ())
        thinking = message.get("reasoning") or message.get("reasoning_content") or ""
        text = message.get("content") or ""
        return Answer(
            key=asking.key,
            thinking=thinking,
            answer=text,
            commentary=message.get("commentary") or "",
            unparsed=message.get("unparsed") or choice.get("unparsed") or "",
            tool_calls=calls,
            outcome=choice.get("outcome") or _outcome(choice.get("finish_reason"), text, calls),
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            reasoning_tokens=details.get("reasoning_tokens"),
            seconds=round(seconds, 4),
            tries=tries,
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise _FailedError("the endpoint's answer is no chat completion", passing=False) from None


def _outcome(finish_reason: str | None, text: str, calls: int) -> str:
    """Of an endpoint that tells no outcome."""
    if calls:
        return "tool_call"
    if finish_reason == "length":
        return "truncated"
    return "complete" if text else "no_final"


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds a number of them or a date (RFC 9110, section 10.2.3)."""
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


async def _report(name: str, found: Run, left: int, began: float) -> None:
    """A line that is written over on a terminal; else one now and then."""
    terminal = sys.stderr.isatty()
    try:
        while True:
            await asyncio.sleep(_TERMINAL_SECONDS if terminal else _LINE_SECONDS)
            line = progress_line(name, found, left, time.monotonic() - began)
            print(f"\r\033[K{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
    finally:
        if terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def progress_line(name: str, found: Run, left: int, seconds: float) -> str:
    """Where a run is that had `left` answers to ask for, after so many seconds."""
    failed, done = sum(found.failures.values()), found.answered - found.answered_before
    rate = done / max(seconds, 1e-9)
    remaining = max(left - done - failed, 0)
    eta = f"{duration(remaining / rate)} left" if rate else "time left unknown"
    return (
        f"{name}: {found.answered:,}/{found.wanted:,} answers, {rate:,.1f} answers/s, "
        f"{found.tokens / max(seconds, 1e-9):,.0f} tokens/s, {failed:,} failed, {eta}"
    )
