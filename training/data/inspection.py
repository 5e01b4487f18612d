"""The rules that each conversation is held against, one function for each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from cluster.harmony import Message
from cluster.languages import CATALOGUE, INSTRUCTION, UNDETERMINED, matches
from training.data import findings
from training.data.findings import Finding
from training.data.samples import Sample, Turn, count_letters

EXCERPT_CHARACTERS = 160
LETTERS_TO_COMPARE = 30
"""below this many letters, question and answer are not compared by language: a guess against a guess"""
CONTROL_LIKE = re.compile(r"<\|[a-z0-9_]{1,32}\|>")


@dataclass(frozen=True)
class Rules:
    """What the rules need to know beside the sample."""

    sequence_length: int
    minimum_thinking: int
    control_tokens: frozenset[str]


def inspect(sample: Sample, rules: Rules) -> Iterator[Finding]:
    """Everything found in one conversation, duplicates apart."""
    for rule in _RULES:
        yield from rule(sample)
    for rule_with_settings in _RULES_WITH_SETTINGS:
        yield from rule_with_settings(sample, rules)


def excerpt(text: str, limit: int = EXCERPT_CHARACTERS) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text[: limit * 4].split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def name(tag: str) -> str:
    """A language's English name."""
    return CATALOGUE[tag].name if tag in CATALOGUE else tag


def _order_of_roles(sample: Sample) -> Iterator[Finding]:
    place, before = str(sample.place), [None, *sample.conversation.messages]
    asked = called = False
    for index, message in enumerate(sample.conversation.messages):
        previous = before[index]
        if message.role == "assistant" and not asked:
            text = f"messages[{index}] is an assistant turn with no user turn before it; begin with what the user asked"
            yield Finding(findings.NO_QUESTION, place, text)
            asked = True
        if message.role == "tool" and not called:
            text = (
                f"messages[{index}] is the result of {message.tool}, but no turn before it calls a tool; add the call"
            )
            yield Finding(findings.TOOL_WITHOUT_CALL, place, text)
        if previous is not None and _repeats(previous, message):
            text = f"messages[{index - 1}] and messages[{index}] are both {message.role} turns; join them into one"
            yield Finding(findings.REPEATED_ROLE, place, text)
        asked = asked or message.role == "user"
        called = called or message.tool_call is not None


def _repeats(previous: Message, message: Message) -> bool:
    if previous.role != message.role:
        return False
    return message.role == "user" or (message.role == "assistant" and previous.ends_turn)


def _control_tokens(sample: Sample, rules: Rules) -> Iterator[Finding]:
    for index, message in enumerate(sample.conversation.messages):
        call = message.tool_call.arguments if message.tool_call else ""
        for field, text in (("content", message.content), ("thinking", message.thinking or ""), ("tool call", call)):
            if "<|" not in text:
                continue
            typed = sorted({found for found in CONTROL_LIKE.findall(text) if found in rules.control_tokens})
            if typed:
                sentence = (
                    f"messages[{index}] has {', '.join(typed)} typed in its {field}, which is trained as plain text; "
                    "give the text without the template"
                )
                yield Finding(findings.CONTROL_TOKEN, str(sample.place), sentence, excerpt(text))


def _declarations(sample: Sample) -> Iterator[Finding]:
    for wish, tag in sample.wishes.items():
        if tag is None:
            text = f"the declared reasoning language {excerpt(wish, 40)!r} is unknown; name a language or its tag"
            yield Finding(findings.UNKNOWN_LANGUAGE, str(sample.place), text)
    field = sample.fields.get("reasoning_language")
    declared = sample.wishes.get(field) if isinstance(field, str) else None
    others = {tag for wish, tag in sample.wishes.items() if wish != field and tag}
    if declared and others - {declared}:
        asked = " and ".join(sorted(name(tag) for tag in others))
        text = f"the field `reasoning_language` says {name(declared)}, the instruction asks for {asked}; correct one"
        yield Finding(findings.DECLARATIONS_DIFFER, str(sample.place), text)


def _language_of_thinking(sample: Sample) -> Iterator[Finding]:
    for number, turn in enumerate(sample.turns):
        found = turn.thinking_language
        if turn.declared and found != UNDETERMINED and not matches(found, turn.declared):
            where = f" of assistant turn {number}" if len(sample.turns) > 1 else ""
            text = (
                f"the thinking{where} reads as {name(found)}, though {name(turn.declared)} is declared; "
                "correct one of them"
            )
            yield Finding(findings.WRONG_LANGUAGE, str(sample.place), text, excerpt(turn.thinking))


def _length(sample: Sample, rules: Rules) -> Iterator[Finding]:
    longest = max((len(turn.example.tokens) for turn in sample.turns), default=0)
    if longest > rules.sequence_length:
        text = (
            f"{longest} tokens are more than the sequence length of {rules.sequence_length}; raise it or cut the text"
        )
        yield Finding(findings.TOO_LONG, str(sample.place), text)


def _thinking(sample: Sample, rules: Rules) -> Iterator[Finding]:
    place = str(sample.place)
    if sample.turns and not sample.turns[-1].thinking.strip():
        text = "the last assistant turn has no `thinking`; add it, or the model learns to answer without"
        yield Finding(findings.MISSING_THINKING, place, text)
    for turn in sample.turns:
        if not turn.thinking.strip():
            continue
        letters = count_letters(turn.thinking)
        if letters < rules.minimum_thinking:
            text = f"the thinking has {letters} letters, fewer than {rules.minimum_thinking}; is it a placeholder?"
            yield Finding(findings.SHORT_THINKING, place, text, excerpt(turn.thinking))


def _answers(sample: Sample) -> Iterator[Finding]:
    place = str(sample.place)
    for index, message in enumerate(sample.conversation.messages):
        if message.ends_turn and not message.content.strip():
            text = f"messages[{index}] has an empty `content`; add the answer, or drop the record"
            yield Finding(findings.EMPTY_ANSWER, place, text)
    for turn in sample.turns:
        if turn.answer.strip() and _same(turn.answer, turn.thinking):
            text = "the answer repeats the thinking word for word; separate the reasoning from the answer"
            yield Finding(findings.ANSWER_IS_THINKING, place, text, excerpt(turn.answer))


def _same(one: str, other: str) -> bool:
    return one.casefold().split() == other.casefold().split()


def _language_of_answer(sample: Sample) -> Iterator[Finding]:
    for turn in sample.turns:
        asked, answered = turn.question_language, turn.answer_language
        if UNDETERMINED in (asked, answered) or asked == answered or _is_declared(sample, answered):
            continue
        letters = min(count_letters(turn.question), count_letters(turn.answer))
        if letters < LETTERS_TO_COMPARE or _names_a_language(sample, turn):
            continue
        text = f"the question reads as {name(asked)}, the answer as {name(answered)}, and nothing asks for the change"
        yield Finding(findings.ANSWER_LANGUAGE, str(sample.place), text, excerpt(turn.answer))


def _language_beside_answer(sample: Sample) -> Iterator[Finding]:
    """A declared reasoning language may differ from the answer's: that is what it is for."""
    for turn in sample.turns:
        thought, answered = turn.thinking_language, turn.answer_language
        if turn.declared or UNDETERMINED in (thought, answered) or thought == answered:
            continue
        letters = min(count_letters(turn.thinking), count_letters(turn.answer))
        if letters < LETTERS_TO_COMPARE or _names_a_language(sample, turn):
            continue
        text = f"the thinking reads as {name(thought)}, the answer as {name(answered)}, and no language is declared"
        yield Finding(findings.THINKING_LANGUAGE, str(sample.place), text, excerpt(turn.thinking))


def _is_declared(sample: Sample, answered: str) -> bool:
    return sample.fields.get("language") == answered


def _names_a_language(sample: Sample, turn: Turn) -> bool:
    """Whether the question or an instruction names a language: it may ask to answer in that, or to translate."""
    instructions = [
        INSTRUCTION.sub("", message.content)
        for message in sample.conversation.messages
        if message.role in ("developer", "system")
    ]
    return any(_names_of_languages().search(text.casefold()) for text in [turn.question, *instructions])


@cache
def _names_of_languages() -> re.Pattern[str]:
    names = {text for language in CATALOGUE.values() for text in (language.name, language.autonym)}
    return re.compile("|".join(re.escape(text.casefold()) for text in sorted(names) if len(text) > 1))


_RULES: tuple[Callable[[Sample], Iterator[Finding]], ...] = (
    _order_of_roles,
    _declarations,
    _language_of_thinking,
    _answers,
    _language_of_answer,
    _language_beside_answer,
)
_RULES_WITH_SETTINGS: tuple[Callable[[Sample, Rules], Iterator[Finding]], ...] = (_control_tokens, _length, _thinking)
