"""Columns and shapes of records: which of them hold the conversation, tool calls, and settings beside the turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.harmony import Conversation, Message, ToolCall
from tests.training.test_conversations import ANSWER, GOOD, USER
from training.data.conversations import DataError, read_conversations
from training.sections import ColumnsConfig

Read = Callable[..., Conversation]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def one(record: dict[str, Any], **columns: str) -> Conversation:
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
        (found,) = read_conversations(str(path), ColumnsConfig.model_validate(columns))
        return found.conversation

    return one


ASKED = (Message(role="user", content="2 + 3?"), Message(role="assistant", content="5.", thinking="Hm."))


@pytest.mark.parametrize(
    "record",
    [
        {"question": "2 + 3?", "reasoning": "Hm.", "answer": "5."},
        {"prompt": "2 + 3?", "cot": "Hm.", "response": "5.", "id": 3},
        {"problem": "2 + 3?", "rationale": "Hm.", "solution": "5.", "answer": None},
        {"instruction": "2 + 3?", "thinking": "Hm.", "completion": "5."},
        {"input": "2 + 3?", "thinking": "Hm.", "output": "5.", "tools": None},
        {"messages": None, "question": "2 + 3?", "reasoning": "Hm.", "answer": "5."},
        {"conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5.", "thinking": "Hm."}]},
        {"messages": [{"from": "user", "value": "2 + 3?"}, {"from": "model", "value": "5.", "reasoning": "Hm."}]},
        {
            "prompt": "2 + 3?",
            "messages": [{"role": m.role, "content": m.content, "thinking": m.thinking} for m in ASKED],
        },
    ],
)
def test_shapes_that_are_found_by_themselves(read: Read, record: dict[str, Any]) -> None:
    assert read(record).messages == ASKED


def test_named_columns(read: Read) -> None:
    record = {"q": "2 + 3?", "r": "Hm.", "a": "5.", "how": "Be brief.", "question": "other", "answer": "other"}
    messages = read(record, question="q", reasoning="r", answer="a", instructions="how").messages
    assert messages == (Message(role="developer", content="Be brief."), *ASKED)
    alpaca = {"instruction": "Add.", "input": "2 + 3?", "output": "5.", "thinking": "Hm."}
    assert read(alpaca, instructions="instruction").messages == (Message(role="developer", content="Add."), *ASKED)
    assert read({"chat": [USER, ANSWER], "messages": []}, messages="chat").messages[-1].content == "5."
    with pytest.raises(ValidationError, match="but not both"):
        ColumnsConfig(messages="chat", answer="a")


@pytest.mark.parametrize(
    ("record", "columns", "message"),
    [
        (
            {"messages": [USER, ANSWER], "conversations": []},
            {},
            "`messages` and `conversations` could each be the messages; set data.columns.messages to the one to read",
        ),
        (
            {"instruction": "Add.", "input": "2", "output": "5."},
            {},
            "`instruction` and `input` could each be the question; set data.columns.question",
        ),
        ({"problem": "2", "solution": "5", "answer": "5"}, {}, "`answer` and `solution` could each be the answer"),
        (GOOD, {"messages": "chat"}, "no column 'chat', which data.columns.messages names; it has 'messages'"),
        ({"q": None, "answer": "5."}, {"question": "q"}, "`q` is null, and data.columns.question names it"),
        ({"text": "x"}, {}, "with a list `messages`, or with a question and an answer; it has 'text'; name yours"),
        ({"question": "2?"}, {}, "it has 'question'"),
        ({"messages": None}, {}, r"it has 'messages' \(null\)"),
        ({"question": 2, "answer": "5."}, {}, "`question` must be text, not int"),
        ({"question": "2?", "answer": " "}, {}, "the answer `answer` is empty"),
        ({"question": "2?", "answer": "5.", "reasoning": ["Hm."]}, {}, "`reasoning` must be text, not list"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, {}, r"conversations\[0\]: from 'bot' is unknown"),
        ({"conversations": [{"from": "human", "value": None}]}, {}, r"conversations\[0\]: `value` is null"),
        ({"conversations": [{"from": "human"}]}, {}, r"conversations\[0\] has no `value`"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, {}, "the result answers no call"),
    ],
)
def test_unclear_columns_are_named(read: Read, record: dict[str, Any], columns: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(record, **columns)


def test_multilingual_thinking(read: Read) -> None:
    system = "reasoning language: French\n\nYou are a poet."
    record = {
        "reasoning_language": "French",
        "developer": "You are a poet.",
        "user": "2 + 3?",
        "analysis": "Hm.",
        "final": "5.",
        "messages": [
            {"role": "system", "content": system, "thinking": None},
            {"role": "user", "content": "2 + 3?", "thinking": None},
            {"role": "assistant", "content": "5.", "thinking": "Hm."},
        ],
    }
    assert read(record).messages == (Message(role="system", content=system), *ASKED)


# Tools

WEATHER = {"name": "get_weather", "description": "Weather.", "parameters": {"type": "object", "properties": {}}}


def call(key: str | None, arguments: Any, name: str = "get_weather") -> dict[str, Any]:
    return {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*made: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(made), **fields}


def result(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **fields}


def called(arguments: str, name: str = "get_weather", **fields: Any) -> Message:
    return Message(role="assistant", tool_call=ToolCall(recipient=f"functions.{name}", arguments=arguments), **fields)


def answered(content: str, name: str = "get_weather") -> Message:
    return Message(role="tool", tool=f"functions.{name}", content=content)


def test_parallel_calls_become_a_message_each_with_its_result(read: Read) -> None:
    made = calls(call("a", '{"city": "Köln"}'), call("b", {"city": "Bonn"}), thinking="Two.", content="Let me look.")
    record = {"messages": [USER, made, result("rain", tool_call_id="b"), result("sun", tool_call_id="a"), ANSWER]}
    assert read(record).messages[1:-1] == (
        called('{"city":"Köln"}', thinking="Two.", content="Let me look."),
        answered("sun"),
        called('{"city":"Bonn"}'),
        answered("rain"),
    )


@pytest.mark.parametrize(
    "fields", [{"tool_call_id": "a"}, {"name": "get_weather"}, {"name": "functions.get_weather"}, {}]
)
def test_a_result_finds_its_call(read: Read, fields: dict[str, str]) -> None:
    record = {"messages": [USER, calls(call("a", "")), result("", **fields), calls(call("b", None))]}
    assert read(record).messages[1:] == (called("{}"), answered(""), called("{}"))


def test_calls_in_other_shapes(read: Read) -> None:
    native = {"role": "assistant", "tool_call": {"recipient": "python", "arguments": "print(1)"}}
    messages = read({"messages": [USER, native, result("1", tool="python"), ANSWER]}).messages
    assert messages[1:3] == (
        Message(role="assistant", tool_call=ToolCall(recipient="python", arguments="print(1)")),
        Message(role="tool", tool="python", content="1"),
    )
    sharegpt = [
        {"from": "human", "value": "?"},
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Köln"}}'},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "Rain."},
    ]
    assert read({"conversations": sharegpt}).messages[1:3] == (called('{"city":"Köln"}'), answered("rain"))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, result("x", tool_call_id="a"), ANSWER], r"messages\[1\]: the result answers no call: .*'a'"),
        ([USER, calls(call("a", "")), result("x", tool_call_id="b"), ANSWER], r"messages\[2\]: the result answers no"),
        ([USER, calls(call("a", "")), result("x", name="f"), ANSWER], "answers no call: it has name 'f'"),
        ([USER, calls(call("a", ""), call("b", "")), result("x"), ANSWER], "neither tool_call_id nor name"),
        ([USER, calls(call("a", "")), *[result("x", tool_call_id="a")] * 2, ANSWER], r"messages\[3\]: the result"),
        ([USER, calls(call("a", "")), ANSWER], r"messages\[1\]: the call of .* has no result before messages\[2\]"),
        ([USER, calls(call("a", ""), call("b", ""))], "only a single call may end a conversation"),
        ([USER, calls(call("a", "")), result("x")], "no assistant turn at its end"),
        ([USER, calls(call("a", "")), result(None)], r"messages\[2\]: `content` is null"),
        ([USER, calls(call("a", "")), result({"x": 1})], r"messages\[2\]: `content` must be text, not dict"),
        ([USER, calls(call("a", "{"))], r"messages\[1\].tool_calls\[0\]: `arguments` is text that is not valid JSON"),
        ([USER, calls(call("a", "[]"))], "`arguments` must be a JSON object, not a list"),
        ([USER, calls(call("a", {"x": float("nan")}))], "`arguments` cannot be written as JSON"),
        ([USER, calls(call("a", "", name="get weather"))], "'functions.get weather' is no tool's name"),
        ([USER, calls({"id": "a"})], r"tool_calls\[0\] must be an object with a `function`"),
        ([USER, ANSWER | {"tool_calls": "x"}], "`tool_calls` must be a list, not text"),
        ([USER | {"tool_calls": [call("a", "")]}, ANSWER], "only an assistant turn has tool calls, not a user turn"),
    ],
)
def test_broken_calls_are_named(read: Read, messages: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read({"messages": messages})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function", "function": WEATHER}],
        [WEATHER],
        json.dumps([{"type": "function", "function": WEATHER}]),
        [json.dumps(WEATHER)],
        [WEATHER | {"strict": True, "parameters": json.dumps(WEATHER["parameters"])}],
    ],
)
def test_tools_and_settings_beside_the_turns(read: Read, tools: Any) -> None:
    schema = {"name": "answer", "schema": {"type": "object"}, "description": None}
    found = read(
        GOOD
        | {"tools": tools, "reasoning_effort": "low", "date": "2025-08-05"}
        | {"response_format": {"type": "json_schema", "json_schema": schema}}
    )
    assert [tool.model_dump() for tool in found.tools] == [WEATHER]
    assert (found.reasoning_effort, found.date) == ("low", "2025-08-05")
    assert found.response_format is not None
    assert found.response_format.model_dump() == {
        "name": "answer",
        "description": "",
        "json_schema": {"type": "object"},
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": {"x": 1}}, "`tools` must be a list of functions, not dict"),
        ({"tools": "get_weather"}, "`tools` is text that is not valid JSON"),
        ({"tools": [3]}, r"tools\[0\] must be an object with `name`"),
        ({"tools": [None]}, r"tools\[0\] must be an object with `name`"),
        (
            {"tools": [WEATHER, WEATHER | {"name": "get weather"}]},
            r"tools\[1\]: `name` is 'get weather'; String should",
        ),
        ({"tools": [WEATHER | {"parameters": [1]}]}, r"tools\[0\]: `parameters` is \[1\]"),
        ({"tools": [{"type": "web_search"}]}, r"tools\[0\]: type 'web_search' is unknown"),
        ({"reasoning_effort": "huge"}, "reasoning_effort 'huge' is unknown; use one of low, medium, high"),
        ({"date": 5}, "`date` must be text, not int"),
        ({"response_format": {"type": "json_object"}}, "response_format must be {type: json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "`json_schema` is None"),
    ],
)
def test_broken_settings_of_a_record_are_named(read: Read, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(GOOD | fields)
