"""Answers held against their items: right or wrong, which languages they are in, and whether their channels held."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.languages import CATALOGUE, MEASURED, detection_candidates
from cluster.languages.sentences import Adherence, adherence
from serving.evaluation.answers import Answer, Asking
from serving.evaluation.items import Item
from serving.evaluation.scorers import Marked, mark, user_scorer
from serving.evaluation.suites import Suite


@dataclass(frozen=True)
class Scored:
    """An answer and what is found of it."""

    asking: Asking
    answer: Answer
    marked: Marked
    thinking: Adherence
    language: Adherence
    """of the answer's text"""

    @property
    def item(self) -> Item:
        """What was asked."""
        return self.asking.item

    def record(self) -> dict[str, Any]:
        """What is found, as a line of the file of scores."""
        return {
            "id": self.item.id,
            "effort": self.asking.effort,
            "sample": self.asking.sample,
            "mark": self.marked.mark,
            "score": self.marked.score,
            "given": self.marked.given,
            "reason": self.marked.reason,
            "thinking": vars(self.thinking),
            "answer": vars(self.language),
            "valid": self.answer.valid,
            "outcome": self.answer.outcome,
        }


def candidates_of(suite: Suite) -> frozenset[str]:
    """Languages that are told apart in the answers to a suite: those of the suite, and the measured ones.

    The fewer there are, the surer is detection; whoever thinks in a language of neither is taken for its nearest.
    """
    asked = {item.language for item in suite.items}
    asked |= {tag for item in suite.items for tag in (item.reasoning_language, item.answer_language) if tag}
    return frozenset(MEASURED) | asked


def score(askings: Sequence[Asking], answers: Mapping[str, Answer], among: Iterable[str] | None = None) -> list[Scored]:
    """All answers that there are, in the order of the askings.

    Args:
        among: tags to detect among; None for the whole catalogue.

    Raises:
        ConfigError: a user's scorer cannot be found.
    """
    known = frozenset(CATALOGUE if among is None else among)
    # Without the twin of the language that is wanted, which detection cannot tell from it.
    candidates = {wanted: known & detection_candidates(wanted) for wanted in (None, *CATALOGUE)}
    found = []
    for asking in askings:
        answer = answers.get(asking.key)
        if answer is None:
            continue
        item = asking.item
        found.append(
            Scored(
                asking,
                answer,
                mark(item, answer),
                adherence(answer.thinking, item.reasoning_language, candidates[item.reasoning_language]),
                adherence(answer.answer, item.answer_language, candidates[item.answer_language]),
            )
        )
    return found


def require_scorers(items: Iterable[Item]) -> None:
    """Raises ConfigError if a user's scorer cannot be found: better before anything is asked than after it."""
    for name in dict.fromkeys(item.chosen_scorer for item in items):
        if ":" in name:
            user_scorer(name)
