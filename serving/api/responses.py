"""OpenAI's Responses interface: thinking, preambles, answer and calls as items of their own.

Reference: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from cluster.harmony import Codec
from serving.api.asked import understood, wishes
from serving.api.errors import ApiError, ToldError, to_api_error
from serving.api.findings import findings, new_id
from serving.api.http import event
from serving.api.responses_output import Output
from serving.api.responses_schema import ResponsesRequest
from serving.config import ServingConfig
from serving.engines.base import Engine
from serving.generation import Generation


@dataclass(frozen=True)
class ResponsesJob:
    """A request that was found good, with the one choice that is drawn for it."""

    choices: list[Generation]
    prompt_tokens: int
    id: str
    created: int
    model: str
    echo: dict[str, Any]
    """what the response repeats of the request"""
    shows_reasoning: bool


async def prepare(request: ResponsesRequest, config: ServingConfig, codec: Codec, engine: Engine) -> ResponsesJob:
    """Everything that can be refused, before anything is drawn.

    Raises:
        ApiError: as `ResponsesRequest.to_asked` and `wishes`.
    """
    (wish,) = await wishes(await understood(request, config), config, codec)
    return ResponsesJob(
        choices=[Generation(engine, codec, wish)],
        prompt_tokens=len(wish.prompt),
        id=f"resp_{new_id()}",
        created=int(time.time()),
        model=request.model,
        echo=request.echo(config.default_effort),
        shows_reasoning=request.shows_reasoning,
    )


async def complete(job: ResponsesJob) -> dict[str, Any]:
    """The response in one piece."""
    (generation,) = job.choices
    deltas = [delta for step in await generation.whole() for delta in step.deltas]
    output = Output(job.id, shows_reasoning=job.shows_reasoning)
    for _ in output.take(deltas, generation.calls):
        pass
    for _ in _finish(output, generation):
        pass
    return _ended(job, output)


async def stream(job: ResponsesJob) -> AsyncGenerator[str, None]:
    """The response as server-sent events; the first comes with the first tokens, the last holds all of it.

    Raises:
        ToldError: something failed after the first event; the last one, `response.failed`, has told of it.
    """
    async with aclosing(_events(job)) as events:
        number = 0
        async for data in events:
            yield event({**data, "sequence_number": number}, data["type"])
            number += 1


async def _events(job: ResponsesJob) -> AsyncGenerator[dict[str, Any], None]:
    """Data of the stream's events in order."""
    (generation,) = job.choices
    output = Output(job.id, shows_reasoning=job.shows_reasoning)
    begun = False
    try:
        async with aclosing(generation.stream()) as steps:
            async for step in steps:
                if not begun:
                    for name in ("response.created", "response.in_progress"):
                        yield _about(name, _response(job, "in_progress", []))
                    begun = True
                for data in output.take(step.deltas, generation.calls):
                    yield data
    except Exception as error:
        if not begun:
            raise
        told = to_api_error(error)
        for data in output.close("incomplete"):
            yield data
        yield _about("response.failed", _response(job, "failed", output.items, error=_error(told)))
        raise ToldError(told) from error
    for data in _finish(output, generation):
        yield data
    response = _ended(job, output)
    yield _about(f"response.{response['status']}", response)


def _about(name: str, response: dict[str, Any]) -> dict[str, Any]:
    return {"type": name, "response": response}


def _finish(output: Output, generation: Generation) -> Iterator[dict[str, Any]]:
    return output.finish(generation.reply, cut=generation.finish_reason == "length")


def _ended(job: ResponsesJob, output: Output) -> dict[str, Any]:
    """The response once its choice has ended."""
    (generation,) = job.choices
    if generation.finish_reason == "length":
        details = {"reason": "max_output_tokens"}
        response = _response(job, "incomplete", output.items, incomplete_details=details)
    else:
        response = _response(job, "completed", output.items, completed_at=int(time.time()))
    return {**response, "usage": _usage(job), **findings(generation)}


def _response(job: ResponsesJob, status: str, output: list[dict[str, Any]], **known: Any) -> dict[str, Any]:
    """The response in OpenAI's form; what is not known yet is null."""
    unknown = {"completed_at": None, "error": None, "incomplete_details": None, "usage": None}
    head = {"id": job.id, "object": "response", "created_at": job.created, "status": status, "model": job.model}
    return {**head, "output": output, **job.echo, **unknown, **known}


def _usage(job: ResponsesJob) -> dict[str, Any]:
    (generation,) = job.choices
    return {
        "input_tokens": job.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": generation.tokens,
        "output_tokens_details": {"reasoning_tokens": generation.reasoning_tokens},
        "total_tokens": job.prompt_tokens + generation.tokens,
    }


def _error(told: ApiError) -> dict[str, Any]:
    """The error of a failed response. OpenAI's `code` is of a fixed list, so that ours is the `type`."""
    error = told.body["error"]
    code = "rate_limit_exceeded" if told.status == 429 else "server_error"
    return {"code": code, "message": error["message"], "param": error["param"], "type": error["code"]}
