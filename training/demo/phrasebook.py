"""The phrases of the demo data set: TOML files that native speakers can correct, read once and kept.

Placeholders of the templates:

- letters: `{letter}`, `{word}`, `{count}`, `{run}` (the running count, with a leading space)
- arithmetic: `{expression}`, `{first}` and `{second}` (equations), `{result}`
- word problems: `{name}`, `{item}`, `{a}`, `{b}`, `{c}`, `{first}`, `{second}`, `{result}`
- capitals: `{country}`, `{capital}`, `{statement}` (the first of `statements`); in French also `{of_country}`
- comparison: `{left}`, `{right}`, `{digits}` (the digits compared), `{result}`
- steps of every task: `{conclusion}` (the answer sentence)
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "heldout"]
"""Which side of the held-out line phrasings, names, items, words, numbers and countries are taken from."""

LANGUAGES: tuple[str, ...] = ("en", "ja", "fr", "de", "es", "zh", "ko", "ar", "hi")
"""BCP-47 tags of the languages that have phrases; samples are drawn in this order."""

PHRASES = Path(__file__).parent / "phrases"
"""Folder of the TOML files."""


@dataclass(frozen=True)
class Choices:
    """Alternatives for training, and those that only evaluation uses."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]

    def of(self, split: Split) -> tuple[str, ...]:
        """The alternatives of a split."""
        return self.train if split == "train" else self.heldout


@dataclass(frozen=True)
class Phrasebook:
    """All templates of one language; `questions` and `answers` by task and variant, `steps` by task and key."""

    questions: dict[tuple[str, str], Choices]
    answers: dict[tuple[str, str], str]
    steps: dict[tuple[str, str], str]
    names: Choices
    pseudo_names: tuple[str, ...]
    items: Choices
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    explain: tuple[str, ...]
    explain_thinking: tuple[str, ...]
    statements: tuple[str, ...]
    reverse_questions: tuple[str, ...]
    reverse_answer: str
    between_sentences: str


@dataclass(frozen=True)
class Country:
    """A country: its English name as key, and per language the template fields `country`, `capital`, `of_country`."""

    key: str
    heldout: bool
    fields: dict[str, dict[str, str]]


@cache
def phrasebook(language: str) -> Phrasebook:
    """The phrases of a language, by its BCP-47 tag."""
    raw = _read(language)
    questions: dict[tuple[str, str], Choices] = {}
    answers: dict[tuple[str, str], str] = {}
    steps: dict[tuple[str, str], str] = {}
    for task, section in raw.items():
        if not isinstance(section, dict):
            continue
        steps.update({(task, key): template for key, template in section["steps"].items()})
        for variant, table in section.items():
            if not isinstance(table, dict) or variant == "steps":
                continue
            questions[task, variant] = Choices(tuple(table["questions"]), tuple(table["heldout_questions"]))
            answers[task, variant] = table["answer"] if "answer" in table else section["answer"]
    capital = raw["capital"]
    names = Choices(tuple(raw["names"]), tuple(raw["heldout_names"]))
    return Phrasebook(
        questions=questions,
        answers=answers,
        steps=steps,
        names=names,
        pseudo_names=_splice(names),
        items=Choices(tuple(raw["items"]), tuple(raw["heldout_items"])),
        openers=tuple(raw["openers"]),
        closers=tuple(raw["closers"]),
        explain=tuple(raw["explain"]),
        explain_thinking=tuple(raw.get("explain_thinking", ())),
        statements=tuple(capital["statements"]),
        reverse_questions=tuple(capital["reverse_questions"]),
        reverse_answer=capital["reverse_answer"],
        between_sentences=raw["between_sentences"],
    )


@cache
def words() -> Choices:
    """The words whose letters are counted."""
    raw = _read("words")
    return Choices(tuple(raw["training"]), tuple(raw["heldout"]))


@cache
def countries() -> dict[str, Country]:
    """All countries by key."""
    result = {}
    for raw in _read("countries")["countries"]:
        fields: dict[str, dict[str, str]] = {}
        for language, capital in raw["capital"].items():
            fields[language] = {"country": raw["country"][language], "capital": capital}
            if f"{language}_of" in raw["country"]:
                fields[language]["of_country"] = raw["country"][f"{language}_of"]
        result[raw["key"]] = Country(raw["key"], raw.get("heldout", False), fields)
    return result


@cache
def country_keys() -> Choices:
    """The keys of the countries that training asks about, and of the held-out ones."""
    everything = countries().values()
    return Choices(
        tuple(country.key for country in everything if not country.heldout),
        tuple(country.key for country in everything if country.heldout),
    )


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((PHRASES / f"{name}.toml").read_text(encoding="utf-8"))


def _splice(names: Choices) -> tuple[str, ...]:
    """Invented names: the first half of one name and the second of another; none holds a held-out name."""
    halves = [_halves(name) for name in names.train]
    spliced = {head + tail: None for head, _ in halves for _, tail in halves}
    forbidden = [name.casefold() for name in names.heldout]
    return tuple(name for name in spliced if not any(part in name.casefold() for part in forbidden))


def _halves(name: str) -> tuple[str, str]:
    middle = len(name) // 2
    while middle < len(name) and not _may_split(name, middle):
        middle += 1
    return name[:middle], name[middle:]


def _may_split(name: str, at: int) -> bool:
    """A Devanagari vowel sign or conjunct must not be torn from its consonant."""
    return name[at].isalpha() and name[at - 1] != "\N{DEVANAGARI SIGN VIRAMA}"
