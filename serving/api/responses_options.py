"""What a Responses request asks for beside its input: tools, the form of the answer, how much to think.

Reference: https://platform.openai.com/docs/api-reference/responses/create
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from cluster.harmony import Effort, FunctionTool, ResponseFormat
from serving.api.fields import Strict, by_type, drop_neutral

_NEUTRAL_REASONING: dict[str, tuple[Any, ...]] = {
    "context": ("auto", "current_turn"),
    "generate_summary": ("auto",),
    "mode": ("standard",),
    "summary": ("auto",),
}
_NEUTRAL_TEXT: dict[str, tuple[Any, ...]] = {"verbosity": ("medium",)}
_NEUTRAL_TOOL: dict[str, tuple[Any, ...]] = {
    "allowed_callers": (["direct"],),
    "async": (False,),
    "defer_loading": (False,),
    "output_schema": (),
}

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class ReasoningOptions(Strict):
    """How much the model thinks. Its thinking is returned whole, so that there are no summaries of it."""

    effort: Effort | None = None

    @model_validator(mode="before")
    @classmethod
    def _asks_for_nothing_else(cls, value: Any) -> Any:
        return drop_neutral(value, _NEUTRAL_REASONING)


class PlainFormat(Strict):
    """An answer in free text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """An answer that is a JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    """An answer that follows a JSON schema."""

    type: Literal["json_schema"]
    name: ToolName
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


Format = Annotated[
    Annotated[PlainFormat, Tag("type=text")]
    | Annotated[JsonObjectFormat, Tag("type=json_object")]
    | Annotated[JsonSchemaFormat, Tag("type=json_schema")],
    by_type(),
]


class TextOptions(Strict):
    """The form of the answer."""

    format: Format | None = None

    @model_validator(mode="before")
    @classmethod
    def _asks_for_nothing_else(cls, value: Any) -> Any:
        return drop_neutral(value, _NEUTRAL_TEXT)


class FunctionItem(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _asks_for_nothing_else(cls, value: Any) -> Any:
        return drop_neutral(value, _NEUTRAL_TOOL)


class NamedTool(Strict):
    """One of the request's functions."""

    type: Literal["function"]
    name: ToolName


class AllowedTools(Strict):
    """Some of the request's functions: the model is shown no others."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1)]


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("string")]
    | Annotated[NamedTool, Tag("type=function")]
    | Annotated[AllowedTools, Tag("type=allowed_tools")],
    by_type(plain="string"),
]
