"""What a Responses request asks for beside its input: tools, the form of the answer, how much to think.

Reference: https://platform.openai.com/docs/api-reference/responses/create
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from cluster.harmony import Effort, FunctionTool, ResponseFormat
from cluster.harmony.conversation import ToolName
from serving.api.errors import ApiError
from serving.api.fields import Strict, by_type, drop_neutral
from serving.api.structured import JSON_OBJECT, schema_format
from serving.api.tools import Function, NamedFunction, full_name, function_tools, must_call

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

    def to_response_format(self) -> ResponseFormat | None:
        """As the codec writes it; None for free text.

        Raises:
            ApiError: 400 for a schema that cannot be used.
        """
        if isinstance(self.format, JsonSchemaFormat):
            given = self.format
            return schema_format(given.name, given.description, given.schema_, "text.format.schema")
        return JSON_OBJECT if isinstance(self.format, JsonObjectFormat) else None


class FunctionItem(Function):
    """A function that the model may call."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _asks_for_nothing_else(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("type", "function") != "function":
            kind = str(value["type"])[:64]
            message = "{name}: tools of type {kind} are not served here, only those of type 'function'"
            raise PydanticCustomError("unsupported", message, {"name": "type", "kind": repr(kind)})
        return drop_neutral(value, _NEUTRAL_TOOL)


class NamedItem(NamedFunction):
    """The name of one of the request's functions."""

    type: Literal["function"]


class AllowedTools(Strict):
    """Some of the request's functions: the model is shown no others."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedItem], Field(min_length=1)]


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("string")]
    | Annotated[NamedItem, Tag("type=function")]
    | Annotated[AllowedTools, Tag("type=allowed_tools")],
    by_type(plain="string"),
]


def offered(
    functions: Sequence[FunctionItem], choice: str | NamedItem | AllowedTools | None
) -> tuple[tuple[FunctionTool, ...], str | None]:
    """The functions that the model is told of, and which it has to call, as `must_call` says it.

    Raises:
        ApiError: 400 for functions that cannot be used, and for a choice among others than those.
    """
    tools = function_tools(functions, "tools.{}")
    if isinstance(choice, NamedItem):
        _must_be_there(choice.name, functions, "tool_choice.name")
        return tools, full_name(choice.name)
    if not isinstance(choice, AllowedTools):
        return () if choice == "none" else tools, must_call(choice, functions)
    for place, named in enumerate(choice.tools):
        _must_be_there(named.name, functions, f"tool_choice.tools.{place}.name")
    allowed = {named.name for named in choice.tools}
    shown = [function for function in functions if function.name in allowed]
    return tuple(tool for tool in tools if tool.name in allowed), must_call(choice.mode, shown)


def _must_be_there(name: str, functions: Sequence[FunctionItem], param: str) -> None:
    if name not in {function.name for function in functions}:
        raise ApiError(400, f"{param}: {name!r} is not among the tools", param=param, code="invalid_value")
