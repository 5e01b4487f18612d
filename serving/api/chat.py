"""Chat completions in OpenAI's form, each Harmony channel in a field of its own.

Reference: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from cluster.harmony import Codec, Delta, ParsedCall, Part
from serving.api.asked import Check, wishes
from serving.api.chat_schema import ChatRequest
from serving.api.findings import findings
from serving.api.http import event, merged
from serving.attempt import DrawnToken
from serving.config import ServingConfig
from serving.engines.base import Engine
from serving.generation import Generation

_FIELDS = {
    "analysis": ("reasoning", "reasoning_content"),
    "commentary": ("commentary",),
    "final": ("content",),
}
"""fields that a part of the reply goes into; clients read the thinking under either of two names"""


@dataclass(frozen=True)
class ChatJob:
    """A request that was found good, with the choices that are drawn for it."""

    request: ChatRequest
    choices: list[Generation]
    prompt_tokens: int
    id: str
    created: int
    model: str
    check: Check
    codec: Codec

    @property
    def shows_reasoning(self) -> bool:
        """Whether the answer holds its thinking."""
        return self.request.include_reasoning is not False


async def prepare(request: ChatRequest, config: ServingConfig, codec: Codec, engine: Engine) -> ChatJob:
    """Everything that can be refused, before anything is drawn.

    Raises:
        ApiError: as `wishes`.
    """
    asked = request.to_asked(config.default_effort)
    wanted = await wishes(asked, config, codec)
    return ChatJob(
        request,
        choices=[Generation(engine, codec, wish) for wish in wanted],
        prompt_tokens=len(wanted[0].prompt),
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=config.model.served_name,
        check=Check(asked.conversation.tools, asked.conversation.response_format),
        codec=codec,
    )


async def complete(job: ChatJob) -> dict[str, Any]:
    """The answer in one piece."""
    draws = [asyncio.create_task(_exhaust(choice)) for choice in job.choices]
    try:
        drawn = await asyncio.gather(*draws)
    finally:
        for draw in draws:
            draw.cancel()
        await asyncio.gather(*draws, return_exceptions=True)
    choices = [_choice(job, index, tokens) for index, tokens in enumerate(drawn)]
    return {**_envelope(job, "chat.completion"), "choices": choices, "usage": _usage(job)}


async def stream(job: ChatJob) -> AsyncGenerator[str, None]:
    """The answer as server-sent events; the first comes with the first tokens."""
    async with aclosing(merged(_chunks(job, index) for index in range(len(job.choices)))) as chunks:
        async for chunk in chunks:
            yield event(chunk)
    if job.request.include_usage:
        yield event({**_envelope(job, "chat.completion.chunk"), "choices": [], "usage": _usage(job)})


async def _exhaust(choice: Generation) -> list[DrawnToken]:
    drawn: list[DrawnToken] = []
    async with aclosing(choice.stream()) as steps:
        async for step in steps:
            drawn += step.drawn
    return drawn


async def _chunks(job: ChatJob, index: int) -> AsyncGenerator[dict[str, Any], None]:
    """Chunks of one choice."""
    envelope = _envelope(job, "chat.completion.chunk")
    if job.request.include_usage:
        envelope["usage"] = None

    def chunk(delta: dict[str, Any], **ending: Any) -> dict[str, Any]:
        return {**envelope, "choices": [{"index": index, "delta": delta, "finish_reason": None, **ending}]}

    generation = job.choices[index]
    opened = False
    async with aclosing(generation.stream()) as steps:
        async for step in steps:
            if not opened:
                yield chunk({"role": "assistant", "content": ""})
                opened = True
            told = {"logprobs": _logprobs(job, step.drawn)} if step.drawn else {}
            for delta in _joined(step.deltas):
                if fields := _delta_fields(job, index, delta):
                    yield chunk(fields, **told)
                    told = {}
            if told:
                yield chunk({}, **told)
    yield chunk({}, **_ending(job, generation))


def _choice(job: ChatJob, index: int, drawn: Sequence[DrawnToken]) -> dict[str, Any]:
    generation = job.choices[index]
    reply = generation.reply
    message: dict[str, Any] = {"role": "assistant", "content": reply.final}
    if job.shows_reasoning:
        message |= {"reasoning": reply.analysis, "reasoning_content": reply.analysis}
    if reply.commentary:
        message["commentary"] = reply.commentary
    if reply.tool_calls:
        message["tool_calls"] = [_tool_call(job, index, place, call) for place, call in enumerate(reply.tool_calls)]
    logprobs = _logprobs(job, drawn) if job.request.logprobs else None
    return {"index": index, "message": message, "logprobs": logprobs, **_ending(job, generation)}


def _logprobs(job: ChatJob, drawn: Sequence[DrawnToken]) -> dict[str, Any]:
    """Log-probabilities of the answer's tokens, and of the thinking's under a name that OpenAI does not have."""

    def told(token: int, logprob: float) -> dict[str, Any]:
        spelled = job.codec.token_bytes(token)
        return {"token": spelled.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(spelled)}

    def of(part: Part) -> list[dict[str, Any]]:
        return [
            told(token.token, token.logprob.logprob)
            | {"top_logprobs": [told(other, logprob) for other, logprob in token.logprob.top]}
            for token in drawn
            if token.part == part
        ]

    thinking = {"reasoning": of("analysis")} if job.shows_reasoning else {}
    return {"content": of("final"), "refusal": None, **thinking}


def _joined(deltas: Sequence[Delta]) -> list[Delta]:
    """Neighbours of one part as one: a batch of tokens makes a chunk, not each of them."""
    found: list[Delta] = []
    for delta in deltas:
        if found and delta.text and found[-1].text and (found[-1].part, found[-1].call) == (delta.part, delta.call):
            found[-1] = found[-1]._replace(text=found[-1].text + delta.text)
        else:
            found.append(delta)
    return found


def _delta_fields(job: ChatJob, index: int, delta: Delta) -> dict[str, Any]:
    """Fields of a chunk's delta; a tool call's first, empty one carries its id and name."""
    if delta.call is None:
        hidden = delta.part == "analysis" and not job.shows_reasoning
        return {} if hidden else dict.fromkeys(_FIELDS.get(delta.part, ()), delta.text)
    place = {"index": delta.call}
    if delta.text:
        return {"tool_calls": [{**place, "function": {"arguments": delta.text}}]}
    return {"tool_calls": [place | _tool_call(job, index, delta.call, job.choices[index].calls[delta.call])]}


def _tool_call(job: ChatJob, index: int, place: int, call: ParsedCall) -> dict[str, Any]:
    """A call in OpenAI's form, its id made of the completion's; a tool that is no function keeps its full name."""
    function = {"name": call.recipient.removeprefix("functions."), "arguments": call.arguments}
    number = f"{index}_{place}" if index else str(place)
    return {"id": f"call_{job.id.removeprefix('chatcmpl-')}_{number}", "type": "function", "function": function}


def _ending(job: ChatJob, generation: Generation) -> dict[str, Any]:
    """What is known of a choice once it has ended."""
    return {"finish_reason": generation.finish_reason, **findings(generation, job.check)}


def _envelope(job: ChatJob, kind: str) -> dict[str, Any]:
    return {"id": job.id, "object": kind, "created": job.created, "model": job.model}


def _usage(job: ChatJob) -> dict[str, Any]:
    completion = sum(choice.tokens for choice in job.choices)
    return {
        "prompt_tokens": job.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": job.prompt_tokens + completion,
        "completion_tokens_details": {"reasoning_tokens": sum(choice.reasoning_tokens for choice in job.choices)},
    }
