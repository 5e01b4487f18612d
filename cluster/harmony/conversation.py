"""What is rendered: a conversation with its tools, and everything that goes into Harmony's system message.

All models are frozen. A conversation that cannot be rendered cannot be made.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Role = Literal["system", "developer", "user", "assistant", "tool"]
Effort = Literal["low", "medium", "high"]
Channel = Literal["analysis", "commentary", "final"]

CHANNELS: tuple[Channel, ...] = ("analysis", "commentary", "final")
IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
"""a function's name, as OpenAI's API allows it"""
Recipient = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")]
"""a tool's full name, such as `functions.get_weather`"""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FunctionTool(_Frozen):
    """A function that the model may call. `parameters` is a JSON schema of type object, or None for no arguments."""

    name: ToolName
    description: str = ""
    parameters: dict[str, Any] | None = None


class ResponseFormat(_Frozen):
    """A JSON schema that the final answer is to follow (structured output)."""

    name: ToolName
    description: str = ""
    json_schema: dict[str, Any]


class ToolCall(_Frozen):
    """A call the assistant makes: who it goes to, and its arguments as the text that the model writes, JSON for
    functions.
    """

    recipient: Recipient
    arguments: str


class Message(_Frozen):
    """One turn, or one step of an assistant's turn.

    A `system` turn is rendered into Harmony's developer message, as gpt-oss's own chat template does: Harmony's
    system message is written by the server.

    An assistant's message holds `thinking` (the analysis channel) and either `content` (the final channel) or a
    `tool_call`, before which `content` is a preamble for the user (the commentary channel). A `tool` message is the
    answer to a call; `tool` names who answers, such as `functions.get_weather`.

    Raises:
        ValueError: a field that the role does not have, or that it must have.
    """

    role: Role
    content: str = ""
    thinking: str | None = None
    tool_call: ToolCall | None = None
    tool: Recipient | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> Message:
        if self.role != "assistant" and (self.thinking is not None or self.tool_call is not None):
            raise ValueError(f"only an assistant turn has `thinking` or a `tool_call`, not a {self.role} turn")
        if (self.role == "tool") != (self.tool is not None):
            raise ValueError("a tool turn, and no other, names in `tool` who answers, such as functions.get_weather")
        return self

    @property
    def ends_turn(self) -> bool:
        """An assistant's message in the final channel, after which past analysis is dropped."""
        return self.role == "assistant" and self.tool_call is None


class Conversation(_Frozen):
    """Turns, plus what the server writes into Harmony's system message. No date is written unless one is given."""

    messages: tuple[Message, ...]
    tools: tuple[FunctionTool, ...] = ()
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort = "medium"
    date: str | None = None
    identity: str = IDENTITY
    knowledge_cutoff: str | None = KNOWLEDGE_CUTOFF
    channels: tuple[Channel, ...] = CHANNELS


def compact_json(value: Any) -> str:
    """JSON without spaces, letters of all languages as they are, numbers as serde_json writes them."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{compact_json(str(key))}:{compact_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(compact_json, value)) + "]"
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        value = float(value)
    return _number(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    """Python's digits in Rust's notation: 1e16 for 1e+16, and 0.00001 for 1e-05."""
    digits, _, exponent = repr(value).partition("e")
    if not exponent:
        return digits
    if int(exponent) == -5:
        return f"{'-' if value < 0 else ''}0.0000{digits.lstrip('-').replace('.', '')}"
    return f"{digits}e{int(exponent)}"
