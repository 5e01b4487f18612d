"""What a request asks for, whatever interface it came by: held against the limits, and rendered into a prompt."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from cluster.harmony import Codec, Conversation, Effort, FunctionTool, Reply, ResponseFormat
from cluster.languages import find_language
from serving.api.errors import ApiError
from serving.api.fields import Strict
from serving.api.structured import fault_of_json
from serving.api.tools import call_faults
from serving.attempt import Faults, Wish
from serving.config import OnFault, PolicyConfig, ServingConfig
from serving.contract import ask_for_call, ask_for_language
from serving.engines.base import Sampling


@dataclass(frozen=True)
class Asked:
    """A request in the endpoint's own terms; None takes the endpoint's default."""

    model: str
    conversation: Conversation
    choices: int = 1
    output_tokens: int | None = None
    output_field: str = "max_completion_tokens"
    """what the request calls its budget, for errors"""
    messages_field: str = "messages"
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    must_call: str | None = None
    """full name of the tool that has to be called, `functions` for any"""
    parallel_calls: bool = True
    """whether the model may make several calls at once"""
    language: str | None = None
    """tag or name of the language to think in"""
    on_malformed: OnFault | None = None
    on_wrong_language: OnFault | None = None
    retries: int | None = None
    rescue: bool | None = None
    """whether thinking is closed in time for an answer; the share is the configuration's or `DEFAULT_RESCUE_SHARE`"""


DEFAULT_RESCUE_SHARE = 0.25
_FEW_LETTERS = 2048
"""of a conversation that is rendered in under a millisecond: handing it to a thread would take as long"""


class Asking(Strict, ABC):
    """A request for an answer, whole or as a stream: what all interfaces take under the same names."""

    model: str
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    parallel_tool_calls: bool | None = None
    """false ends the completion with its first call"""
    reasoning_language: str | None = None
    """tag or name of the language to think in"""
    on_malformed: OnFault | None = None
    on_wrong_language: OnFault | None = None
    retries: Annotated[int, Field(ge=0, le=8)] | None = None
    rescue: bool | None = None
    include_reasoning: bool | None = None
    """false leaves the thinking out of the answer; usage, outcome and language still tell of it"""

    @abstractmethod
    def to_asked(self, default_effort: Effort) -> Asked:
        """The request in the endpoint's own terms.

        Raises:
            ApiError: 400 for what cannot be used together, or at all.
        """

    @property
    @abstractmethod
    def brings_schemas(self) -> bool:
        """Whether `to_asked` has schemas to check."""

    @property
    def shows_reasoning(self) -> bool:
        """Whether the answer is to hold its thinking."""
        return self.include_reasoning is not False

    def common(self) -> dict[str, Any]:
        """What of `Asked` follows from the fields above."""
        return {
            "model": self.model,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "parallel_calls": self.parallel_tool_calls is not False,
            "language": self.reasoning_language,
            "on_malformed": self.on_malformed,
            "on_wrong_language": self.on_wrong_language,
            "retries": self.retries,
            "rescue": self.rescue,
        }


async def understood(request: Asking, config: ServingConfig) -> Asked:
    """The request in the endpoint's own terms, its schemas checked in a thread: that takes longer than the event loop
    may stand still.

    Raises:
        ApiError: as `Asking.to_asked`.
    """
    if request.brings_schemas:
        return await asyncio.to_thread(request.to_asked, config.default_effort)
    return request.to_asked(config.default_effort)


@dataclass(frozen=True)
class Check:
    """Holds a reply against the tools and the answer's form that were asked for."""

    tools: tuple[FunctionTool, ...]
    form: ResponseFormat | None
    must_call: str | None = None

    def __call__(self, reply: Reply) -> Faults:
        """What is wrong; a reply that calls a tool owes no answer yet."""
        calls = call_faults(reply, self.tools, self.must_call) if reply.tool_calls or self.must_call else []
        if self.form is None:
            return Faults(calls, None)
        owed = bool(reply.final) or not reply.tool_calls
        return Faults(calls, fault_of_json(reply.final, self.form.json_schema) if owed else None, formed=True)


async def wishes(asked: Asked, config: ServingConfig, codec: Codec) -> list[Wish]:
    """One wish for each choice, all with the same prompt.

    Raises:
        ApiError: 404 for another model, 400 for what the limits or the languages do not allow.
    """
    limits, engine = config.limits, config.engine
    if asked.model not in config.model.served_names:
        served = ", ".join(map(repr, config.model.served_names))
        message = f"model {asked.model!r} is not served here; {served} {'are' if config.model.adapters else 'is'}"
        raise ApiError(404, message, param="model", code="model_not_found")
    if len(asked.conversation.messages) > limits.messages:
        raise _refused(asked.messages_field, f"{asked.messages_field} holds more than {limits.messages}")
    if len(asked.conversation.tools) > limits.tools:
        raise _refused("tools", f"tools holds more than {limits.tools}")
    if asked.choices > limits.choices:
        raise _refused("n", f"n must be at most {limits.choices}, got {asked.choices}")
    budget = asked.output_tokens or engine.default_output_tokens
    if budget > engine.maximum_output_tokens:
        field = asked.output_field
        raise _refused(field, f"{field} must be at most {engine.maximum_output_tokens}, got {budget}")
    tag, conversation = _in_language(asked, config)
    if asked.must_call:
        conversation = ask_for_call(conversation, asked.must_call)
    prompt = await _rendered(conversation, codec)
    if len(prompt) > limits.prompt_tokens:
        message = f"the prompt takes {len(prompt)} tokens, more than the {limits.prompt_tokens} that are allowed"
        raise _refused(asked.messages_field, message, code="context_length_exceeded")
    sampling = Sampling(
        maximum_tokens=budget,
        stop_tokens=codec.stop_tokens,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        seed=asked.seed,
        logprobs=asked.logprobs,
        adapter=asked.model if asked.model in config.model.adapters else None,
    )
    wish = Wish(
        prompt,
        sampling,
        language=tag,
        policy=_policy(asked, config.policy),
        stop=asked.stop,
        must_call=asked.must_call,
        parallel_calls=asked.parallel_calls,
        check=Check(conversation.tools, conversation.response_format, asked.must_call),
        checks_schemas=bool(conversation.tools or conversation.response_format),
    )
    return [
        wish if asked.seed is None else replace(wish, sampling=replace(sampling, seed=asked.seed + place))
        for place in range(asked.choices)
    ]


async def _rendered(conversation: Conversation, codec: Codec) -> list[int]:
    """The prompt's tokens; in a thread where that takes longer than the event loop may stand still."""
    messages = conversation.messages
    calls = any(message.tool_call for message in messages)
    letters = sum(len(message.content) + len(message.thinking or "") for message in messages)
    if letters > _FEW_LETTERS or calls or conversation.tools or conversation.response_format:
        return await asyncio.to_thread(codec.prompt, conversation)
    return codec.prompt(conversation)


def _in_language(asked: Asked, config: ServingConfig) -> tuple[str | None, Conversation]:
    if asked.language is None:
        return None, asked.conversation
    try:
        tag = find_language(asked.language).tag
    except ValueError as error:
        raise _refused("reasoning_language", f"reasoning_language: {error}") from error
    return tag, ask_for_language(asked.conversation, tag, config.model.instruction_form)


def _policy(asked: Asked, default: PolicyConfig) -> PolicyConfig:
    wanted: dict[str, Any] = {
        "on_malformed": asked.on_malformed,
        "on_wrong_language": asked.on_wrong_language,
        "retries": asked.retries,
    }
    if asked.rescue is not None:
        wanted["rescue_share"] = (default.rescue_share or DEFAULT_RESCUE_SHARE) if asked.rescue else 0.0
    return default.model_copy(update={name: value for name, value in wanted.items() if value is not None})


def _refused(param: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)
