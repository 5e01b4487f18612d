"""Chat completions in OpenAI's form, each Harmony channel in a field of its own.

Reference: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from cluster.harmony import Codec, Delta, ParsedCall, Part
from serving.api.asked import understood, wishes
from serving.api.chat_schema import ChatRequest
from serving.api.findings import findings, new_id
from serving.api.http import event, merged, to_json
from serving.api.tools import short_name
from serving.attempt import DrawnToken, Step
from serving.config import ServingConfig
from serving.engines.base import Engine
from serving.generation import Generation
from serving.tasks import together

_FIELDS: dict[Part, tuple[str, ...]] = {
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
    codec: Codec


async def prepare(request: ChatRequest, config: ServingConfig, codec: Codec, engine: Engine) -> ChatJob:
    """Everything that can be refused, before anything is drawn.

    Raises:
        ApiError: as `wishes`.
    """
    wanted = await wishes(await understood(request, config), config, codec)
    return ChatJob(
        request,
        choices=[Generation(engine, codec, wish) for wish in wanted],
        prompt_tokens=len(wanted[0].prompt),
        id=f"chatcmpl-{new_id()}",
        created=int(time.time()),
        model=request.model,
        codec=codec,
    )


async def complete(job: ChatJob) -> dict[str, Any]:
    """The answer in one piece."""
    drawn = await together(choice.whole() for choice in job.choices)
    choices = [_choice(job, index, steps) for index, steps in enumerate(drawn)]
    return {**_envelope(job, "chat.completion"), "choices": choices, "usage": _usage(job)}


async def stream(job: ChatJob) -> AsyncGenerator[str, None]:
    """The answer as server-sent events, one or several at once; the first come with the first tokens."""
    choices = [_events(job, index) for index in range(len(job.choices))]
    async with aclosing(choices[0] if len(choices) == 1 else merged(choices)) as events:
        async for each in events:
            yield each
    if job.request.include_usage:
        yield event({**_envelope(job, "chat.completion.chunk"), "choices": [], "usage": _usage(job)})


class _Writer:
    """Writes the chunks of one choice as events; what all of them have is spelled once."""

    def __init__(self, job: ChatJob, index: int) -> None:
        envelope = _envelope(job, "chat.completion.chunk") | ({"usage": None} if job.request.include_usage else {})
        self._head = f'data: {to_json(envelope)[:-1]},"choices":[{{"index":{index},"delta":'
        self._job = job
        self._index = index
        self._names = {
            part: names for part, names in _FIELDS.items() if part != "analysis" or job.request.shows_reasoning
        }

    def chunk(self, delta: dict[str, Any], **others: Any) -> str:
        """A chunk with a delta, and with other fields of its choice."""
        return f"{self._head}{to_json(delta)},{to_json({'finish_reason': None, **others})[1:-1]}}}]}}\n\n"

    def step(self, step: Step) -> str:
        """What a step adds; a step's log-probabilities go with the first of its chunks."""
        told = (
            {"logprobs": logprobs}
            if step.drawn and any((logprobs := _logprobs(self._job, step.drawn)).values())
            else {}
        )
        written = ""
        for delta in _joined(step.deltas):
            if delta.call is None and not told:
                written += self._text(delta)
            elif fields := self._fields(delta):
                written += self.chunk(fields, **told)
                told = {}
        return written + (self.chunk({}, **told) if told else "")

    def _text(self, delta: Delta) -> str:
        """The same chunk as `chunk` of `_fields`, without a dictionary: nearly all chunks are such."""
        names = self._names.get(delta.part)
        if names is None:
            return ""
        text = to_json(delta.text)
        fields = ",".join([f'"{name}":{text}' for name in names])
        return f'{self._head}{{{fields}}},"finish_reason":null}}]}}\n\n'

    def _fields(self, delta: Delta) -> dict[str, Any]:
        """Fields of a chunk's delta; a tool call's first, empty one carries its id and name."""
        if delta.call is None:
            return dict.fromkeys(self._names.get(delta.part, ()), delta.text)
        place = {"index": delta.call}
        if delta.text:
            return {"tool_calls": [{**place, "function": {"arguments": delta.text}}]}
        call = self._job.choices[self._index].calls[delta.call]
        return {"tool_calls": [place | _tool_call(self._job, self._index, delta.call, call)]}


async def _events(job: ChatJob, index: int) -> AsyncGenerator[str, None]:
    """The chunks of one choice, those of a step at once."""
    writer = _Writer(job, index)
    opening = writer.chunk({"role": "assistant", "content": ""})
    async with aclosing(job.choices[index].stream()) as steps:
        async for step in steps:
            if written := opening + writer.step(step):
                yield written
            opening = ""
    yield writer.chunk({}, **_ending(job.choices[index]))


def _choice(job: ChatJob, index: int, steps: Sequence[Step]) -> dict[str, Any]:
    generation = job.choices[index]
    reply = generation.reply
    message: dict[str, Any] = {"role": "assistant", "content": reply.final}
    if job.request.shows_reasoning:
        message |= {"reasoning": reply.analysis, "reasoning_content": reply.analysis}
    if reply.commentary:
        message["commentary"] = reply.commentary
    if reply.tool_calls:
        message["tool_calls"] = [_tool_call(job, index, place, call) for place, call in enumerate(reply.tool_calls)]
    drawn = [token for step in steps for token in step.drawn]
    logprobs = _logprobs(job, drawn) if job.request.logprobs else None
    return {"index": index, "message": message, "logprobs": logprobs, **_ending(generation)}


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

    thinking = {"reasoning": of("analysis")} if job.request.shows_reasoning else {}
    return {"content": of("final"), "refusal": None, **thinking}


def _joined(deltas: Sequence[Delta]) -> Sequence[Delta]:
    """Neighbours of one part as one: a batch of tokens makes a chunk, not each of them."""
    if len(deltas) == 1:
        return deltas
    found: list[Delta] = []
    for delta in deltas:
        if found and delta.text and found[-1].text and (found[-1].part, found[-1].call) == (delta.part, delta.call):
            found[-1] = found[-1]._replace(text=found[-1].text + delta.text)
        else:
            found.append(delta)
    return found


def _tool_call(job: ChatJob, index: int, place: int, call: ParsedCall) -> dict[str, Any]:
    """A call in OpenAI's form, its id made of the completion's; a tool that is no function keeps its full name."""
    function = {"name": short_name(call.recipient), "arguments": call.arguments}
    number = f"{index}_{place}" if index else str(place)
    return {"id": f"call_{job.id.removeprefix('chatcmpl-')}_{number}", "type": "function", "function": function}


def _ending(generation: Generation) -> dict[str, Any]:
    """What is known of a choice once it has ended."""
    return {"finish_reason": generation.finish_reason, **findings(generation)}


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
