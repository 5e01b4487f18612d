"""Reading conversations: what a good file may look like, and the one sentence that each broken line gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
