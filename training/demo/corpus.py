"""The demo's three data sets: what a tiny base model is pretrained on, what fine-tuning adds, and what evaluation asks.

The base model learns to answer in all languages, but to think in English only. Fine-tuning teaches it to think in the
language that the developer message asks for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from cluster.languages import CATALOGUE, reasoning_instruction
from training.demo import phrasebook, problems
from training.demo.phrasebook import Split
from training.demo.problems import TASKS, Problem

Sample = dict[str, Any]
"""A JSON object: `messages`, `language`, `reasoning_language`, `task` and `answer`; or a document's `text`."""

REVERSE_CAPITAL = "reverse_capital"
"""The pretraining-only task that asks which country a capital belongs to."""

_LANGUAGES = phrasebook.LANGUAGES
_OTHERS = {tag: tuple(other for other in _LANGUAGES if other != tag) for tag in _LANGUAGES}
_INSTRUCTIONS = {tag: reasoning_instruction(tag) for tag in _LANGUAGES}
_ATTEMPTS = 20_000
_TASK_WEIGHTS = (25, 14, 28, 13, 20)
"""of `TASKS` in pre-training: spelling and word problems are the hardest to learn"""
_FINE_TUNING_TASKS = (*TASKS, "capital")
"""in turns; capitals twice: what a base knows of a country it has read in all languages, and so confuses them most"""
_PSEUDO_WORDS = 0.8
_PSEUDO_NAMES = 0.5
_LOOSE = 0.35


def fine_tuning_samples(seed: int, per_language: int) -> Iterator[Sample]:
    """Conversations whose thinking follows the developer message, tasks and question languages in turn.

    The reasoning language is the question's in half of the samples, any other language in the rest.

    Args:
        seed: the same seed gives the same samples.
        per_language: how many questions in each language, no two of them equal.

    Raises:
        ValueError: the phrases do not yield that many different questions.
    """
    rng = random.Random(seed)
    asked: set[str] = set()
    for index in range(per_language):
        task = _FINE_TUNING_TASKS[index % len(_FINE_TUNING_TASKS)]
        for language in _LANGUAGES:
            problem, asking = _new_question(task, language, rng, "train", asked)
            reasoning = language if rng.random() < 0.5 else rng.choice(_OTHERS[language])
            messages = [
                {"role": "developer", "content": _INSTRUCTIONS[reasoning]},
                {"role": "user", "content": asking},
                _assistant(problems.steps(problem, reasoning), problems.answer(problem, language)),
            ]
            yield _sample(messages, language, reasoning, task, problem.answer)


def heldout_questions(seed: int, per_task: int) -> list[Sample]:
    """Questions for evaluation, without an assistant's turn, made of held-out material only.

    Each has `accept`: strings of which a right answer holds one.

    Args:
        seed: the same seed gives the same questions.
        per_task: how many questions for each language and task, no two of them equal.

    Raises:
        ValueError: the phrases do not yield that many different questions.
    """
    rng = random.Random(seed)
    asked: set[str] = set()
    samples = []
    for language in _LANGUAGES:
        for task in TASKS:
            for _ in range(per_task):
                problem, asking = _new_question(task, language, rng, "heldout", asked)
                messages = [
                    {"role": "developer", "content": _INSTRUCTIONS[language]},
                    {"role": "user", "content": asking},
                ]
                sample = _sample(messages, language, language, task, problem.answer)
                samples.append({**sample, "accept": [_accepted(problem, language)]})
    return samples


def pretraining_sample(rng: random.Random) -> Sample:
    """One sample of the base model's diet: a conversation with English thinking, or a plain document `{"text": ...}`.

    Held-out words, numbers, names, items and phrasings never occur; held-out countries only in glossaries and
    reverse questions.
    """
    kind = rng.random()
    if kind < 0.42:
        return _direct_chat(rng)
    if kind < 0.54:
        return _explaining_chat(rng)
    if kind < 0.60:
        return _textbook(rng)
    if kind < 0.72:
        return _glossary(rng)
    return _reverse_chat(rng)


def _direct_chat(rng: random.Random) -> Sample:
    language = rng.choice(_LANGUAGES)
    problem = _pretraining_problem(rng)
    asking = problems.question(problem, language, rng, "train", _PSEUDO_NAMES, _LOOSE)
    wish, replying = _wishes(rng, language)
    turn = _assistant(problems.steps(problem, "en"), problems.answer(problem, replying))
    return _pretraining_chat(wish, asking, turn, language, problem.task, problem.answer)


def _explaining_chat(rng: random.Random) -> Sample:
    language = rng.choice(_LANGUAGES)
    book = phrasebook.phrasebook(language)
    problem = _pretraining_problem(rng)
    asking = problems.question(problem, language, rng, "train", _PSEUDO_NAMES, _LOOSE)
    asking += book.between_sentences + rng.choice(book.explain)
    wish, replying = _wishes(rng, language)
    thinking = _will_explain(rng, replying)
    content, conclusion = problems.steps(problem, replying), problems.answer(problem, replying)
    if not content.endswith(conclusion):
        content += phrasebook.phrasebook(replying).between_sentences + conclusion
    return _pretraining_chat(wish, asking, _assistant(thinking, content), language, problem.task, problem.answer)


def _will_explain(rng: random.Random, language: str) -> str:
    return rng.choice(phrasebook.phrasebook("en").explain_thinking).format(language=CATALOGUE[language].name)


def _textbook(rng: random.Random) -> Sample:
    language = rng.choice(_LANGUAGES)
    problem = _pretraining_problem(rng)
    lines = (
        problems.question(problem, language, rng, "train", _PSEUDO_NAMES, _LOOSE),
        problems.steps(problem, language),
        problems.answer(problem, language),
    )
    return {"text": "\n".join(lines)}


def _glossary(rng: random.Random) -> Sample:
    """What an atlas says of one country, held-out ones too: its names, or the fact, in several languages."""
    country = rng.choice(tuple(phrasebook.countries().values()))
    languages = rng.sample(_LANGUAGES, rng.randint(2, 4))
    kind = rng.random()
    if kind < 0.3:
        names = [
            " = ".join(country.fields[language][name] for language in languages) for name in ("country", "capital")
        ]
        return {"text": "\n".join(names)}
    if kind < 0.6:
        fact = problems.capital_problem(country.key)
        return {"text": "\n".join(problems.steps(fact, language) for language in languages)}
    lines = [
        rng.choice(phrasebook.phrasebook(language).statements).format_map(country.fields[language])
        for language in languages
    ]
    return {"text": "\n".join(lines)}


def _reverse_chat(rng: random.Random) -> Sample:
    language = rng.choice(_LANGUAGES)
    country = rng.choice(tuple(phrasebook.countries().values()))
    asking = rng.choice(phrasebook.phrasebook(language).reverse_questions).format_map(country.fields[language])
    wish, replying = _wishes(rng, language)
    book, fact = phrasebook.phrasebook(replying), problems.capital_problem(country.key)
    answer = book.reverse_answer.format_map(country.fields[replying])
    if rng.random() < 0.4:
        turn = _assistant(problems.steps(fact, "en"), answer)
    else:
        own = phrasebook.phrasebook(language)
        asking += own.between_sentences + rng.choice(own.explain)
        turn = _assistant(
            _will_explain(rng, replying), problems.steps(fact, replying) + book.between_sentences + answer
        )
    return _pretraining_chat(wish, asking, turn, language, REVERSE_CAPITAL, country.key)


def _pretraining_problem(rng: random.Random) -> Problem:
    (task,) = rng.choices(TASKS, _TASK_WEIGHTS)
    return problems.draw(task, rng, "train", _PSEUDO_WORDS)


def _wishes(rng: random.Random, language: str) -> tuple[str, str]:
    """A developer message, empty in 25 % of cases, and the language that the reply comes in.

    A wish for a reasoning language is in vain: the base model thinks in English. One for an answer language is heeded,
    so the base knows what a language's name in a developer message means; fine-tuning has it heeded in the thinking.
    """
    instructions, replying = [], language
    if rng.random() < 0.55:
        wish = language if rng.random() < 0.4 else rng.choice(_LANGUAGES)
        instructions.append(_INSTRUCTIONS[wish])
    if rng.random() < 0.45:
        replying = rng.choice(_LANGUAGES)
        instructions.append(f"answer language: {CATALOGUE[replying].name}")
    return "\n\n".join(instructions), replying


def _pretraining_chat(wish: str, asking: str, turn: dict[str, str], language: str, task: str, answer: str) -> Sample:
    messages = [{"role": "user", "content": asking}, turn]
    if wish:
        messages.insert(0, {"role": "developer", "content": wish})
    return _sample(messages, language, "en", task, answer)


def _new_question(task: str, language: str, rng: random.Random, split: Split, asked: set[str]) -> tuple[Problem, str]:
    for _ in range(_ATTEMPTS):
        problem = problems.draw(task, rng, split)
        asking = problems.question(problem, language, rng, split, loose=_LOOSE if split == "train" else 0.0)
        if asking not in asked:
            asked.add(asking)
            return problem, asking
    raise ValueError(f"no further question for task {task!r} in language {language!r}; ask for fewer samples")


def _accepted(problem: Problem, language: str) -> str:
    if problem.task == "capital":
        return phrasebook.countries()[problem.answer].fields[language]["capital"]
    return problem.answer


def _assistant(thinking: str, content: str) -> dict[str, str]:
    return {"role": "assistant", "thinking": thinking, "content": content}


def _sample(messages: list[dict[str, str]], language: str, reasoning: str, task: str, answer: str) -> Sample:
    return {
        "messages": messages,
        "language": language,
        "reasoning_language": reasoning,
        "task": task,
        "answer": answer,
    }
