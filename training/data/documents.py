"""Conversations to documents: the tokens of one assistant turn with all that came before it, and who wrote each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import tee
from typing import NamedTuple

import numpy as np

from cluster.harmony import CHANNEL_LABELS, Codec, Label
from training.config import DataConfig
from training.data.conversations import DataError, Place, SourcedConversation


class Document(NamedTuple):
    """One training example, or a piece of a long one: `tokens` [T] int32 and `labels` [T] uint8."""

    tokens: np.ndarray
    labels: np.ndarray


class Counts(Counter[str]):
    """What went into documents: conversations, documents, tokens, `longest`, tokens of each trainable channel, and
    documents that were `split` or `dropped` for their length.
    """

    def add(self, other: Counter[str]) -> None:
        """Sum all but `longest`, which is the larger of both."""
        longest = max(self["longest"], other["longest"])
        self.update(other)
        self["longest"] = longest

    def trained(self, channels: Iterable[str]) -> int:
        """Tokens that carry loss when `channels` are trained."""
        return sum(self[channel] for channel in channels)


def require_documents(path: str, counts: Mapping[str, int]) -> None:
    """See that the data holds something.

    Raises:
        DataError: no conversation was read, or all were dropped for their length.
    """
    if dropped := counts.get("dropped", 0):
        reason = f"all {dropped} conversations are longer than data.sequence_length and were dropped; raise the setting"
    else:
        reason = "the source holds no conversation; write one JSON object a line, with `messages`"
    if not counts.get("documents", 0):
        raise DataError(path, reason)


def require_trained_tokens(path: str, counts: Mapping[str, int], config: DataConfig) -> None:
    """See that something will be learned.

    Raises:
        DataError: no token of the data is in a channel that `config` trains.
    """
    if not any(counts.get(channel, 0) for channel, weight in config.loss_weights.items() if weight):
        raise DataError(path, f"no token is trained by data.train_on = {config.train_on} with data.weights")


def read_documents(
    found: Iterable[SourcedConversation | DataError], codec: Codec, config: DataConfig, counts: Counts
) -> Iterator[Document]:
    """Documents of conversations, streamed; one for each assistant turn.

    Args:
        found: as `read_part` yields it.
        codec: of the model that will be trained.
        config: says how long a document may be and what becomes of longer ones.
        counts: is added to as documents are made.

    Raises:
        DataError: the first error in `found`; or a document is longer than `config.sequence_length` and
            `config.long_documents` is "error".
    """
    items, rendered = tee(map(_or_raise, found))
    for item, examples in zip(items, codec.render_all(item.conversation for item in rendered), strict=True):
        counts["conversations"] += 1
        for tokens, labels in examples:
            yield from _fit(item.source, np.array(tokens, np.int32), np.frombuffer(labels, np.uint8), config, counts)


def _or_raise(item: SourcedConversation | DataError) -> SourcedConversation:
    if isinstance(item, DataError):
        raise item
    return item


def _fit(
    source: Place, tokens: np.ndarray, labels: np.ndarray, config: DataConfig, counts: Counts
) -> Iterator[Document]:
    longest = config.sequence_length
    counts["longest"] = max(counts["longest"], len(tokens))
    if len(tokens) > longest:
        if config.long_documents == "error":
            raise DataError(
                source,
                f"the conversation is {len(tokens)} tokens long, over data.sequence_length = {longest}; raise the "
                'setting, shorten the conversation, or set data.long_documents to "split" or "drop"',
            )
        counts["split" if config.long_documents == "split" else "dropped"] += 1
        if config.long_documents == "drop":
            return
    for start in range(0, len(tokens), longest):
        piece = Document(tokens[start : start + longest], labels[start : start + longest])
        _count(piece, counts)
        yield piece


def _count(document: Document, counts: Counts) -> None:
    """The first token of a document is never trained: nothing stands before it to tell it from."""
    by_label = np.bincount(document.labels[1:], minlength=max(Label) + 1)
    counts["documents"] += 1
    counts["tokens"] += len(document.tokens)
    for channel, label in CHANNEL_LABELS.items():
        counts[channel] += int(by_label[label])
