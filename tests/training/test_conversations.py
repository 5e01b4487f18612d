"""Reading conversations: what a good file may look like, and the one sentence that each broken line gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.harmony import Conversation, Message, ToolCall
from training.config import ColumnsConfig
from training.data.conversations import DataError, SourcedConversation, read_conversations, scan_conversations

USER = {"role": "user", "content": "What is 2 + 3?"}
ANSWER = {"role": "assistant", "content": "5.", "thinking": "Deux plus trois."}
GOOD = {"messages": [USER, ANSWER]}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], str]:
    def to_file(data: bytes) -> str:
        path = tmp_path / "data.jsonl"
        path.write_bytes(data)
        return str(path)

    return to_file


def line(record: Any) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def turns(*messages: Any) -> bytes:
    return line({"messages": list(messages)})


def test_good_file(write: Callable[[bytes], str]) -> None:
    path = write(turns({"role": "system", "content": "Be brief."}, USER, ANSWER, USER, ANSWER) + line(GOOD))
    first, second = read_conversations(path)
    assert (str(first.source), str(second.source)) == (f"{path}:1", f"{path}:2")
    assert [message.role for message in first.conversation.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert [message.model_dump(exclude_none=True) for message in second.conversation.messages] == [USER, ANSWER]


def test_byte_order_mark_carriage_returns_and_blank_lines(write: Callable[[bytes], str]) -> None:
    one = line(GOOD).replace(b"\n", b"\r\n")
    path = write(b"\xef\xbb\xbf" + one + b"\r\n   \n" + one + b"\n\n" + one.rstrip())
    found = list(read_conversations(path))
    assert [str(record.source) for record in found] == [f"{path}:{number}" for number in (1, 4, 7)]
    assert len({record.conversation for record in found}) == 1


def test_line_separators_within_a_text_end_no_line(write: Callable[[bytes], str]) -> None:
    text = "a\u2028b\u0085c\x0bd"
    (found,) = read_conversations(write(turns(USER, {"role": "assistant", "content": text})))
    assert found.conversation.messages[-1].content == text


@pytest.mark.parametrize(
    ("fields", "thinking"),
    [
        ({}, None),
        ({"thinking": None}, None),
        ({"thinking": "A."}, "A."),
        ({"reasoning_content": "B."}, "B."),
        ({"reasoning": "C."}, "C."),
        ({"thinking": None, "reasoning_content": "B."}, "B."),
        ({"thinking": "A.", "reasoning_content": "B."}, "A."),
    ],
)
def test_thinking_has_three_names(write: Callable[[bytes], str], fields: dict[str, str], thinking: str | None) -> None:
    (found,) = read_conversations(write(turns(USER, {"role": "assistant", "content": "5.", **fields})))
    assert found.conversation.messages[-1].thinking == thinking


def test_other_fields_are_left_alone(write: Callable[[bytes], str]) -> None:
    record = {"id": 7, "messages": [USER | {"name": "Ada"}, ANSWER | {"thinking": None, "tool_calls": []}]}
    (found,) = read_conversations(write(line(record | {"language": "French"})))
    assert found.fields == {"id": 7, "language": "French"}


BROKEN = {
    "cut off": (b'{"messages": [', "not valid JSON .* at column"),
    "number of 5000 digits": (b'{"messages": ' + b"1" * 5000 + b"}", "not valid JSON"),
    "nested without end": (b"[" * 100_000, "not valid JSON"),
    "key twice": (b'{"messages": [{"role": "user", "role": "x"}]}', "the key 'role' stands twice in one JSON object"),
    "two objects": (line(GOOD).strip() + line(GOOD), "not valid JSON"),
    "list": (line([GOOD]), "must be a JSON object with a list `messages`"),
    "text": (line("messages"), "must be a JSON object"),
    "null": (line(None), "must be a JSON object"),
    "no messages": (line({"conversation": [USER]}), "with a list `messages`"),
    "messages are no list": (line({"messages": {"0": USER}}), "with a list `messages`"),
    "empty conversation": (turns(), "the conversation is empty"),
    "turn is text": (turns(USER, "5."), r"messages\[1\] must be an object"),
    "unknown role": (
        turns({"role": "function", "content": "x"}, ANSWER),
        r"messages\[0\]: role 'function' is unknown; use one",
    ),
    "role is a list": (turns({"role": ["user"], "content": "x"}, ANSWER), r"messages\[0\]: role .* is unknown"),
    "no role": (turns({"content": "x"}, ANSWER), r"messages\[0\]: role None is unknown"),
    "no assistant": (turns(USER), "no assistant turn at its end"),
    "assistant not last": (turns(USER, ANSWER, USER), "no assistant turn at its end"),
    "thinking of a user": (
        turns(USER | {"thinking": "Hm."}, ANSWER),
        r"messages\[0\]: only an assistant .* a user turn",
    ),
    "reasoning of a system": (
        turns({"role": "system", "content": "x", "reasoning_content": "y"}, ANSWER),
        "only an assistant .* a system turn",
    ),
    "no content": (turns({"role": "user"}, ANSWER), r"messages\[0\] has no `content`"),
    "content null": (turns(USER, {"role": "assistant", "content": None}), r"messages\[1\]: `content` is null"),
    "content number": (turns(USER, {"role": "assistant", "content": 5}), "`content` must be text, not int"),
    "content parts": (turns({"role": "user", "content": [{"text": "x"}]}, ANSWER), "`content` must be text, not list"),
    "thinking number": (turns(USER, ANSWER | {"thinking": 5}), r"messages\[1\]: `thinking` must be text, not int"),
    "half a surrogate": (
        b'{"messages": [{"role": "user", "content": "\\ud83d"}]}',
        r"messages\[0\]: `content`: the text holds .* half a surrogate pair",
    ),
    "empty answer": (turns(USER, ANSWER | {"content": ""}), r"messages\[1\]: the assistant's `content` is empty"),
    "blank answer": (turns(USER, ANSWER | {"content": " \n"}), "`content` is empty"),
    "empty answer earlier": (turns(USER, ANSWER | {"content": ""}, USER, ANSWER), r"messages\[1\]: the assistant's"),
    "Latin-1": (turns(USER, ANSWER | {"content": "é"}).decode().encode("latin-1"), "not UTF-8 at byte"),
    "UTF-16": (turns(USER, ANSWER).decode().encode("utf-16"), "not UTF-8 at byte 0"),
}


@pytest.mark.parametrize(("data", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_line_is_named(write: Callable[[bytes], str], data: bytes, message: str) -> None:
    path = write(line(GOOD) + b"\n" + data)
    reader = read_conversations(path)
    assert str(next(reader).source) == f"{path}:1"
    with pytest.raises(DataError, match=message) as caught:
        list(reader)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\n", b" \r\n\n"])
def test_empty_file_is_named(write: Callable[[bytes], str], data: bytes) -> None:
    path = write(data)
    with pytest.raises(DataError, match="holds no conversation") as caught:
        list(read_conversations(path))
    assert str(caught.value).startswith(path)


def test_lines_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    """The file grows while it is read: a reader that took it whole would not see the second conversation."""
    path = tmp_path / "data.jsonl"
    with path.open("wb", buffering=0) as file:
        file.write(line(GOOD))
        reader = read_conversations(str(path))
        assert str(next(reader).source) == f"{path}:1"
        file.write(b"x" * 100_000 + b"\n")
        file.write(line(GOOD))
        with pytest.raises(DataError, match=":2: the line is not valid JSON"):
            next(reader)


def test_storage_uri(write: Callable[[bytes], str]) -> None:
    uri = f"file://{write(line(GOOD) * 3 + b'{')}"
    reader = read_conversations(uri)
    assert [str(next(reader).source) for _ in range(3)] == [f"{uri}:{number}" for number in (1, 2, 3)]
    with pytest.raises(DataError) as caught:
        next(reader)
    assert str(caught.value).startswith(f"{uri}:4: ")


def test_errors_in_place_of_records_are_raised_as_the_first(write: Callable[[bytes], str]) -> None:
    path = write(b"x\n" + line(GOOD) + b"y\n")
    found = list(scan_conversations(path))
    assert [isinstance(record, SourcedConversation) for record in found] == [False, True, False]
    assert [str(record).split(":")[1] for record in found if isinstance(record, DataError)] == ["1", "3"]
    with pytest.raises(DataError, match=":1: "):
        next(read_conversations(path))


# Columns and shapes

Read = Callable[..., Conversation]


@pytest.fixture
def read(write: Callable[[bytes], str]) -> Read:
    def one(record: dict[str, Any], **columns: str) -> Conversation:
        (found,) = read_conversations(write(line(record)), ColumnsConfig.model_validate(columns))
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
