"""The HTTP endpoint: chat completions in OpenAI's form, each Harmony channel in a field of its own."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from cluster.harmony import Codec, Conversation, Delta, ParsedCall
from serving.completion import Completion
from serving.config import ServingConfig
from serving.contract import ReasoningLanguage, judge, to_conversation
from serving.engines.base import Engine, EngineError, Sampling
from serving.schema import ApiError, ChatRequest, parse_request

_logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

_FIELDS = {
    "analysis": ("reasoning", "reasoning_content"),
    "commentary": ("commentary",),
    "final": ("content",),
}
"""fields that a part of the reply goes into; clients read the thinking under either of two names"""
_NO_BUFFERING = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(frozen=True)
class _Job:
    """A request that was found good: its prompt, how to sample, and what its answer needs to know."""

    request: ChatRequest
    prompt: list[int]
    sampling: Sampling
    id: str
    created: int


def create_app(config: ServingConfig, codec: Codec, engine: Engine) -> FastAPI:
    """The application over one engine. It starts and stops nothing."""
    app = FastAPI(title="Raysoner", openapi_url=None)
    started = int(time.time())

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        chat = parse_request(await _read_body(request, config.limits.body_bytes))
        job = await _prepare(chat, config, codec)
        if not chat.stream:
            return JSONResponse(await _unless_disconnected(request, _whole(job, config, codec, engine)))
        chunks = _stream(job, config, codec, engine)
        # An engine that refuses does so before the first token: then the status can still say it.
        first = await _unless_disconnected(request, _first(chunks))
        return StreamingResponse(_events(first, chunks), media_type="text/event-stream", headers=_NO_BUFFERING)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        name = config.model.served_name
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": started, "owned_by": "raysoner"}],
        }

    @app.get("/health")
    async def health() -> JSONResponse:
        healthy = engine.healthy()
        body = {"status": "ok" if healthy else "unhealthy", "engine": asdict(engine.stats())}
        return JSONResponse(body, status_code=200 if healthy else 503)

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, status_code=error.status)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code, headers=error.headers)

    @app.exception_handler(EngineError)
    async def engine_failed(_: Request, error: EngineError) -> JSONResponse:
        return JSONResponse(_engine_error(error).body, status_code=503)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(_bug(error).body, status_code=500)

    return app


async def _read_body(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large")
    return bytes(body)


async def _prepare(chat: ChatRequest, config: ServingConfig, codec: Codec) -> _Job:
    """Holds the request against the configuration and renders its prompt.

    Raises:
        ApiError: 404 for another model, 400 for what the limits or the languages do not allow.
    """
    name, limits, engine = config.model.served_name, config.limits, config.engine
    if chat.model != name:
        message = f"model {chat.model!r} is not served here; {name!r} is"
        raise ApiError(404, message, param="model", code="model_not_found")
    if len(chat.messages) > limits.messages:
        raise ApiError(400, f"messages holds more than {limits.messages}", param="messages", code="invalid_value")
    budget = chat.output_tokens or engine.default_output_tokens
    if budget > engine.maximum_output_tokens:
        field = "max_completion_tokens" if chat.max_completion_tokens else "max_tokens"
        message = f"{field} must be at most {engine.maximum_output_tokens}, got {budget}"
        raise ApiError(400, message, param=field, code="invalid_value")
    messages = [message.to_message() for message in chat.messages]
    try:
        conversation = to_conversation(
            messages,
            chat.reasoning_effort or config.default_effort,
            chat.reasoning_language,
            config.model.instruction_form,
        )
    except ValueError as error:
        message = f"reasoning_language: {error}"
        raise ApiError(400, message, param="reasoning_language", code="invalid_value") from error
    prompt = await _render(codec, conversation)
    if len(prompt) > limits.prompt_tokens:
        message = f"the prompt takes {len(prompt)} tokens, more than the {limits.prompt_tokens} that are allowed"
        raise ApiError(400, message, param="messages", code="context_length_exceeded")
    sampling = Sampling(
        maximum_tokens=budget,
        stop_tokens=codec.stop_tokens,
        temperature=1.0 if chat.temperature is None else chat.temperature,
        top_p=1.0 if chat.top_p is None else chat.top_p,
    )
    return _Job(chat, prompt, sampling, id=f"chatcmpl-{uuid.uuid4().hex}", created=int(time.time()))


async def _render(codec: Codec, conversation: Conversation) -> list[int]:
    """In a thread: a long text takes longer to encode than the event loop may stand still."""
    return await asyncio.to_thread(codec.prompt, conversation)


async def _whole(job: _Job, config: ServingConfig, codec: Codec, engine: Engine) -> dict[str, Any]:
    """The answer in one piece."""
    completion = Completion(codec)
    async with aclosing(engine.generate(job.prompt, job.sampling)) as batches:
        async for batch in batches:
            completion.push(batch.tokens)
    completion.finish()
    reply = completion.reply
    assert reply is not None
    message: dict[str, Any] = {"role": "assistant", "content": reply.final}
    message |= {"reasoning": reply.analysis, "reasoning_content": reply.analysis}
    if reply.commentary:
        message["commentary"] = reply.commentary
    if reply.tool_calls:
        message["tool_calls"] = [_tool_call(job, place, call) for place, call in enumerate(reply.tool_calls)]
    choice = {"index": 0, "message": message, "logprobs": None, **await _ending(job, completion)}
    return {**_envelope(job, config, "chat.completion"), "choices": [choice], "usage": _usage(job, completion)}


async def _stream(
    job: _Job, config: ServingConfig, codec: Codec, engine: Engine
) -> AsyncGenerator[dict[str, Any], None]:
    """The answer as chunks; the first comes with the first tokens."""
    envelope = _envelope(job, config, "chat.completion.chunk")
    if job.request.include_usage:
        envelope["usage"] = None

    def chunk(delta: dict[str, Any], **ending: Any) -> dict[str, Any]:
        return {**envelope, "choices": [{"index": 0, "delta": delta, "finish_reason": None, **ending}]}

    completion = Completion(codec)
    opened = False
    async with aclosing(engine.generate(job.prompt, job.sampling)) as batches:
        async for batch in batches:
            if not opened:
                yield chunk({"role": "assistant", "content": ""})
                opened = True
            for delta in completion.push(batch.tokens):
                if fields := _delta_fields(delta, job, completion):
                    yield chunk(fields)
    for delta in completion.finish():
        if fields := _delta_fields(delta, job, completion):
            yield chunk(fields)
    yield chunk({}, **await _ending(job, completion))
    if job.request.include_usage:
        yield {**envelope, "choices": [], "usage": _usage(job, completion)}


async def _first(chunks: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any]:
    return await anext(chunks)


async def _events(first: dict[str, Any], chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[str, None]:
    """Chunks as server-sent events. What fails now can only be told in the stream, which then ends without [DONE]."""
    async with aclosing(chunks):
        try:
            yield _event(first)
            async for chunk in chunks:
                yield _event(chunk)
            yield "data: [DONE]\n\n"
        except EngineError as error:
            yield _event(_engine_error(error).body)
        except Exception as error:
            yield _event(_bug(error).body)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _delta_fields(delta: Delta, job: _Job, completion: Completion) -> dict[str, Any]:
    """Fields of a chunk's delta; a tool call's first, empty one carries its id and name."""
    if delta.call is None:
        return dict.fromkeys(_FIELDS.get(delta.part, ()), delta.text)
    place = {"index": delta.call}
    if delta.text:
        return {"tool_calls": [{**place, "function": {"arguments": delta.text}}]}
    return {"tool_calls": [place | _tool_call(job, delta.call, completion.calls[delta.call])]}


def _tool_call(job: _Job, place: int, call: ParsedCall) -> dict[str, Any]:
    """A call in OpenAI's form, its id made of the completion's; a tool that is no function keeps its full name."""
    function = {"name": call.recipient.removeprefix("functions."), "arguments": call.arguments}
    return {"id": f"call_{job.id.removeprefix('chatcmpl-')}_{place}", "type": "function", "function": function}


async def _ending(job: _Job, completion: Completion) -> dict[str, Any]:
    """What is known of a choice once it has ended."""
    reply = completion.reply
    assert reply is not None
    language: ReasoningLanguage = await asyncio.to_thread(judge, reply.analysis, job.request.reasoning_language)
    ending: dict[str, Any] = {"finish_reason": completion.finish_reason, "outcome": reply.outcome.value}
    if reply.unparsed:
        ending["unparsed"] = reply.unparsed
    return {**ending, "reasoning_language": language.model_dump(mode="json")}


def _envelope(job: _Job, config: ServingConfig, kind: str) -> dict[str, Any]:
    return {"id": job.id, "object": kind, "created": job.created, "model": config.model.served_name}


def _usage(job: _Job, completion: Completion) -> dict[str, Any]:
    return {
        "prompt_tokens": len(job.prompt),
        "completion_tokens": completion.tokens,
        "total_tokens": len(job.prompt) + completion.tokens,
        "completion_tokens_details": {"reasoning_tokens": completion.reasoning_tokens},
    }


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of `work`, which is cancelled when the client hangs up.

    Raises:
        ApiError: 499 when it did; nobody reads it.
    """
    task = asyncio.create_task(work)
    hang_up = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((task, hang_up), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client closed the connection", code="client_closed_request")
    finally:
        for pending in (task, hang_up):
            pending.cancel()
        await asyncio.gather(task, hang_up, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _engine_error(error: EngineError) -> ApiError:
    return ApiError(503, f"the engine failed: {error}", type="server_error", code="engine_failed")


def _bug(error: Exception) -> ApiError:
    _logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why", type="server_error", code="internal_error")
