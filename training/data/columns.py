"""A record's columns to a conversation: which of them hold the turns, and what stands beside them."""

from __future__ import annotations

import datetime
import json
import reprlib
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from cluster.harmony import Conversation, Effort, FunctionTool, Message, ResponseFormat
from training.data.places import DataError, Place
from training.data.turns import check_text, json_text, parse_turns, without_nulls
from training.sections import ColumnsConfig

TURNS = ("messages", "conversations")
QUESTION = ("question", "prompt", "problem", "instruction", "input")
REASONING = ("reasoning", "thinking", "cot", "rationale")
ANSWER = ("answer", "response", "output", "completion", "solution")
INSTRUCTIONS = ("instructions", "developer", "system", "system_prompt")
SETTINGS_OF_RECORD = ("reasoning_effort", "date", "response_format")
"""columns that go into the conversation under their own names"""


ModelT = TypeVar("ModelT", bound=BaseModel)


class ColumnError(ValueError):
    """What is wrong with a record, without its place."""


class Columns(NamedTuple):
    """Names of the columns that are read: `messages`, or `question` and `answer`."""

    messages: str | None = None
    question: str | None = None
    reasoning: str | None = None
    answer: str | None = None
    instructions: str | None = None
    tools: str | None = None


def parse_record(record: Any, place: Place, settings: ColumnsConfig) -> tuple[Conversation, dict[str, Any]]:
    """A record as a conversation, and its other fields. A column that is null counts as absent.

    Raises:
        DataError: the record has no conversation, more than one that could be meant, or a broken one.
    """
    if not isinstance(record, dict):
        found = "a JSON array" if isinstance(record, list) else reprlib.repr(record)
        raise DataError(place, f"each line must be a JSON object with a list `messages`; this is {found}")
    try:
        columns = _find(tuple(key for key, value in record.items() if value is not None), tuple(record), settings)
    except ColumnError as error:
        raise DataError(place, f"{error}") from None
    messages = _turns(record, columns, place)
    if messages[-1].role != "assistant":
        raise DataError(place, "the conversation has no assistant turn at its end: there is nothing to learn from it")
    conversation = Conversation(messages=messages, **_beside_turns(record, columns, place))
    used = {*columns, *SETTINGS_OF_RECORD}
    return conversation, {key: value for key, value in record.items() if key not in used}


@lru_cache(maxsize=256)
def _find(present: tuple[str, ...], columns: tuple[str, ...], settings: ColumnsConfig) -> Columns:
    """The columns to read. `present` are those of `columns` that hold something."""
    for setting, column in settings:
        if column is not None and column not in columns:
            raise ColumnError(
                f"the record has no column {column!r}, which data.columns.{setting} names; {_has(columns, present)}"
            )
        if setting in ("messages", "question", "answer") and column in columns and column not in present:
            raise ColumnError(f"`{column}` is null, and data.columns.{setting} names it")
    tools = settings.tools or ("tools" if "tools" in present else None)
    if not (settings.question or settings.answer or settings.reasoning):
        messages = settings.messages or _usual("messages", TURNS, present)
        if messages is not None:
            return Columns(messages=messages, instructions=settings.instructions, tools=tools)
    taken = {column for _, column in settings if column is not None}
    free = tuple(column for column in present if column not in taken)
    question = settings.question or _usual("question", QUESTION, free)
    answer = settings.answer or _usual("answer", ANSWER, free)
    if question is None or answer is None:
        raise ColumnError(
            f"each record must be a JSON object with a list `messages`, or with a question and an answer; "
            f"{_has(columns, present)}; name yours in data.columns"
        )
    reasoning = settings.reasoning or _usual("reasoning", REASONING, free)
    instructions = settings.instructions or _usual("instructions", INSTRUCTIONS, free)
    return Columns(None, question, reasoning, answer, instructions, tools)


def _usual(setting: str, names: tuple[str, ...], present: tuple[str, ...]) -> str | None:
    found = [name for name in names if name in present]
    if len(found) > 1:
        listed = " and ".join(f"`{name}`" for name in found)
        raise ColumnError(f"{listed} could each be the {setting}; set data.columns.{setting} to the one to read")
    return found[0] if found else None


def _has(columns: tuple[str, ...], present: tuple[str, ...]) -> str:
    if not columns:
        return "it has no columns"
    shown = [f"{reprlib.repr(column)}{'' if column in present else ' (null)'}" for column in columns[:10]]
    return f"it has {', '.join(shown)}{' …' if len(columns) > 10 else ''}"


def _turns(record: dict[str, Any], columns: Columns, place: Place) -> tuple[Message, ...]:
    messages: tuple[Message, ...] = ()
    if columns.instructions and (text := _text(record, columns.instructions, place)):
        messages = (Message(role="developer", content=text),)
    if columns.messages:
        return messages + parse_turns(record[columns.messages], columns.messages, place)
    question = _text(record, str(columns.question), place)
    answer = _text(record, str(columns.answer), place)
    thinking = _text(record, columns.reasoning, place) if columns.reasoning else None
    if not (question and question.strip()):
        raise DataError(place, f"the question `{columns.question}` is empty")
    if not (answer and answer.strip()):
        raise DataError(place, f"the answer `{columns.answer}` is empty")
    turns = (Message(role="user", content=question), Message(role="assistant", content=answer, thinking=thinking))
    return messages + turns


def _text(record: dict[str, Any], column: str, place: Place) -> str | None:
    value = record[column]
    return None if value is None else check_text(value, f"`{column}`", place)


def _beside_turns(record: dict[str, Any], columns: Columns, place: Place) -> dict[str, Any]:
    """Fields of the conversation that do not stand in turns, as far as the record has them."""
    found: dict[str, Any] = {}
    if columns.tools and record[columns.tools] is not None:
        found["tools"] = _tools(_from_json(record[columns.tools], columns.tools, place), columns.tools, place)
    effort = record.get("reasoning_effort")
    if effort is not None:
        if effort not in get_args(Effort):
            allowed = ", ".join(get_args(Effort))
            raise DataError(place, f"reasoning_effort {reprlib.repr(effort)} is unknown; use one of {allowed}")
        found["reasoning_effort"] = effort
    date = record.get("date")
    if date is not None:
        found["date"] = date.isoformat()[:10] if isinstance(date, datetime.date) else check_text(date, "`date`", place)
    response_format = record.get("response_format")
    if response_format is not None:
        found["response_format"] = _response_format(_from_json(response_format, "response_format", place), place)
    return found


def _from_json(value: Any, column: str, place: Place) -> Any:
    """Lists and objects are often kept as JSON text, in Parquet above all."""
    if not isinstance(value, str):
        return without_nulls(value) if place.unit == "row" else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(place, f"`{column}` is text that is not valid JSON") from None


def _tools(tools: Any, column: str, place: Place) -> tuple[FunctionTool, ...]:
    if not isinstance(tools, list):
        raise DataError(place, f"`{column}` must be a list of functions, not {type(tools).__name__}")
    return tuple(_tool(tool, f"{column}[{index}]", place) for index, tool in enumerate(tools))


def _tool(tool: Any, where: str, place: Place) -> FunctionTool:
    tool = _from_json(tool, where, place)
    if isinstance(tool, dict) and tool.get("type", "function") != "function" and "function" not in tool:
        raise DataError(place, f"{where}: type {reprlib.repr(tool['type'])} is unknown; only functions are tools here")
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise DataError(place, f"{where} must be an object with `name`, `description` and `parameters`")
    parameters = function.get("parameters")
    fields = {
        "name": function["name"],
        "description": function.get("description") or "",
        "parameters": None if parameters is None else _from_json(parameters, f"{where}.parameters", place),
    }
    return _validated(FunctionTool, fields, where, place)


def _response_format(value: Any, place: Place) -> ResponseFormat | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    schema = value.get("json_schema") if kind == "json_schema" else None
    if not isinstance(schema, dict):
        raise DataError(place, "response_format must be {type: json_schema, json_schema: {name, schema}}")
    fields = {
        "name": schema.get("name"),
        "description": schema.get("description") or "",
        "json_schema": _from_json(schema.get("schema"), "response_format.json_schema.schema", place),
    }
    return _validated(ResponseFormat, fields, "response_format", place)


def _validated(model: type[ModelT], fields: dict[str, Any], where: str, place: Place) -> ModelT:
    json_text(fields, where, place)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, value = ".".join(map(str, first["loc"])), reprlib.repr(first["input"])
        raise DataError(place, f"{where}: `{key}` is {value}; {first['msg'][:120]}") from None
