"""Suites that lie on the Hugging Face hub: read where one is reachable, never copied here."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from typing import Any

from cluster.config import ConfigError
from cluster.languages import resolve
from serving.evaluation.items import Item, parse_item

MGSM = "juletxara/mgsm"
THINKING = "HuggingFaceH4/Multilingual-Thinking"
MGSM_LANGUAGES = ("en", "es", "fr", "de", "ru", "zh", "ja", "th", "sw", "bn", "te")


def items(name: str, languages: list[str] | None) -> list[Item]:
    """The questions of a suite of `SUITES`.

    Args:
        languages: tags to fetch; None for all. A language that the suite lacks is passed over.

    Raises:
        ConfigError: no hub is reachable, or what it holds is no such suite.
    """
    try:
        return [parse_item(record, f"{name}, row {row}") for row, record in enumerate(SUITES[name](languages), start=1)]
    except ConfigError:
        raise
    except Exception as error:  # the hub's clients raise many kinds: of the network, of HTTP, of the files
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise ConfigError(
            f"--suite {name}: the hub cannot be read here ({reason}); give a JSONL file of items instead, or set "
            "HF_ENDPOINT to a mirror that is reachable"
        ) from None


def mgsm(languages: list[str] | None) -> Iterator[dict[str, Any]]:
    """MGSM's test problems, 250 in each language, human translations of GSM8K (Shi et al. 2022, arXiv:2210.03057)."""
    from huggingface_hub import hf_hub_download

    for tag in MGSM_LANGUAGES:
        if languages is not None and tag not in languages:
            continue
        path = hf_hub_download(MGSM, f"mgsm_{tag}.tsv", repo_type="dataset")
        with open(path, encoding="utf-8", newline="") as file:
            yield from mgsm_records(file.read(), tag)


def mgsm_records(table: str, tag: str) -> Iterator[dict[str, Any]]:
    """Records of one of MGSM's tables: a question and a number a row, without a head."""
    rows = csv.reader(io.StringIO(table), delimiter="\t", quoting=csv.QUOTE_NONE)
    for number, row in enumerate(rows, start=1):
        if len(row) != 2:
            raise ConfigError(f"{MGSM}, mgsm_{tag}.tsv, row {number}: {len(row)} columns instead of two")
        question, answer = row
        yield {
            "id": f"{tag}-{number}",
            "language": tag,
            "prompt": question,
            "answer": answer.replace(",", ""),
            "scorer": "number",
            "task": "word_problem",
            "validated": True,
        }


def thinking(languages: list[str] | None) -> Iterator[dict[str, Any]]:
    """Questions of Multilingual-Thinking. They are what the recipe trains on: adherence only, nothing is marked."""
    from datasets import load_dataset

    yield from thinking_records(load_dataset(THINKING, split="train"), languages)


def thinking_records(rows: Any, languages: list[str] | None) -> Iterator[dict[str, Any]]:
    """Records of the data set's rows, in the languages of the catalogue that are asked for."""
    for number, row in enumerate(rows, start=1):
        language = resolve(row["reasoning_language"])
        if language is None or (languages is not None and language.tag not in languages):
            continue
        yield {
            "id": f"{language.tag}-{number}",
            "language": language.tag,
            "prompt": row["user"],
            "answer_language": None,
            "scorer": "none",
            "task": "thinking",
        }


SUITES: dict[str, Callable[[list[str] | None], Iterator[dict[str, Any]]]] = {
    "mgsm": mgsm,
    MGSM: mgsm,
    THINKING: thinking,
}
"""names of suites on the hub; `mgsm` is short for the id"""
