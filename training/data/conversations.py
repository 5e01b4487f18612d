"""Conversations from files, folders, storage URIs and the hub, streamed; what is broken says where and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from cluster.harmony import Conversation
from training.data.columns import parse_record
from training.data.places import DataError, Place
from training.data.records import read_records
from training.data.sources import Part, parts
from training.sections import ColumnsConfig

__all__ = [
    "DataError",
    "Part",
    "Place",
    "SourcedConversation",
    "parts",
    "read_conversations",
    "read_part",
    "scan_conversations",
    "scan_parts",
]


class SourcedConversation(NamedTuple):
    """A conversation, its place, and the fields of its record that are no part of it, such as `language`."""

    source: Place
    conversation: Conversation
    fields: dict[str, Any]


def read_conversations(path: str, columns: ColumnsConfig | None = None) -> Iterator[SourcedConversation]:
    """Conversations of a source, streamed. Blank lines are skipped.

    Args:
        path: a JSONL or Parquet file, a folder of them, a storage URI, or a hub data set's id; see `parts`.
        columns: names of the records' fields; those that are not named are found by themselves.

    Raises:
        DataError: a record cannot be read, is no conversation or does not end in an assistant turn; or the source
            does not exist, or holds no conversation.
    """
    for found in scan_conversations(path, columns):
        if isinstance(found, DataError):
            raise found
        yield found


def scan_conversations(path: str, columns: ColumnsConfig | None = None) -> Iterator[SourcedConversation | DataError]:
    """As `read_conversations`, but errors are yielded, and reading goes on with the next record where it can."""
    try:
        pieces = parts(path)
    except DataError as error:
        yield error
    else:
        yield from scan_parts(path, pieces, columns)


def scan_parts(
    path: str, pieces: Iterable[Part], columns: ColumnsConfig | None = None
) -> Iterator[SourcedConversation | DataError]:
    """As `scan_conversations`, over the `parts` of the source at `path`."""
    empty = True
    for part in pieces:
        for found in read_part(part, columns):
            empty = False
            yield found
    if empty:
        yield DataError(path, "the source holds no conversation; write one JSON object a line, with `messages`")


def read_part(part: Part, columns: ColumnsConfig | None = None) -> Iterator[SourcedConversation | DataError]:
    """Conversations of a part, and an error in place of each record that is broken.

    Reading goes on with the next record, or ends after the error where there is no way on, as in a file that is cut
    off. A part that holds no record yields nothing.
    """
    settings = columns or ColumnsConfig()
    for record in read_records(part):
        if isinstance(record, DataError):
            yield record
            continue
        try:
            conversation, fields = parse_record(record.value, record.place, settings)
        except DataError as error:
            found: SourcedConversation | DataError = error
        else:
            found = SourcedConversation(record.place, conversation, fields)
        yield found
