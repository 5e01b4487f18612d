"""Conversations to rows that a trainer takes: token ids, and labels where the model is to learn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cluster.harmony import Codec, Label
from training.config import DataConfig
from training.data.conversations import DataError, SourcedConversation, read_conversations

IGNORED = -100
"""label of a token that carries no loss (torch's `cross_entropy` default `ignore_index`)"""


class Row(NamedTuple):
    """`input_ids` [T] and `labels` [T]; a label is the token itself, or `IGNORED`."""

    input_ids: list[int]
    labels: list[int]


class RowCount(NamedTuple):
    """What a data file amounts to."""

    conversations: int
    tokens: int
    trained_tokens: int
    longest: int


def read_rows(path: str, codec: Codec, config: DataConfig) -> Iterator[Row]:
    """Rows of a JSONL file.

    Raises:
        DataError: a line cannot be read, or a conversation is longer than `config.sequence_length`.
    """
    return render_rows(read_conversations(path), codec, config)


def render_rows(conversations: Iterable[SourcedConversation], codec: Codec, config: DataConfig) -> Iterator[Row]:
    """Rows of conversations; see `read_rows`."""
    trained = {Label[channel.upper()] for channel in config.train_on}
    for source, conversation in conversations:
        tokens, labels = codec.render(conversation)
        if len(tokens) > config.sequence_length:
            raise DataError(
                f"{source}: the conversation is {len(tokens)} tokens long, over data.sequence_length = "
                f"{config.sequence_length}; raise the setting or shorten the conversation"
            )
        targets = [token if label in trained else IGNORED for token, label in zip(tokens, labels, strict=True)]
        if all(target == IGNORED for target in targets):
            raise DataError(f"{source}: no token of the conversation is trained by data.train_on = {config.train_on}")
        yield Row(tokens, targets)


def count_rows(rows: Iterable[Row]) -> RowCount:
    """Totals over rows, streamed."""
    conversations = tokens = trained = longest = 0
    for row in rows:
        conversations += 1
        tokens += len(row.input_ids)
        trained += sum(label != IGNORED for label in row.labels)
        longest = max(longest, len(row.input_ids))
    return RowCount(conversations, tokens, trained, longest)
