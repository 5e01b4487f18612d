"""One row of a batch: from a record to an answer, or to an error that says what is wrong with it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster.harmony import Codec
from cluster.storage import first_line
from serving.api.asked import wishes
from serving.api.chat_schema import ChatRequest
from serving.api.errors import ApiError, to_api_error
from serving.api.fields import parse_request
from serving.batch.inputs import Line
from serving.config import ServingConfig
from serving.engines.base import Engine, EngineError
from serving.generation import Generation, GenerationError
from serving.tasks import together

FIELDS = ("reasoning_language", "reasoning_effort")
"""what a row may say beside its conversation and its id; other columns are left alone"""

Row = dict[str, Any]


class Drawing(BaseModel):
    """How answers are drawn, the same for all rows; `seed` is that of the batch, from which each row's follows."""

    model_config = ConfigDict(frozen=True)

    maximum_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0


class Answering:
    """Answers rows with one engine, as the endpoint answers requests: same checks, same prompts, same parsing.

    Args:
        strict: raise for a row that is no good, instead of an error in its place.
    """

    def __init__(
        self, config: ServingConfig, engine: Engine, codec: Codec, drawing: Drawing, *, strict: bool = False
    ) -> None:
        self.config = config
        self.engine = engine
        self.codec = codec
        self.drawing = drawing
        self.strict = strict

    async def answer(self, line: Line) -> Row:
        """The row of the output.

        Raises:
            EngineError: the engine has died; nothing is known of the row.
            ValueError: the row is no good and the batch strict; the message names it.
        """
        given = line.record.get("id") if isinstance(line.record, dict) else None
        known = isinstance(given, str | int) and not isinstance(given, bool)
        row: Row = {"id": given if known else line.source, "source": line.source}
        try:
            if given is not None and not known:
                raise ApiError(400, "id must be text or a whole number", param="id", code="invalid_value")
            return row | await self._drawn(line)
        except ApiError as error:
            if self.strict:
                raise ValueError(f"{line.source}: {error}") from None
            return row | {"error": error.body["error"]}
        except GenerationError as error:
            # What the policy calls an error is an answer that was not good enough, not a row that was not.
            return row | {"error": to_api_error(error).body["error"]}
        except EngineError as error:
            if not self.engine.healthy():
                raise
            return row | {"error": to_api_error(error).body["error"]}

    async def _drawn(self, line: Line) -> Row:
        asked = self._request(line).to_asked(self.config.default_effort)
        (wish,) = await wishes(asked, self.config, self.codec)
        generation = Generation(self.engine, self.codec, wish)
        await generation.whole()
        reply = generation.reply
        calls = [{"name": call.recipient, "arguments": call.arguments} for call in reply.tool_calls]
        return {
            "reasoning": reply.analysis,
            "content": reply.final,
            "commentary": reply.commentary,
            "tool_calls": calls,
            "unparsed": reply.unparsed,
            "outcome": reply.outcome.value,
            "finish_reason": generation.finish_reason,
            "attempts": generation.attempts,
            "rescued": generation.rescued,
            "reasoning_language": generation.language.model_dump(mode="json"),
            "usage": {
                "prompt_tokens": len(wish.prompt),
                "completion_tokens": generation.tokens,
                "reasoning_tokens": generation.reasoning_tokens,
            },
        }

    def _request(self, line: Line) -> ChatRequest:
        """The row as a request to the endpoint.

        Raises:
            ApiError: it is none.
        """
        if line.fault:
            raise ApiError(400, line.fault, code="invalid_json")
        if not isinstance(line.record, dict):
            raise ApiError(400, "the row is no object with messages or prompt", code="invalid_value")
        record = {name: value for name, value in line.record.items() if value is not None}
        body: dict[str, Any] = {
            "model": self.config.model.served_name,
            "messages": _messages(record),
            "max_completion_tokens": self.drawing.maximum_tokens,
            "temperature": self.drawing.temperature,
            "top_p": self.drawing.top_p,
            "seed": row_seed(self.drawing.seed, line.source),
        }
        body |= {name: record[name] for name in FIELDS if name in record}
        try:
            encoded = json.dumps(body, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ApiError(
                400, f"the row cannot be written as JSON in UTF-8 ({first_line(error)})", code="invalid_value"
            ) from None
        if len(encoded) > self.config.limits.body_bytes:
            message = f"the row is larger than limits.body_bytes = {self.config.limits.body_bytes}"
            raise ApiError(413, message, code="request_too_large")
        return parse_request(ChatRequest, encoded)


def row_seed(seed: int, source: str) -> int:
    """The seed of the row at `source`: the same in every run, whatever else is in the batch. 0 to 2^31 - 1."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{source}".encode()).digest()[:4]) >> 1


def _messages(record: dict[str, Any]) -> Any:
    """The conversation of a record. Thinking of past turns is left out, and so are fields that are null."""
    messages, prompt = record.get("messages"), record.get("prompt")
    if messages is None and prompt is None:
        raise ApiError(400, "the row has neither messages nor prompt", param="messages", code="missing_field")
    if messages is not None and prompt is not None:
        raise ApiError(400, "the row has both messages and prompt; keep one", param="prompt", code="invalid_value")
    if messages is None:
        return [{"role": "user", "content": prompt}]
    if not isinstance(messages, list):
        return messages
    return [
        {name: value for name, value in turn.items() if value is not None and name != "thinking"}
        if isinstance(turn, dict)
        else turn
        for turn in messages
    ]


async def answer_all(answering: Answering, lines: list[Line], places: asyncio.Semaphore) -> list[Row]:
    """Answers in the order of `lines`, as many at a time as there are `places`.

    Raises:
        EngineError, ValueError: as `Answering.answer`, of the first row that raised; the others are given up.
    """

    async def one(line: Line) -> Row:
        async with places:
            return await answering.answer(line)

    return await together(one(line) for line in lines)
