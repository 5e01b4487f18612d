"""Answers of several targets side by side, their channels in colour, and what is in another language marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from cluster.languages import CATALOGUE, MEASURED, UNDETERMINED, matches
from cluster.languages.sentences import Adherence, sentence_languages
from serving.evaluation.charts import colour
from serving.evaluation.figures import group_of
from serving.evaluation.scoring import Scored
from serving.evaluation.suites import language_name

PER_LANGUAGE = 2
MOST = 60
SHOWN_CHARACTERS = 1500
_CHANNELS = (
    ("analysis", "thinking"),
    ("commentary", "commentary"),
    ("final", "answer"),
    ("unparsed", "outside any channel"),
)


def examples(scored: Mapping[str, Sequence[Scored]]) -> str:
    """The questions of each language on which the targets differ most, or the first."""
    sides = {name: {one.asking.key: one for one in ones} for name, ones in scored.items()}
    first = next(iter(scored.values()), ())
    shared = [one for one in first if all(one.asking.key in side for side in sides.values())]
    taken: dict[str, list[Scored]] = {}
    for one in sorted(shared, key=lambda one: -_telling([side[one.asking.key] for side in sides.values()])):
        chosen = taken.setdefault(group_of(one), [])
        tasks = {each.item.task for each in chosen}
        if len(chosen) < PER_LANGUAGE and one.item.task not in (tasks if one.item.task else ()):
            chosen.append(one)
    order = dict.fromkeys(group_of(one) for one in first)
    kept = [one for tag in order for one in taken.get(tag, ())][:MOST]
    return "".join(_example(one, {name: side[one.asking.key] for name, side in sides.items()}) for one in kept)


def _telling(ones: Sequence[Scored]) -> int:
    """How much an example tells: a change of right or wrong more than one of language, and that more than a fault."""
    marks, verdicts = {one.marked.mark for one in ones}, {one.thinking.verdict for one in ones}
    mixed = any(one.thinking.switches for one in ones)
    return 4 * (len(marks) > 1) + 2 * (len(verdicts) > 1) + any(not one.answer.valid for one in ones) + mixed


def _example(one: Scored, sides: Mapping[str, Scored]) -> str:
    item = one.item
    asked = f"thinking asked in {language_name(item.reasoning_language)}" if item.reasoning_language else "no wish"
    accepted = f", accepted: {', '.join(item.answer)}" if item.answer else ""
    panes = "".join(_side(place, name, side) for place, (name, side) in enumerate(sides.items()))
    return (
        f'<div class="example"><p class="quiet">{escape(item.id)}: {escape(asked + accepted)}</p>'
        f'<p class="question" {_direction(item.language)}>{escape(_cut(item.question))}</p>'
        f'<div class="sides">{panes}</div></div>'
    )


def _side(place: int, name: str, one: Scored) -> str:
    answer = one.answer
    badges = [
        _language_badge("thinks in", "thinking", one.thinking),
        _language_badge("answers in", "answer", one.language),
        _mark_badge(one),
        _badge(answer.outcome.replace("_", " "), "good" if answer.valid else "bad"),
    ]
    texts = (answer.thinking, answer.commentary, answer.answer, answer.unparsed)
    found = (one.thinking, None, one.language, None)
    panes = "".join(
        f'<div class="channel {kind}"><b>{title}</b>{_text(text, adherence)}</div>'
        for (kind, title), text, adherence in zip(_CHANNELS, texts, found, strict=True)
        if text
    )
    heading = f'<h4 style="color: var(--{colour(place)})">{escape(name)}</h4>'
    return f'<div class="side">{heading}{"".join(badges)}{panes}</div>'


def _text(text: str, found: Adherence | None) -> str:
    shown = _cut(text)
    if found is None:
        return f'<div class="text" dir="auto">{escape(shown)}</div>'
    return f'<div class="text" {_direction(found.detected)}>{_with_marks(shown, found)}</div>'


def _with_marks(text: str, found: Adherence) -> str:
    """The text, with sentences in another language than the one asked for marked."""
    wanted = found.requested or found.detected
    among = frozenset(MEASURED) | ({wanted, found.detected} & CATALOGUE.keys())
    parts, place = [], 0
    for sentence, tag in sentence_languages(text, among):
        start = text.find(sentence, place)
        parts.append(escape(text[place:start]))
        foreign = tag != UNDETERMINED and not matches(tag, wanted)
        told = f'<mark title="{escape(language_name(tag))}">{escape(sentence)}</mark>'
        parts.append(told if foreign else escape(sentence))
        place = start + len(sentence)
    return "".join(parts) + escape(text[place:])


def _language_badge(what: str, text: str, found: Adherence) -> str:
    kind = {"followed": "good", "not_followed": "bad"}.get(found.verdict, "")
    switched = f", {found.switches} switch{'es' if found.switches > 1 else ''}" if found.switches else ""
    if found.detected == UNDETERMINED:
        return _badge(f"{text} undetermined", kind)
    return _badge(f"{what} {language_name(found.detected)}{switched}", kind)


def _mark_badge(one: Scored) -> str:
    marked = one.marked
    if marked.mark == "unmarked":
        return ""
    if marked.mark == "scorer_error":
        return _badge(f"scorer raised {marked.reason}", "bad")
    return _badge(
        "right" if marked.mark == "right" else f"wrong: {marked.reason}", "good" if marked.mark == "right" else "bad"
    )


def _badge(text: str, kind: str) -> str:
    return f'<span class="badge {kind}">{escape(text)}</span>'


def _direction(tag: str) -> str:
    return f'lang="{tag}" dir="{CATALOGUE[tag].direction}"' if tag in CATALOGUE else 'dir="auto"'


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
