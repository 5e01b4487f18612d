"""Conversations to documents: the tokens of one assistant turn with all that came before it, and who wrote each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from itertools import tee
from typing import NamedTuple

import numpy as np

from cluster.harmony import CHANNEL_LABELS, TRAINABLE, Codec, Conversation, Label
from cluster.languages import declared_language
from training.data.conversations import DataError, Place, SourcedConversation
from training.sections import DataConfig

LANGUAGE = "language:"
"""goes before a tag of the catalogue in the names of `Counts`"""


class Document(NamedTuple):
    """One training example, or a piece of a long one: `tokens` [T] int32 and `labels` [T] uint8."""

    tokens: np.ndarray
    labels: np.ndarray


class Counts(Counter[str]):
    """What went into documents: conversations, documents, tokens, `longest`, tokens of each trainable channel, those of
    them that are `<|return|>` or `<|call|>` (`final_stops`, `commentary_stops`), and assistant turns that were `split`
    or `dropped` for their length, or `unended`: their last token is not trainable, or not `<|return|>` or `<|call|>`.
    Conversations that ask to think in a language are also counted under `LANGUAGE` and its tag.
    """

    def add(self, other: Counter[str]) -> None:
        """Sum all but `longest`, which is the larger of both."""
        longest = max(self["longest"], other["longest"])
        self.update(other)
        self["longest"] = longest

    def trained(self, channels: Iterable[str]) -> int:
        """Tokens that carry loss when `channels` are trained."""
        return sum(self[channel] for channel in channels)


def languages_of(counts: Mapping[str, int]) -> dict[str, int]:
    """Conversations that ask to think in a language, by its tag, most frequent first."""
    found = {name.removeprefix(LANGUAGE): count for name, count in counts.items() if name.startswith(LANGUAGE)}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


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
    """See that something will be learned, and that where to stop is.

    A run that trains analysis alone leaves answers, and so their ends, to the base model.

    Raises:
        DataError: no token of the data is in a channel that `config` trains; or no end of an assistant turn is; or some
            turns have no end that could be.
    """
    channels = [channel for channel, weight in config.loss_weights.items() if weight]
    if not any(counts.get(channel, 0) for channel in channels):
        raise DataError(path, f"no token is trained by data.train_on = {config.train_on} with data.weights")
    if unended := counts.get("unended", 0):
        raise DataError(
            path,
            f"{unended} assistant turns do not end in <|return|> or <|call|> as the assistant's token, and would teach "
            "the model to go on for ever; prepare the data with the tokenizer.json of the base model",
        )
    if channels != ["analysis"] and not any(counts.get(f"{channel}_stops", 0) for channel in channels):
        raise DataError(
            path,
            f"no <|return|> or <|call|> is trained by data.train_on = {config.train_on}, so the model would not learn "
            'to stop; add "final" to data.train_on, or raise data.sequence_length if it cuts every turn before its end',
        )


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
        if tag := _language(item.conversation):
            counts[f"{LANGUAGE}{tag}"] += 1
        for tokens, labels in examples:
            whole = Document(np.array(tokens, np.int32), np.frombuffer(labels, np.uint8))
            yield from _fit(item.source, whole, codec.stop_tokens, config, counts)


def _or_raise(item: SourcedConversation | DataError) -> SourcedConversation:
    if isinstance(item, DataError):
        raise item
    return item


def _language(conversation: Conversation) -> str | None:
    """The tag of the language that a conversation last asks to think in."""
    wishes = (_wish(message.content) for message in conversation.messages if message.role in ("developer", "system"))
    return next((tag for tag in reversed(list(wishes)) if tag), None)


_wish = lru_cache(4096)(declared_language)


def _fit(
    source: Place, whole: Document, stop_tokens: tuple[int, ...], config: DataConfig, counts: Counts
) -> Iterator[Document]:
    (tokens, labels), longest = whole, config.sequence_length
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
    counts["unended"] += tokens[-1] not in stop_tokens or labels[-1] not in TRAINABLE
    for start in range(0, len(tokens), longest):
        piece = Document(tokens[start : start + longest], labels[start : start + longest])
        _count(piece, stop_tokens, counts)
        yield piece


def _count(document: Document, stop_tokens: tuple[int, ...], counts: Counts) -> None:
    """The first token of a document is never trained: nothing stands before it to tell it from."""
    tokens, labels = document.tokens[1:], document.labels[1:]
    by_label = np.bincount(labels, minlength=max(Label) + 1)
    stops = np.bincount(labels[np.isin(tokens, stop_tokens)], minlength=max(Label) + 1)
    counts["documents"] += 1
    counts["tokens"] += len(document.tokens)
    for channel, label in CHANNEL_LABELS.items():
        counts[channel] += int(by_label[label])
        counts[f"{channel}_stops"] += int(stops[label])
