"""Tools as gpt-oss is told of them: examples to read, and JSON schemas of all kinds against openai-harmony."""

from __future__ import annotations

from typing import Any

import openai_harmony as oh
import pytest
from hypothesis import given, settings

from cluster.harmony import FunctionTool
from cluster.harmony.conversation import compact_json
from cluster.harmony.developer import functions_namespace
from cluster.harmony.typescript import typescript
from tests.cluster.conversations import function_tools, json_schemas

WEATHER = FunctionTool(
    name="get_weather",
    description="The weather of a place.\nNow, or on a day.",
    parameters={
        "type": "object",
        "properties": {
            "place": {"type": "string", "description": "City and country"},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
            "days": {"type": "array", "items": {"type": "integer"}, "nullable": True},
            "near": {"type": "object", "properties": {"km": {"type": "number", "default": 1.5}}},
            "source": {"description": "Where from.", "oneOf": [{"type": "string"}, {"type": "integer", "default": 0}]},
        },
        "required": ["place"],
    },
)
WEATHER_TEXT = """## functions

namespace functions {

// The weather of a place.
// Now, or on a day.
type get_weather = (_: {
// City and country
place: string,
unit?: "celsius" | "fahrenheit", // default: celsius
days?: number[] | null,
near?: {
    km?: number, // default: 1.5
    },
// Where from.
source?:
 | string
 | number // default: 0
,
}) => any;

type stop = () => any;

} // namespace functions"""
ODD: tuple[Any, ...] = (True, "string", None, [], {"type": 3}, {"type": "object", "properties": {"x": True, "y": None}})


def in_harmony(encoding: Any, tool: FunctionTool) -> str:
    described = oh.ToolDescription.new(tool.name, tool.description, tool.parameters)
    content = oh.DeveloperContent().with_function_tools([described])
    return str(encoding.decode(encoding.render(oh.Message.from_role_and_content(oh.Role.DEVELOPER, content))))


def in_ours(tool: FunctionTool) -> str:
    return f"<|start|>developer<|message|># Tools\n\n{functions_namespace([tool])}<|end|>"


def test_tools_in_words() -> None:
    assert functions_namespace([WEATHER, FunctionTool(name="stop")]) == WEATHER_TEXT


@pytest.mark.parametrize("tool", [WEATHER, *function_tools()], ids=lambda tool: tool.name)
def test_each_feature_of_schemas_is_openai_harmonys(harmony_encoding: Any, tool: FunctionTool) -> None:
    assert in_ours(tool) == in_harmony(harmony_encoding, tool)


@settings(max_examples=200, deadline=None)
@given(schema=json_schemas())
def test_nested_schemas_are_openai_harmonys(harmony_encoding: Any, schema: dict[str, Any]) -> None:
    tool = FunctionTool(name="f", description="F.", parameters=schema)
    assert in_ours(tool) == in_harmony(harmony_encoding, tool)


@pytest.mark.parametrize("odd", ODD, ids=repr)
@pytest.mark.parametrize(
    "key", ["items", "properties", "oneOf", "enum", "required", "type", "title", "examples", "value"]
)
def test_schemas_that_are_none_do_not_break_it(harmony_encoding: Any, key: str, odd: Any) -> None:
    kinds = ({"type": "array", key: odd}, {"type": "object", key: odd}, {"type": "string", key: odd}, {"oneOf": [odd]})
    properties = {f"p{number}": kind for number, kind in enumerate(kinds)} | {"value": odd}
    tool = FunctionTool(name="f", description="F.", parameters={"type": "object", "properties": properties})
    assert in_ours(tool) == in_harmony(harmony_encoding, tool)


def test_a_schema_that_is_none_is_any() -> None:
    assert [typescript(odd) for odd in (True, None, {}, {"type": "null"})] == ["any"] * 4


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e15, "1000000000000000.0"),
        (1e16, "1e16"),
        (-2.5e-5, "-0.000025"),
        (1e-6, "1e-6"),
        (2**64 - 1, "18446744073709551615"),
        (2**64, "1.8446744073709552e19"),
        ({"é": [1, 2.0, None, True, 'a "b"\n']}, '{"é":[1,2.0,null,true,"a \\"b\\"\\n"]}'),
    ],
)
def test_json_is_written_as_openai_harmony_writes_it(harmony_encoding: Any, value: Any, text: str) -> None:
    assert compact_json(value) == text
    schema = {"type": "object", "properties": {"x": {"default": [value]}}}
    assert f"default: [{text}]\n" in in_harmony(harmony_encoding, FunctionTool(name="f", parameters=schema))
