"""Reads conversations from JSONL: one object a line, with `messages` of system, developer, user and assistant turns."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, get_args

import pyarrow.fs
from pydantic import ValidationError

from cluster.harmony import Conversation, Message, Role


class DataError(ValueError):
    """A line the user can mend; the message is one sentence that names file, line and what is wrong."""


class SourcedConversation(NamedTuple):
    """A conversation and where it stands, as `file:line`."""

    source: str
    conversation: Conversation


def read_conversations(path: str) -> Iterator[SourcedConversation]:
    """Conversations of a JSONL file, streamed; `path` is local or a storage URI. Blank lines are skipped.

    An assistant turn's thinking is read from `thinking`, or from `reasoning_content`. Other fields of a record are
    left alone: a data set may carry what it likes beside `messages`.

    Raises:
        DataError: a line is no JSON object, has no or unknown turns, or does not end in an assistant turn; or the
            file holds no conversation.
    """
    count = 0
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                count += 1
                source = f"{path}:{number}"
                yield SourcedConversation(source, parse_record(_decode(line, source), source))
    if count == 0:
        raise DataError(f"{path}: the file holds no conversation; write one JSON object a line, with `messages`")


def parse_record(record: Any, source: str) -> Conversation:
    """A decoded JSON object as a conversation; `source` is named in errors.

    Raises:
        DataError: as `read_conversations`.
    """
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise DataError(f"{source}: each line must be a JSON object with a list `messages`")
    if not record["messages"]:
        raise DataError(f"{source}: the conversation is empty: `messages` needs a user and an assistant turn")
    messages = tuple(
        _parse_message(turn, f"{source}: messages[{index}]") for index, turn in enumerate(record["messages"])
    )
    if messages[-1].role != "assistant":
        raise DataError(
            f"{source}: the conversation has no assistant turn at its end: there is nothing to learn from it"
        )
    return Conversation(messages=messages)


def _parse_message(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{place} must be an object with `role` and `content`")
    roles = get_args(Role)
    if turn.get("role") not in roles:
        raise DataError(f"{place}: role {turn.get('role')!r} is unknown; use one of {', '.join(roles)}")
    fields = {"role": turn["role"], "content": turn.get("content"), "thinking": turn.get("thinking")}
    if fields["thinking"] is None:
        fields["thinking"] = turn.get("reasoning_content")
    if fields["thinking"] is not None and turn["role"] != "assistant":
        raise DataError(f"{place}: only an assistant turn has `thinking`, not a {turn['role']} turn")
    try:
        message = Message.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(f"{place}: `{first['loc'][0]}` must be text, not {type(first['input']).__name__}") from None
    try:
        f"{message.content}{message.thinking}".encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(f"{place}: the text holds {half!r}, half a surrogate pair, which is no character") from None
    if message.role == "assistant" and not message.content.strip():
        raise DataError(f"{place}: the assistant's `content` is empty")
    return message


def _decode(line: bytes, source: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: the line is not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{source}: the line is not valid JSON ({reason})") from None


@contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    if "://" not in path:
        with Path(path).open("rb") as stream:
            yield stream
        return
    filesystem, inner = pyarrow.fs.FileSystem.from_uri(path)
    with io.BufferedReader(filesystem.open_input_file(inner)) as stream:
        yield stream
