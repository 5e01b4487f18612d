"""A conversation laid out for inspection: one turn of the assistant with its question, its languages and its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple

from cluster.harmony import Codec, Conversation, Example
from cluster.harmony.codec import assistant_turns
from cluster.languages import (
    INSTRUCTION,
    MEASURED,
    UNDETERMINED,
    declared_language,
    detect_language,
    detection_candidates,
    resolve,
)
from training.data.places import Place

LETTERS_TO_TELL = 20
"""below this many letters the language of a thinking is not held against its record"""
LETTERS_TO_BE_SURE = 200
"""from this many letters on, a language is told apart from all others of the catalogue"""
DETECTION_CHARACTERS = 1200
"""of a longer text, the language is told from its beginning and its end"""


class Turn(NamedTuple):
    """One turn of the assistant. Languages are BCP-47 tags; `declared` is None where nothing declares one."""

    question: str
    thinking: str
    answer: str
    steps: int
    declared: str | None
    question_language: str
    thinking_language: str
    answer_language: str
    example: Example


class Sample(NamedTuple):
    """A conversation with its turns, and where it stands.

    `wishes` are the languages asked for, as they are written, and the tag that each means (None: unknown).
    """

    place: Place | str
    conversation: Conversation
    fields: Mapping[str, Any]
    wishes: dict[str, str | None]
    turns: list[Turn]


def lay_out(
    place: Place | str, conversation: Conversation, fields: Mapping[str, Any], examples: list[Example]
) -> Sample:
    """A conversation as a sample; `examples` are its rendered turns, from `Codec.render_all`."""
    wishes: dict[str, str | None] = {}
    field = fields.get("reasoning_language")
    if isinstance(field, str) and field.strip():
        wishes[field] = language_tag(field)
    of_user = _field_tag(fields, "language")
    turns = []
    for (question, asked, span), example in zip(_questions(conversation), examples, strict=True):
        wish, tag = asked or ("", None)
        if wish:
            wishes.setdefault(wish, tag)
        messages = conversation.messages[span.start : span.stop]
        thinking = "\n".join(message.thinking for message in messages if message.thinking)
        answer = messages[-1].content if messages[-1].ends_turn else ""
        declared = wishes.get(field, tag) if isinstance(field, str) else tag
        asked_in = tell_language(question, of_user)
        turns.append(
            Turn(
                question=question,
                thinking=thinking,
                answer=answer,
                steps=sum(bool(message.thinking) for message in messages),
                declared=declared,
                question_language=asked_in,
                thinking_language=tell_language(thinking, declared),
                answer_language=tell_language(answer, asked_in if asked_in != UNDETERMINED else None),
                example=example,
            )
        )
    return Sample(place, conversation, fields, wishes, turns)


def _field_tag(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    return language_tag(value) if isinstance(value, str) else None


def _questions(conversation: Conversation) -> Iterator[tuple[str, tuple[str, str | None] | None, range]]:
    """Of each assistant turn the user's words before it, the language last asked for, and where it stands."""
    question, start = "", 0
    asked: tuple[str, str | None] | None = None
    for span in assistant_turns(conversation.messages):
        for message in conversation.messages[start : span.start]:
            if message.role == "user":
                question = message.content
            elif message.role in ("developer", "system"):
                asked = asked_language(message.content) or asked
        yield question, asked, span
        start = span.stop


def asked_language(text: str) -> tuple[str, str | None] | None:
    """The language an instruction asks to think in: how it is written there, and its tag (None: unknown)."""
    instruction = INSTRUCTION.search(text)
    return (instruction[1].strip(), declared_language(text)) if instruction else None


@lru_cache(4096)
def language_tag(wish: str) -> str | None:
    """The tag that a name or tag of a language means, or None when the catalogue has none."""
    language = resolve(wish)
    return language.tag if language else None


def tell_language(text: str, wanted: str | None = None) -> str:
    """The language of a text, or `und` when it has too few letters to tell.

    `wanted` is the language that is expected. A short text is taken for another only if it is not even the nearest
    among few: a sentence of Spanish often looks like Catalan.
    """
    if len(text) > DETECTION_CHARACTERS:
        half = DETECTION_CHARACTERS // 2
        text = f"{text[:half]} {text[-half:]}"
    letters = count_letters(text)
    if letters < LETTERS_TO_TELL:
        return UNDETERMINED
    if wanted and letters < LETTERS_TO_BE_SURE:
        return detect_language(text, _few(wanted))
    return detect_language(text, detection_candidates(wanted))


@cache
def _few(wanted: str) -> frozenset[str]:
    return frozenset((*MEASURED, wanted))


def count_letters(text: str) -> int:
    """Letters of a text; ideographs, kana and Hangul count double, as in `detect_language`."""
    letters = list(filter(str.isalpha, text))
    return len(letters) + (0 if text.isascii() else sum(map("\u2e80".__le__, letters)))


def thinking_overhead(codec: Codec) -> int:
    """Tokens around the text of one analysis message as the model writes it: channel, name, message and end."""
    return 3 + len(codec.encode("analysis"))
