"""The demo data set keeps its promises: held-out material stays out, answers are right, languages are as declared."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections import Counter
from decimal import Decimal
from functools import cache
from itertools import islice
from typing import Any

import pytest

from training.demo import corpus, phrasebook, problems
from training.demo.corpus import fine_tuning_samples, heldout_questions, pretraining_sample
from training.demo.grading import adheres, is_right
from training.demo.phrasebook import LANGUAGES
from training.demo.problems import HELDOUT_NUMBERS, TASKS

NUMBER = re.compile(r"\d+(?:\.\d+)?")
EXPRESSION = re.compile(r"[(\d][\d()×+\- ]*[\d)]")
PLACEHOLDERS = {
    **dict.fromkeys(("a", "b", "c", "left", "right"), r"[\d.]+"),
    "letter": "[a-z]",
    "word": "[a-z]+",
    "expression": r"[\d()×+\- ]+",
}


@cache
def pretraining() -> list[dict[str, Any]]:
    rng = random.Random(11)
    return [pretraining_sample(rng) for _ in range(20_000)]


@cache
def fine_tuning() -> list[dict[str, Any]]:
    return list(fine_tuning_samples(seed=7, per_language=500))


@cache
def heldout() -> list[dict[str, Any]]:
    return heldout_questions(seed=5, per_task=12)


def user_text(sample: dict[str, Any]) -> str:
    """What the user asks, or a document's first line (a textbook's question)."""
    if "text" in sample:
        return str(sample["text"]).split("\n")[0]
    return next(str(message["content"]) for message in sample["messages"] if message["role"] == "user")


def operands(text: str) -> list[int]:
    return [int(Decimal(number)) for number in NUMBER.findall(text)]


def phrasings(language: str, split: phrasebook.Split) -> list[re.Pattern[str]]:
    """Regular expressions that match the start of every question in a phrasing of that split."""
    patterns = []
    for choices in phrasebook.phrasebook(language).questions.values():
        for template in choices.of(split):
            parts = re.split(r"\{(\w+)\}", template)
            parts[::2] = map(re.escape, parts[::2])
            parts[1::2] = (PLACEHOLDERS.get(name, r"[^\d\"?？؟.。]+") for name in parts[1::2])
            patterns.append(re.compile("".join(parts)))
    return patterns


def heldout_words(texts: list[str]) -> list[str]:
    """The held-out names, items and quoted words that occur in texts."""
    found = []
    everything = "\n".join(texts)
    for language in LANGUAGES:
        book = phrasebook.phrasebook(language)
        for term in (*book.names.heldout, *book.items.heldout):
            latin = unicodedata.name(term[0]).startswith("LATIN")
            if re.search(rf"(?<!\w){term}(?!\w)" if latin else re.escape(term), everything):
                found.append(term)
    quoted = set(re.findall(r'"(\w+)"', everything))
    return found + sorted(quoted & set(phrasebook.words().heldout))


@pytest.mark.parametrize("samples", [pretraining, fine_tuning])
def test_training_holds_no_heldout_number_word_name_or_item(samples: Any) -> None:
    texts = [user_text(sample) for sample in samples()]
    assert not HELDOUT_NUMBERS & {number for text in texts for number in operands(text)}
    assert heldout_words(texts) == []


@pytest.mark.parametrize("samples", [pretraining, fine_tuning])
def test_training_uses_no_heldout_phrasing(samples: Any) -> None:
    patterns = [pattern for language in LANGUAGES for pattern in phrasings(language, "heldout")]
    combined = re.compile("|".join(f"(?:{pattern.pattern})" for pattern in patterns))
    assert [text for text in map(user_text, samples()) if combined.match(text)] == []


@pytest.mark.parametrize("samples", [pretraining, fine_tuning])
def test_training_asks_for_no_heldout_capital(samples: Any) -> None:
    heldout_countries = set(phrasebook.country_keys().heldout)
    asked = [sample for sample in samples() if sample.get("task") == "capital"]
    assert asked
    assert not heldout_countries & {sample["answer"] for sample in asked}
    glossary_or_reverse = {sample["answer"] for sample in pretraining() if sample.get("task") == "reverse_capital"}
    assert heldout_countries <= glossary_or_reverse


def test_heldout_questions_use_heldout_material_only() -> None:
    words = set(phrasebook.words().heldout)
    for sample in heldout():
        text, language = user_text(sample), sample["language"]
        book = phrasebook.phrasebook(language)
        names, items = set(book.names.heldout), set(book.items.heldout)
        assert any(pattern.fullmatch(text) for pattern in phrasings(language, "heldout")), text
        two_digits = [number for number in operands(text) if number >= 10]
        assert HELDOUT_NUMBERS.issuperset(two_digits), text
        assert two_digits or sample["task"] in ("letters", "capital"), text
        if sample["task"] == "letters":
            assert words.issuperset(re.findall(r'"(\w+)"', text)), text
        if sample["task"] == "word_problem":
            assert any(name in text for name in names), text
            assert any(item in text for item in items), text
        if sample["task"] == "capital":
            assert sample["answer"] in phrasebook.country_keys().heldout


def test_split_lists_are_disjoint() -> None:
    assert not set(phrasebook.words().train) & set(phrasebook.words().heldout)
    books = [phrasebook.phrasebook(language) for language in LANGUAGES]
    trained = {name for book in books for name in (*book.names.train, *book.pseudo_names)}
    assert not trained & {name for book in books for name in book.names.heldout}
    for book in books:
        assert not set(book.items.train) & set(book.items.heldout)
        assert all(not set(choices.train) & set(choices.heldout) for choices in book.questions.values())


def test_phrase_books_are_complete() -> None:
    english = phrasebook.phrasebook("en")
    for language in LANGUAGES:
        book = phrasebook.phrasebook(language)
        assert book.questions.keys() == english.questions.keys() == book.answers.keys()
        assert book.steps.keys() == english.steps.keys()
        assert all(len(choices.train) >= 3 and len(choices.heldout) == 2 for choices in book.questions.values())
        assert (len(book.explain), len(book.statements), len(book.reverse_questions)) == (3, 3, 2)
        assert (len(book.names.train), len(book.names.heldout)) == (14, 5)
        assert (len(book.items.train), len(book.items.heldout)) == (12, 4)
    assert (len(phrasebook.words().train), len(phrasebook.words().heldout)) == (300, 60)
    assert all(re.fullmatch("[a-z]{4,10}", word) for split in ("train", "heldout") for word in _words(split))
    assert (len(phrasebook.country_keys().train), len(phrasebook.country_keys().heldout)) == (30, 10)
    assert all(set(country.fields) == set(LANGUAGES) for country in phrasebook.countries().values())


def _words(split: Any) -> tuple[str, ...]:
    return phrasebook.words().of(split)


def test_same_seed_same_samples() -> None:
    def stream(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [json.dumps(pretraining_sample(rng)) for _ in range(200)]

    assert stream(1) == stream(1) != stream(2)
    assert list(fine_tuning_samples(3, 10)) == list(fine_tuning_samples(3, 10)) != list(fine_tuning_samples(4, 10))
    assert heldout_questions(3, 2) == heldout_questions(3, 2) != heldout_questions(4, 2)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_agree_with_the_question(language: str, split: phrasebook.Split) -> None:
    rng = random.Random(f"{language} {split}")
    for task in TASKS:
        for _ in range(150):
            problem = problems.draw(task, rng, split, pseudo_words=0.5)
            text = problems.question(problem, language, rng, split, pseudo_names=0.5)
            final = problems.answer(problem, language)
            thinking = problems.steps(problem, language)
            assert "{" not in text + final + thinking
            if task == "capital":
                capital = phrasebook.countries()[problem.answer].fields[language]["capital"]
                assert capital in final
                assert capital in thinking
                continue
            assert problem.answer == solve(problem, text), text
            assert is_right({"task": task, "accept": [problem.answer]}, final), final
            assert problem.answer in NUMBER.findall(thinking), thinking
            for equation in re.finditer(r"([\d×+\- ]+) = (\d+)", thinking):
                assert calculate(equation[1]) == int(equation[2]), thinking


def solve(problem: problems.Problem, text: str) -> str:
    """The answer, from the question's words alone (and which shape the problem has)."""
    numbers = NUMBER.findall(text)
    if problem.task == "letters":
        word = re.search(r'"([a-z]+)"', text)
        assert word
        assert re.search(rf"(?<![a-z]){problem.values['letter']}(?![a-z])", text.replace(word[0], ""))
        return str(word[1].count(problem.values["letter"]))
    if problem.task == "arithmetic":
        return str(calculate(max(EXPRESSION.findall(text), key=len)))
    if problem.task == "word_problem":
        first, second, third = map(int, numbers)
        results = {"bags": first + second * third, "share": first - second * third, "trade": first + second - third}
        return str(results[problem.form])
    return str(max(numbers, key=Decimal) if problem.variant == "larger" else min(numbers, key=Decimal))


def calculate(expression: str) -> int:
    assert re.fullmatch(r"[\d()×+\- ]+", expression)
    return int(eval(expression.replace("×", "*")))


def test_fine_tuning_samples_cover_languages_and_tasks() -> None:
    """Each language and task alike, but capitals twice as often."""
    samples = fine_tuning()
    counts = Counter((sample["language"], sample["task"]) for sample in samples)
    turns = len(samples) // len(LANGUAGES) // 6
    for language in LANGUAGES:
        for task in TASKS:
            assert abs(counts[language, task] - turns * (2 if task == "capital" else 1)) <= 1
    assert len({user_text(sample) for sample in samples}) == len(samples)
    own = sum(sample["language"] == sample["reasoning_language"] for sample in samples)
    assert 0.46 < own / len(samples) < 0.54
    assert all([message["role"] for message in s["messages"]] == ["developer", "user", "assistant"] for s in samples)


def test_fine_tuning_thinks_in_the_language_asked_for() -> None:
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for sample in fine_tuning():
        total[sample["reasoning_language"]] += 1
        right[sample["reasoning_language"]] += adheres(sample, sample["messages"][-1]["thinking"])
    assert [language for language in LANGUAGES if right[language] < 0.99 * total[language]] == []


def test_too_many_fine_tuning_samples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_LOOSE", 0.0)
    with pytest.raises(ValueError, match="no further question for task 'capital'"):
        list(islice(fine_tuning_samples(seed=1, per_language=2_000), 20_000))


def test_pretraining_diet() -> None:
    samples = pretraining()
    chats = [sample for sample in samples if "messages" in sample]
    assert 0.16 < 1 - len(chats) / len(samples) < 0.20
    assert {sample["language"] for sample in chats} == set(LANGUAGES)
    with_developer = sum(sample["messages"][0]["role"] == "developer" for sample in chats)
    assert 0.72 < with_developer / len(chats) < 0.78
    thoughts = [sample["messages"][-1]["thinking"].replace("×", "x") for sample in chats]
    assert [thinking for thinking in thoughts if not thinking.isascii()] == []


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("57", "The answer is 57.", True),
        ("57", "15 + 42 = 57", True),
        ("57", "57, not 58", False),
        ("57", "The answer is 570.", False),
        ("57", "", False),
        ("57", "الجواب هو ٥٧.", True),
        ("57", "उत्तर ५७ है।", True),
        ("57", "答えは５７です。", True),
        ("24.9", "Die größere Zahl ist 24,9.", True),
        ("24.9", "24.11 is smaller than 24.9", True),
        ("24.9", "24.90", True),
        ("24.9", "24.11", False),
        ("24.9", "العدد الأكبر هو ٢٤٫٩", True),
    ],
)
def test_grading_of_numbers(answer: str, text: str, right: bool) -> None:
    assert is_right({"task": "arithmetic", "accept": [answer]}, text) is right


@pytest.mark.parametrize(
    ("name", "text", "right"),
    [
        ("Nairobi", "The capital is NAIROBI.", True),
        ("Rom", "Das ist romantisch.", False),
        ("Athènes", unicodedata.normalize("NFD", "La capitale est Athènes."), True),
        ("ナイロビ", "首都はナイロビです。", True),
        ("나이로비", "수도는 나이로비입니다.", True),
        ("नैरोबी", "राजधानी दिल्ली है।", False),
    ],
)
def test_grading_of_capitals(name: str, text: str, right: bool) -> None:
    assert is_right({"task": "capital", "accept": [name]}, text) is right


def test_adherence() -> None:
    assert adheres({"reasoning_language": "ja"}, "二つの数の十の位を比べます：4 > 2。")
    assert not adheres({"reasoning_language": "ja"}, "I compare the tens digits of both numbers.")
    assert not adheres({"reasoning_language": "en"}, "")
