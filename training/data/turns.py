"""Turns as data sets write them to Harmony's messages: role and content, from and value, OpenAI's tool calls."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

from pydantic import ValidationError

from cluster.harmony import Message, Role, ToolCall
from training.data.places import DataError, Place

THINKING = ("thinking", "reasoning_content", "reasoning")
SPEAKERS: dict[str, str] = {
    **{speaker: speaker for speaker in get_args(Role)},
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
}
"""`from` in ShareGPT's shape to roles; a function_call's value is JSON with name and arguments"""
FUNCTIONS = "functions."


class _Call(NamedTuple):
    id: str | None
    call: ToolCall


def parse_turns(turns: Any, column: str, place: Place) -> tuple[Message, ...]:
    """The list of turns in a record's `column` as messages.

    Several calls in one assistant message become a message each, followed by the call's own result: gpt-oss makes one
    call at a time.

    Raises:
        DataError: a turn is broken, a result answers no call, or a call has no result.
    """
    if not isinstance(turns, list):
        raise DataError(place, f"each record must be a JSON object with a list `{column}`, not {_kind(turns)}")
    if not turns:
        raise DataError(place, f"the conversation is empty: `{column}` needs a user and an assistant turn")
    messages: list[Message] = []
    pending = _Pending(place)
    for index, turn in enumerate(turns):
        where = f"{column}[{index}]"
        turn = _role_and_content(turn, where, place)
        if turn["role"] == "tool":
            pending.answer(turn, where)
            continue
        messages += pending.close(where)
        message, calls = _message(turn, where, place)
        if calls:
            pending.open(message, calls, where)
        else:
            messages.append(message)
    return (*messages, *pending.close(None))


def check_text(value: Any, name: str, place: Place) -> str:
    """`value`, if it is text that can be written as UTF-8; `name` is what a sentence calls it.

    Raises:
        DataError: it is not.
    """
    if value is None:
        raise DataError(place, f"{name} is null")
    if not isinstance(value, str):
        raise DataError(place, f"{name} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise DataError(
            place, f"{name}: the text holds {half!r}, half a surrogate pair, which is no character"
        ) from None
    return value


def json_text(value: Any, name: str, place: Place) -> str:
    """`value` as compact JSON.

    Raises:
        DataError: JSON has no such value, as NaN, a date or half a surrogate pair.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(place, f"{name} cannot be written as JSON ({error})") from None
    return check_text(text, name, place)


def without_nulls(value: Any) -> Any:
    """Objects without null fields: a table keeps a column for every key that any record uses, null in the others."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


class _Pending:
    """An assistant message's calls, until their results are there."""

    message: Message
    where: str

    def __init__(self, place: Place) -> None:
        self.place = place
        self.calls: list[_Call] = []
        self.results: list[str | None] = []

    def open(self, message: Message, calls: list[_Call], where: str) -> None:
        self.message, self.calls, self.where = message, calls, where
        self.results = [None] * len(calls)

    def answer(self, turn: dict[str, Any], where: str) -> None:
        """Take a tool turn as the result of the call that it names by id, else by name, else of the only one left."""
        content = _text(turn, "content", where, self.place)
        left = [index for index, _ in enumerate(self.calls) if self.results[index] is None]
        key, name = turn.get("tool_call_id"), turn.get("tool") or turn.get("name")
        for field, value in (("tool_call_id", key), ("name", name)):
            if value is not None:
                check_text(value, f"{where}: `{field}`", self.place)
        if key is not None and (name is None or any(call.id is not None for call in self.calls)):
            named = f"tool_call_id {reprlib.repr(key)}"
            matching = [index for index in left if self.calls[index].id == key]
        elif name is not None:
            named = f"name {reprlib.repr(name)}"
            recipients = (name, f"{FUNCTIONS}{name}")
            matching = [index for index in left if self.calls[index].call.recipient in recipients]
        else:
            named, matching = "neither tool_call_id nor name", left if len(left) == 1 else []
        if not matching:
            raise DataError(
                self.place,
                f"{where}: the result answers no call: it has {named}; put it after the assistant's turn that made the "
                "call in `tool_calls`, with that call's id",
            )
        self.results[matching[0]] = content

    def close(self, following: str | None) -> Iterator[Message]:
        """A message for each call, followed by its result; the last call of a conversation may have none."""
        if not self.calls:
            return
        for index, (call, result) in enumerate(zip(self.calls, self.results, strict=True)):
            first = {} if index else {"content": self.message.content, "thinking": self.message.thinking}
            yield Message(role="assistant", tool_call=call.call, **first)  # type: ignore[arg-type]
            if result is not None:
                yield Message(role="tool", tool=call.call.recipient, content=result)
            elif following or len(self.calls) > 1:
                before = f" before {following}" if following else ", and only a single call may end a conversation"
                called = f"the call of {call.call.recipient}"
                raise DataError(self.place, f"{self.where}: {called} has no result{before}; add the tool turn")
        self.calls = []


def _role_and_content(turn: Any, where: str, place: Place) -> dict[str, Any]:
    """A turn in the shape with role and content; its role is known."""
    if not isinstance(turn, dict):
        raise DataError(place, f"{where} must be an object with `role` and `content`")
    role = turn.get("role")
    if role is None and turn.get("from") is not None:
        return _from_and_value(turn, where, place)
    roles = get_args(Role)
    if role not in roles:
        raise DataError(place, f"{where}: role {reprlib.repr(role)} is unknown; use one of {', '.join(roles)}")
    return turn


def _from_and_value(turn: dict[str, Any], where: str, place: Place) -> dict[str, Any]:
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        known = ", ".join(SPEAKERS)
        raise DataError(place, f"{where}: from {reprlib.repr(speaker)} is unknown; use one of {known}")
    value = _text(turn, "value", where, place)
    if speaker != "function_call":
        return {**turn, "role": SPEAKERS[speaker], "content": value}
    try:
        calls = json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(place, f"{where}: `value` of a function_call must be JSON with name and arguments") from None
    return {**turn, "role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}


def _message(turn: dict[str, Any], where: str, place: Place) -> tuple[Message, list[_Call]]:
    """A turn that is no tool's as a message, and the calls that it makes."""
    role = turn["role"]
    thinking = next((name for name in THINKING if turn.get(name) is not None), None)
    calls = _calls(turn, where, place)
    if role != "assistant":
        if thinking and turn[thinking] != "":
            raise DataError(place, f"{where}: only an assistant turn has `{thinking}`, not a {role} turn")
        if calls:
            raise DataError(place, f"{where}: only an assistant turn has tool calls, not a {role} turn")
        return Message(role=role, content=_text(turn, "content", where, place)), []
    # Beside calls there need not be content; OpenAI's API writes null there.
    content = "" if calls and turn.get("content") is None else _text(turn, "content", where, place)
    if not content.strip():
        if not calls:
            raise DataError(place, f"{where}: the assistant's `content` is empty")
        content = ""
    text = _text(turn, thinking, where, place) if thinking else None
    return Message(role="assistant", content=content, thinking=text), calls


def _text(turn: dict[str, Any], field: str, where: str, place: Place) -> str:
    if field not in turn:
        raise DataError(place, f"{where} has no `{field}`")
    return check_text(turn[field], f"{where}: `{field}`", place)


def _calls(turn: dict[str, Any], where: str, place: Place) -> list[_Call]:
    """Calls in OpenAI's shape, or the one call in the shape of `Message`."""
    call, calls = turn.get("tool_call"), turn.get("tool_calls")
    if call is not None:
        if not isinstance(call, dict):
            raise DataError(place, f"{where}: `tool_call` must be an object with `recipient` and `arguments`")
        arguments = _text(call, "arguments", f"{where}.tool_call", place)
        return [_Call(None, _tool_call(call.get("recipient"), arguments, f"{where}.tool_call", place))]
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise DataError(place, f"{where}: `tool_calls` must be a list, not {_kind(calls)}")
    return [_openai_call(call, f"{where}.tool_calls[{index}]", place) for index, call in enumerate(calls)]


def _openai_call(call: Any, where: str, place: Place) -> _Call:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(place, f"{where} must be an object with a `function` of `name` and `arguments`")
    arguments = _arguments(function.get("arguments"), f"{where}: `arguments`", place)
    recipient = FUNCTIONS + function["name"].removeprefix(FUNCTIONS)
    key = call.get("id")
    if key is not None:
        check_text(key, f"{where}: `id`", place)
    return _Call(key, _tool_call(recipient, arguments, where, place))


def _arguments(value: Any, name: str, place: Place) -> str:
    """Arguments as compact JSON, whether they come as an object or as JSON text; `{}` where there are none."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(place, f"{name} is text that is not valid JSON") from None
    elif place.unit == "row":
        value = without_nulls(value)
    if value is None or value == "" or (isinstance(value, str) and not value.strip()):
        value = {}
    if not isinstance(value, dict):
        raise DataError(place, f"{name} must be a JSON object, not {_kind(value)}")
    return json_text(value, name, place)


def _tool_call(recipient: Any, arguments: str, where: str, place: Place) -> ToolCall:
    try:
        return ToolCall(recipient=recipient, arguments=arguments)
    except ValidationError:
        shown = reprlib.repr(recipient)
        raise DataError(place, f"{where}: {shown} is no tool's name: letters, digits, _, - and . are allowed") from None


def _kind(value: Any) -> str:
    return {str: "text", type(None): "null", list: "a list", dict: "an object"}.get(type(value), type(value).__name__)
