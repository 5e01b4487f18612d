"""The demo's problems: drawn from seeded randomness, then put into words in any language of the catalogue.

Numbers from 10 to 99 that leave 3 modulo 7 are held out: no training question has one as an operand, and a held-out
question has no other number of two digits.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from training.demo import phrasebook
from training.demo.phrasebook import Split

TASKS = ("letters", "arithmetic", "word_problem", "capital", "comparison")
"""The kinds of problems."""

HELDOUT_NUMBERS = frozenset(number for number in range(10, 100) if number % 7 == 3)
"""Numbers that no training question has as an operand (in a decimal: as its whole part)."""

_SINGLE = range(2, 10)
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_VOWELS = "aeiou"
_CONSONANTS = "bcdfghjklmnpqrstvwxyz"
_MAXIMUM_COUNT = 3

_ARITHMETIC_STEPS = {
    "a + b × c": "add",
    "b × c + a": "add",
    "a - b × c": "subtract",
    "b × c - a": "subtract",
    "(a - b) × c": "brackets",
    "(a + b) × c": "brackets",
}
_WORD_PROBLEM_FORMS = ("bags", "share", "trade")


@dataclass(frozen=True)
class Problem:
    """A problem without words.

    Attributes:
        task: one of `TASKS`.
        form: the shape within the task, e.g. `a + b × c`, `bags` or `larger tenths`.
        values: what the templates' placeholders stand for, as far as no language is involved.
        answer: the canonical answer: a number, or a country's English name for its capital.
        variant: which questions and answers of the phrase book fit.
        step: which steps of the phrase book fit.
    """

    task: str
    form: str
    values: Mapping[str, str] = field(hash=False)
    answer: str
    variant: str
    step: str


def draw(task: str, rng: random.Random, split: Split, pseudo_words: float = 0.0) -> Problem:
    """A random problem of a task.

    Args:
        task: one of `TASKS`.
        rng: source of all randomness.
        split: whether held-out words, numbers and countries are excluded, or the only ones.
        pseudo_words: probability that an invented word takes the place of a real one (split `train` only).

    Raises:
        ValueError: the task is unknown.
    """
    if task == "letters":
        return _draw_letters(rng, split, pseudo_words)
    if task == "arithmetic":
        return _draw_arithmetic(rng, split)
    if task == "word_problem":
        return _draw_word_problem(rng, split)
    if task == "capital":
        key = rng.choice(phrasebook.country_keys().of(split))
        return capital_problem(key)
    if task == "comparison":
        return _draw_comparison(rng, split)
    raise ValueError(f"unknown task {task!r}; tasks are {', '.join(TASKS)}")


def capital_problem(key: str) -> Problem:
    """The question for the capital of the country with this key (its English name)."""
    return Problem("capital", "capital", {"key": key}, key, "country", "fact")


def question(
    problem: Problem, language: str, rng: random.Random, split: Split, pseudo_names: float = 0.0, loose: float = 0.0
) -> str:
    """The problem as a question, in one of the language's phrasings of that split.

    Args:
        problem: what to ask.
        language: BCP-47 tag of the question's language.
        rng: chooses phrasing, name and item.
        split: where phrasing, name and item come from.
        pseudo_names: probability that an invented name takes the place of a real one (split `train` only).
        loose: probability of each of three liberties that people take: words before the question, words after it,
            and a word of it left out. A model that has seen them depends less on the phrasings themselves.
    """
    book = phrasebook.phrasebook(language)
    values = _localized(problem, language)
    if problem.task == "word_problem":
        invented = split == "train" and rng.random() < pseudo_names
        values["name"] = rng.choice(book.pseudo_names if invented else book.names.of(split))
        values["item"] = rng.choice(book.items.of(split))
    template = rng.choice(book.questions[problem.task, problem.variant].of(split))
    if loose and rng.random() < loose:
        template = _leave_out_a_word(template, book.between_sentences, rng)
    parts = [template]
    if loose and rng.random() < loose:
        parts.insert(0, rng.choice(book.openers))
    if loose and rng.random() < loose:
        parts.append(rng.choice(book.closers))
    return book.between_sentences.join(parts).format_map(values)


def _leave_out_a_word(template: str, separator: str, rng: random.Random) -> str:
    """`template` without one word, or without two letters where words are not separated.

    Placeholders stay, and so does what stands between two of them: `{a}与{b}` must not become one number.
    """
    units = template.split(" ") if separator else re.findall(r"\{\w+\}|[^{}]{1,2}", template)
    held = ["{" in unit for unit in units]
    free = [i for i in range(len(units)) if not held[i] and not (any(held[i - 1 : i]) and any(held[i + 1 : i + 2]))]
    if len(free) > 2:
        del units[rng.choice(free)]
    return (" " if separator else "").join(units)


def steps(problem: Problem, language: str) -> str:
    """The thinking that solves the problem, in a language."""
    book = phrasebook.phrasebook(language)
    values = _localized(problem, language)
    if problem.task == "capital":
        values["statement"] = book.statements[0].format_map(values)
    values["conclusion"] = answer(problem, language)
    return book.steps[problem.task, problem.step].format_map(values)


def answer(problem: Problem, language: str) -> str:
    """The final sentence, in a language."""
    template = phrasebook.phrasebook(language).answers[problem.task, problem.variant]
    return template.format_map(_localized(problem, language))


def _localized(problem: Problem, language: str) -> dict[str, str]:
    if problem.task == "capital":
        return dict(phrasebook.countries()[problem.values["key"]].fields[language])
    return dict(problem.values)


# Letters


def _draw_letters(rng: random.Random, split: Split, pseudo_words: float) -> Problem:
    if split == "train" and rng.random() < pseudo_words:
        word, letter = _pseudo_word(rng)
    else:
        by_count = _words_by_count(split)
        (count,) = rng.choices(tuple(by_count), weights=[(10, 35, 40, 15)[known] for known in by_count])
        word, letter = rng.choice(by_count[count])
    run, seen = [], 0
    for character in word:
        seen += character == letter
        run.append(f" {character}{seen}")
    values = {"word": word, "letter": letter, "count": str(seen), "run": "".join(run)}
    return Problem("letters", "count", values, str(seen), "count", "count")


@cache
def _words_by_count(split: Split) -> dict[int, tuple[tuple[str, str], ...]]:
    """Pairs of word and letter, by how often the letter occurs; only counts for which there are pairs."""
    pairs: dict[int, list[tuple[str, str]]] = {count: [] for count in range(_MAXIMUM_COUNT + 1)}
    for word in phrasebook.words().of(split):
        for letter in _ALPHABET:
            if word.count(letter) in pairs:
                pairs[word.count(letter)].append((word, letter))
    return {count: tuple(found) for count, found in pairs.items() if found}


def _pseudo_word(rng: random.Random) -> tuple[str, str]:
    """An invented word that is no held-out one, and a letter it holds 0 to 3 times."""
    heldout = phrasebook.words().heldout
    while True:
        letter = rng.choice(_ALPHABET)
        length = rng.randint(3, 10)
        (count,) = rng.choices((0, 1, 2, 3), weights=(10, 25, 35, 30))
        if rng.random() < 0.5:
            characters = rng.choices(_ALPHABET.replace(letter, ""), k=length)
        else:
            vowels, consonants = _VOWELS.replace(letter, ""), _CONSONANTS.replace(letter, "")
            start = rng.randrange(2)
            characters = [rng.choice(vowels if (start + at) % 2 else consonants) for at in range(length)]
        for position in rng.sample(range(length), count):
            characters[position] = letter
        word = "".join(characters)
        if word not in heldout:
            return word, letter


# Arithmetic and word problems


def _draw_arithmetic(rng: random.Random, split: Split) -> Problem:
    by_form = _operands(split)
    form = rng.choice([form for form in _ARITHMETIC_STEPS if form in by_form])
    a, b, c = rng.choice(by_form[form])
    expression = _fill(form, a=a, b=b, c=c)
    if _ARITHMETIC_STEPS[form] == "brackets":
        inner = a - b if "-" in form else a + b
        result = inner * c
        first = f"{a} {'-' if '-' in form else '+'} {b} = {inner}"
        second = f"{inner} × {c} = {result}"
    else:
        first = f"{b} × {c} = {b * c}"
        remaining = _fill(form.replace("b × c", "p"), a=a, p=b * c)
        left, operator, right = remaining.split()
        result = int(left) + int(right) if operator == "+" else int(left) - int(right)
        second = f"{remaining} = {result}"
    values = {"expression": expression, "first": first, "second": second, "result": str(result)}
    return Problem("arithmetic", form, values, str(result), "expression", _ARITHMETIC_STEPS[form])


def _fill(form: str, **operands: int) -> str:
    return "".join(str(operands.get(character, character)) for character in form)


def _draw_word_problem(rng: random.Random, split: Split) -> Problem:
    form = rng.choice(_WORD_PROBLEM_FORMS)
    a, b, c = rng.choice(_operands(split)[form])
    if form == "bags":
        result = a + b * c
        first, second = f"{b} × {c} = {b * c}", f"{a} + {b * c} = {result}"
    elif form == "share":
        result = a - b * c
        first, second = f"{b} × {c} = {b * c}", f"{a} - {b * c} = {result}"
    else:
        result = a + b - c
        first, second = f"{a} + {b} = {a + b}", f"{a + b} - {c} = {result}"
    values = {"a": str(a), "b": str(b), "c": str(c), "first": first, "second": second, "result": str(result)}
    return Problem("word_problem", form, values, str(result), form, form)


@cache
def _operands(split: Split) -> dict[str, tuple[tuple[int, int, int], ...]]:
    """All operands a, b, c of each form that a split allows and that give no negative number."""
    numbers = _two_digit_numbers(split)
    mixed = [(a, b, c) for a in numbers for b in _SINGLE for c in _SINGLE]
    plus = tuple(mixed)
    minus = tuple((a, b, c) for a, b, c in mixed if a >= b * c)
    by_form = {
        "a + b × c": plus,
        "b × c + a": plus,
        "a - b × c": minus,
        "b × c - a": tuple((a, b, c) for a, b, c in mixed if b * c >= a),
        "(a - b) × c": tuple((a, b, c) for a, b, c in mixed if a - b in _SINGLE),
        "bags": plus,
        "share": minus,
        "trade": tuple((a, b, c) for a in numbers for b in numbers for c in _SINGLE if a + b < 100),
    }
    if split == "train":
        small = [(a, b, c) for a in _SINGLE for b in _SINGLE for c in _SINGLE]
        by_form["(a + b) × c"] = tuple((a, b, c) for a, b, c in small if a + b in _SINGLE)
    return by_form


@cache
def _two_digit_numbers(split: Split) -> tuple[int, ...]:
    return tuple(number for number in range(10, 100) if (number in HELDOUT_NUMBERS) == (split == "heldout"))


# Comparison


def _draw_comparison(rng: random.Random, split: Split) -> Problem:
    if rng.random() < 0.5:
        place, left, right, left_digit, right_digit = _draw_decimals(rng, split)
    else:
        place, left, right, left_digit, right_digit = _draw_integers(rng, split)
    variant = rng.choice(("larger", "smaller"))
    left_is_larger = left_digit > right_digit
    result = left if left_is_larger == (variant == "larger") else right
    digits = f"{left_digit} {'>' if left_is_larger else '<'} {right_digit}"
    values = {"left": left, "right": right, "digits": digits, "result": result}
    return Problem("comparison", f"{variant} {place}", values, result, variant, place)


def _draw_decimals(rng: random.Random, split: Split) -> tuple[str, str, str, int, int]:
    """Two decimals with the same whole part, one with one digit behind the point, one with two."""
    whole = rng.choice(_two_digit_numbers(split) if split == "heldout" else (*_SINGLE, *_two_digit_numbers(split)))
    left_digit, right_digit = rng.sample(range(1, 10), 2)
    left, right = f"{whole}.{left_digit}", f"{whole}.{right_digit}"
    if rng.random() < 0.5:
        left += str(rng.randint(1, 9))
    else:
        right += str(rng.randint(1, 9))
    return "tenths", left, right, left_digit, right_digit


def _draw_integers(rng: random.Random, split: Split) -> tuple[str, str, str, int, int]:
    same_tens, other_tens = _integer_pairs(split)
    if rng.random() < 0.4:
        left, right = rng.choice(same_tens)
        return "units", str(left), str(right), left % 10, right % 10
    left, right = rng.choice(other_tens)
    return "tens", str(left), str(right), left // 10, right // 10


@cache
def _integer_pairs(split: Split) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Ordered pairs of different numbers: those with equal tens digits, and the others."""
    numbers = _two_digit_numbers(split)
    pairs = [(left, right) for left in numbers for right in numbers if left != right]
    return (
        tuple(pair for pair in pairs if pair[0] // 10 == pair[1] // 10),
        tuple(pair for pair in pairs if pair[0] // 10 != pair[1] // 10),
    )
