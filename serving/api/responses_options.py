"""What a Responses request asks for beside its input: tools, the form of the answer, how much to think.

Reference: https://platform.openai.com/docs/api-reference/responses/create
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from pydantic import AfterValidator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from cluster.harmony import Effort, FunctionTool, ResponseFormat
from serving.api.errors import ApiError
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
_DEEPEST = 32
"""levels of a schema: each costs several frames where it is checked and rendered"""


def _checked(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema that can be written into a prompt and repeated in a response.

    Raises:
        PydanticCustomError: it is none, is nested too deeply, or holds a number that JSON cannot spell.
    """
    if _depth(schema) > _DEEPEST:
        raise _no_schema(f"is nested more than {_DEEPEST} levels deep")
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise _no_schema(f"is no JSON schema, at {error.json_path}: {error.message[:200]}") from None
    return schema


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
        raise _no_schema("holds a number that is none, or too large")
    return 0


def _no_schema(reason: str) -> PydanticCustomError:
    return PydanticCustomError("schema", "{reason}", {"reason": reason})


Schema = Annotated[dict[str, Any], AfterValidator(_checked)]


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
    schema_: Annotated[Schema, Field(alias="schema")]
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
        """The form as the codec writes it into the prompt."""
        if isinstance(self.format, JsonSchemaFormat):
            given = self.format
            return ResponseFormat(name=given.name, description=given.description or "", json_schema=given.schema_)
        if isinstance(self.format, JsonObjectFormat):
            return ResponseFormat(name="json_object", json_schema={"type": "object"})
        return None


class FunctionItem(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _asks_for_nothing_else(cls, value: Any) -> Any:
        return drop_neutral(value, _NEUTRAL_TOOL)

    def to_tool(self) -> FunctionTool:
        """The function as the codec takes it."""
        return FunctionTool(name=self.name, description=self.description or "", parameters=self.parameters)


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


def shown_tools(tools: Sequence[FunctionItem], choice: str | NamedTool | AllowedTools | None) -> list[FunctionItem]:
    """The functions that the model is told of; with the choice `none` it is told of none.

    Raises:
        ApiError: 400 for two functions of one name, and for a choice among functions that are not there.
    """
    known: dict[str, FunctionItem] = {}
    for place, tool in enumerate(tools):
        if tool.name in known:
            raise _refused(f"tools.{place}.name", f"two functions are called {tool.name!r}")
        known[tool.name] = tool
    if choice == "none":
        return []
    if choice == "required" or isinstance(choice, NamedTool):
        raise _refused("tool_choice", "a call cannot be forced here; send 'auto' or 'none'", "unsupported_parameter")
    if not isinstance(choice, AllowedTools):
        return list(tools)
    if choice.mode == "required":
        raise _refused("tool_choice.mode", "a call cannot be forced here; send 'auto'", "unsupported_parameter")
    for place, named in enumerate(choice.tools):
        if named.name not in known:
            raise _refused(f"tool_choice.tools.{place}.name", f"no function of tools is called {named.name!r}")
    allowed = {named.name for named in choice.tools}
    return [tool for tool in tools if tool.name in allowed]


def _refused(param: str, reason: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, f"{param}: {reason}", param=param, code=code)
