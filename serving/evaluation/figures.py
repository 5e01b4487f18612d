"""Figures of one target: shares and means with their uncertainty, for all answers and by language, task and effort."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from serving.evaluation.scoring import Scored
from serving.evaluation.statistics import Interval, majority, mean, pass_at, share_of

PASSES = (1, 2, 4, 5, 8, 10, 16, 32, 64, 100)
"""values of k that pass@k is given for, as far as there are samples"""
Value = Callable[[Scored], float | None]
"""a figure of one answer; None where it has none"""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class LanguageFigures(_Frozen):
    """How thinking, or answers, keep to the language asked for. Undetermined texts do not count as keeping to it."""

    adherence: Interval | None
    """share of texts in the language asked for; None where none was asked for"""
    undetermined: Interval
    """share of texts whose language cannot be told: empty, too short or mathematical"""
    sentences: int
    """sentences whose language can be told"""
    sentence_adherence: float | None
    """share of those in the language asked for"""
    undetermined_sentences: int
    switched: Interval
    """share of texts that change their language from one sentence to a later one"""
    detected: dict[str, int]
    """texts by the language that was found, `und` among them"""


class Figures(_Frozen):
    """Of a group of answers."""

    items: int
    answers: int
    thinking: LanguageFigures
    answer: LanguageFigures
    correct: Interval | None
    """mean score of the answers that were marked; None where none was"""
    wrong_for: dict[str, int]
    """answers that are not right, by the reason; a schema's faults under one name"""
    scorer_errors: dict[str, int]
    """answers that a user's scorer raised on, by exception; they are in no share"""
    valid: Interval
    """share of answers whose channels are as the format asks"""
    outcomes: dict[str, int]
    thinking_characters: Interval
    thinking_tokens: Interval | None
    completion_tokens: Interval | None
    seconds: Interval
    """of one answer, as the client sees it, waiting among others included"""
    pass_at: dict[int, Interval]
    majority: Interval | None


class Length(_Frozen):
    """How long thinking is at one effort, in one language."""

    effort: str
    language: str
    answers: int
    characters: Interval
    tokens: Interval | None


class TargetFigures(_Frozen):
    """All figures of one target. Languages are those that the thinking was asked for in."""

    all: Figures
    outside_english: Figures | None
    by_language: dict[str, Figures]
    by_task: dict[str, Figures]
    lengths: list[Length]
    thinking_confusion: dict[str, dict[str, int]]
    """language asked for → language found → thinking texts"""
    answer_confusion: dict[str, dict[str, int]]


METRICS: dict[str, Value] = {
    "thinks as asked": lambda one: _followed(one.thinking.verdict),
    "answers as asked": lambda one: _followed(one.language.verdict),
    "right": lambda one: one.marked.score,
    "channels valid": lambda one: float(one.answer.valid),
}
"""figures of one answer of which more is better"""
MEASURES: dict[str, Value] = {
    "thinking tokens": lambda one: one.answer.reasoning_tokens,
    "tokens": lambda one: one.answer.completion_tokens,
    "seconds": lambda one: one.answer.seconds,
}
"""figures of which neither more nor less is better by itself"""


def group_of(one: Scored) -> str:
    """Tag of the language that an answer counts under."""
    return one.item.reasoning_language or one.item.language


def target_figures(scored: Sequence[Scored]) -> TargetFigures | None:
    """The figures; None without any answer."""
    if not scored:
        return None
    by_language, by_task, lengths = defaultdict(list), defaultdict(list), defaultdict(list)
    for one in scored:
        by_language[group_of(one)].append(one)
        by_task[one.item.task].append(one)
        lengths[one.asking.effort or "default", group_of(one)].append(one)
    foreign = [one for one in scored if group_of(one) != "en"]
    return TargetFigures(
        all=figures(scored),
        outside_english=figures(foreign) if 0 < len(foreign) < len(scored) else None,
        by_language={tag: figures(ones) for tag, ones in by_language.items()},
        by_task={task: figures(ones) for task, ones in by_task.items()} if len(by_task) > 1 else {},
        lengths=[_length(effort, tag, ones) for (effort, tag), ones in lengths.items()],
        thinking_confusion=_confusion((one.thinking.requested, one.thinking.detected) for one in scored),
        answer_confusion=_confusion((one.language.requested, one.language.detected) for one in scored),
    )


def figures(scored: Sequence[Scored]) -> Figures:
    """Of at least one answer."""
    seconds = values_by_item(scored, MEASURES["seconds"])
    return Figures(
        items=len(seconds),
        answers=len(scored),
        thinking=_language(scored, lambda one: one.thinking),
        answer=_language(scored, lambda one: one.language),
        correct=_share(values_by_item(scored, METRICS["right"])),
        wrong_for=Counter(_reason(one) for one in scored if one.marked.mark == "wrong"),
        scorer_errors=Counter(one.marked.reason for one in scored if one.marked.mark == "scorer_error"),
        valid=share_of(list(values_by_item(scored, METRICS["channels valid"]).values())),
        outcomes=Counter(one.answer.outcome for one in scored),
        thinking_characters=_mean(values_by_item(scored, lambda one: len(one.answer.thinking))),
        thinking_tokens=_mean_or_none(values_by_item(scored, MEASURES["thinking tokens"])),
        completion_tokens=_mean_or_none(values_by_item(scored, MEASURES["tokens"])),
        seconds=_mean(seconds),
        **_of_samples(scored),
    )


def values_by_item(scored: Iterable[Scored], value: Value) -> dict[str, list[float]]:
    """Values of the answers that have one, by the item's id."""
    found: dict[str, list[float]] = {}
    for one in scored:
        if (each := value(one)) is not None:
            found.setdefault(one.item.id, []).append(float(each))
    return found


def _of_samples(scored: Sequence[Scored]) -> dict[str, Any]:
    """pass@k and the majority's score, of questions that were asked several times."""
    asked: dict[tuple[str, str], list[Scored]] = defaultdict(list)
    for one in scored:
        if one.marked.score is not None:
            asked[one.item.id, one.asking.effort or ""].append(one)
    samples = min(map(len, asked.values()), default=0)
    if samples < 2:
        return {"pass_at": {}, "majority": None}
    passes = {
        k: mean([pass_at(k, sum(one.marked.mark == "right" for one in ones), len(ones)) for ones in asked.values()])
        for k in PASSES
        if k <= samples
    }
    votes = [
        majority([(one.marked.given, one.marked.score or 0.0) for one in ones])
        for ones in asked.values()
        if any(one.marked.given is not None for one in ones)
    ]
    return {"pass_at": passes, "majority": mean(votes) if votes else None}


def _language(scored: Sequence[Scored], of: Callable[[Scored], Any]) -> LanguageFigures:
    texts = [of(one) for one in scored]
    told, followed = sum(text.sentences for text in texts), sum(text.followed for text in texts)
    undetermined = values_by_item(scored, lambda one: float(of(one).detected == "und"))
    return LanguageFigures(
        adherence=_share(values_by_item(scored, lambda one: _followed(of(one).verdict))),
        undetermined=share_of(list(undetermined.values())),
        sentences=told,
        sentence_adherence=followed / told if told else None,
        undetermined_sentences=sum(text.undetermined for text in texts),
        switched=share_of(list(values_by_item(scored, lambda one: float(of(one).switches > 0)).values())),
        detected=Counter(text.detected for text in texts),
    )


def _followed(verdict: str) -> float | None:
    return None if verdict == "not_requested" else float(verdict == "followed")


def _reason(one: Scored) -> str:
    return "does not fit the schema" if one.item.chosen_scorer == "json" and one.marked.given is None else (
        one.marked.reason or "less than the full score"
    )  # fmt: skip


def _length(effort: str, language: str, scored: Sequence[Scored]) -> Length:
    return Length(
        effort=effort,
        language=language,
        answers=len(scored),
        characters=_mean(values_by_item(scored, lambda one: len(one.answer.thinking))),
        tokens=_mean_or_none(values_by_item(scored, MEASURES["thinking tokens"])),
    )


def _confusion(pairs: Iterable[tuple[str | None, str]]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for requested, detected in pairs:
        if requested is not None:
            counts.setdefault(requested, Counter())[detected] += 1
    return {requested: dict(found) for requested, found in counts.items()}


def _share(values: dict[str, list[float]]) -> Interval | None:
    return share_of(list(values.values())) if values else None


def _mean(values: dict[str, list[float]]) -> Interval:
    return mean([sum(each) / len(each) for each in values.values()])


def _mean_or_none(values: dict[str, list[float]]) -> Interval | None:
    return _mean(values) if values else None
