"""Is an answer right? One pure function for each way to tell, and the user's own."""

from __future__ import annotations

import importlib
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from cluster.answers import final_number, fold, holds_name, normalised, read_number, same_number
from cluster.config import ConfigError
from serving.api.structured import fault_of_json
from serving.evaluation.answers import Answer
from serving.evaluation.items import LETTERS, Item

Mark = Literal["right", "wrong", "unmarked", "scorer_error"]

_BOXED = re.compile(r"\\boxed\s*\{\s*(?:\\text\s*\{)?\s*\(?([A-Z])\)?\s*\}")
_LEADING = re.compile(r"^\W*([A-Z])(?:[).:]|\s*$)")
_LETTER = re.compile(r"(?<![A-Za-z0-9'’])([A-Z])(?![A-Za-z0-9'’])")
_ARTICLES = re.compile(r"(?<![A-Za-z0-9'’])(?:A|I|O|Y|E)(?= +[A-Za-z])")
"""letters that are words too, in front of another word"""


class Marked(NamedTuple):
    """What a scorer says. `score` is between 0 and 1, None of what was not marked.

    `given` is what it took for the answer, as majority votes count it; None where nothing was found, or votes make no
    sense. `reason` says why an answer is not right, or which exception the user's scorer raised.
    """

    mark: Mark
    score: float | None
    given: str | None = None
    reason: str = ""


UserScorer = Callable[[dict[str, Any], dict[str, Any]], bool | float]
"""the item and the answer as dictionaries → right or wrong, or a score between 0 and 1"""


def mark(item: Item, answer: Answer) -> Marked:
    """Marks one answer. A user's scorer that raises makes a `scorer_error`, never a wrong answer.

    Raises:
        ConfigError: the user's scorer cannot be found.
    """
    name = item.chosen_scorer
    if name == "none":
        found = Marked("unmarked", None)
    elif name in _BUILT_IN:
        found = _BUILT_IN[name](item, answer.answer)
    else:
        found = _by_user(name, item, answer)
    if item.forbidden and found.mark != "scorer_error":
        text = fold(answer.answer)
        if any(fold(each) in text for each in item.forbidden):
            return Marked("wrong", 0.0, found.given, "says what is forbidden")
    return found


@lru_cache(maxsize=64)
def user_scorer(name: str) -> UserScorer:
    """The function of `module:function`.

    Raises:
        ConfigError: there is no such module, or no such function in it.
    """
    module, _, function = name.partition(":")
    try:
        found: UserScorer = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise ConfigError(f"scorer {name!r}: the module cannot be imported ({error})") from None
    except AttributeError:
        raise ConfigError(f"scorer {name!r}: the module {module} has no {function}") from None
    if not callable(found):
        raise ConfigError(f"scorer {name!r}: {function} is no function")
    return found


def _number(item: Item, text: str) -> Marked:
    language = item.answer_language or item.language
    last = final_number(text, language)
    if last is None:
        return Marked("wrong", 0.0, None, "no number")
    accepted = (_accepted(each, item.language) for each in item.answer)
    right = any(same_number(each, last, _fraction(item.tolerance)) for each in accepted if each)
    return _marked(right, str(last.value), "another number")


def _exact(item: Item, text: str) -> Marked:
    given = text.strip()
    return _marked(given in {each.strip() for each in item.answer}, given or None, "another text")


def _normalised(item: Item, text: str) -> Marked:
    given = normalised(text)
    return _marked(given in {normalised(each) for each in item.answer}, given or None, "another text")


def _contains(item: Item, text: str) -> Marked:
    found = next((each for each in item.answer if holds_name(text, each)), None)
    return _marked(found is not None, found and fold(found), "does not occur")


def _choice(item: Item, text: str) -> Marked:
    place = chosen(text, item.choices)
    if place is None:
        return Marked("wrong", 0.0, None, "no choice")
    return _marked(place in {item.place_of(each) for each in item.answer}, LETTERS[place], "another choice")


def chosen(text: str, choices: tuple[str, ...]) -> int | None:
    """Number of the choice that an answer takes, from 0; None where it takes none, or several.

    In this order: a letter in a box; a letter that the answer is or begins with; the only letter of a choice that
    stands by itself; the text of one choice and of no other.
    """
    plain = unicodedata.normalize("NFKC", text)
    letters = LETTERS[: len(choices)]
    for pattern in (_BOXED, _LEADING):
        found = pattern.findall(plain)
        if found and found[-1] in letters:
            return letters.index(found[-1])
    alone = set(_LETTER.findall(_ARTICLES.sub("", plain))) & set(letters)
    if len(alone) == 1:
        return letters.index(alone.pop())
    folded = fold(text)
    held = [number for number, choice in enumerate(choices) if _stands_in(fold(choice), folded)]
    # The text of one choice may be part of another's: the longer one was meant.
    held = [
        one for one in held if not any(one != other and fold(choices[one]) in fold(choices[other]) for other in held)
    ]
    return held[0] if len(held) == 1 else None


def _stands_in(choice: str, text: str) -> bool:
    """Whether a choice occurs in a text, not as a part of a number or a Latin word."""
    if choice not in text:
        return False
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(choice)}(?![A-Za-z0-9]|[.,]\d)", text) is not None


def _json(item: Item, text: str) -> Marked:
    fault = fault_of_json(text, item.json_schema)
    return Marked("right", 1.0) if fault is None else Marked("wrong", 0.0, None, fault)


def _by_user(name: str, item: Item, answer: Answer) -> Marked:
    scorer = user_scorer(name)
    try:
        given = scorer(item.model_dump(mode="json", by_alias=True), answer.model_dump(mode="json"))
        score = float(given)
        if not (isinstance(given, bool | int | float) and 0 <= score <= 1):
            raise ValueError(f"the score {given!r} is neither true, false nor between 0 and 1")
    except Exception as error:  # whatever the user's code raises tells of the scorer, not of the answer
        return Marked("scorer_error", None, None, type(error).__name__)
    return Marked("right" if score == 1 else "wrong", score)


_BUILT_IN: dict[str, Callable[[Item, str], Marked]] = {
    "number": _number,
    "exact": _exact,
    "normalised": _normalised,
    "contains": _contains,
    "choice": _choice,
    "json": _json,
}


def _marked(right: bool, given: str | None, otherwise: str) -> Marked:
    return Marked("right", 1.0, given) if right else Marked("wrong", 0.0, given, otherwise)


_accepted = lru_cache(maxsize=65536)(read_number)


@lru_cache(maxsize=1024)
def _fraction(value: float) -> Fraction:
    return Fraction(str(value))
