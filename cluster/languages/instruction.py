"""How the wish for a reasoning language is written into a prompt: the one place that decides, and its inverse."""

from __future__ import annotations

import re
from typing import Literal

from cluster.languages.catalogue import CATALOGUE, resolve

InstructionForm = Literal["english", "japanese"]
"""A wording of the instruction; a model must be asked in the one that it was trained on.

- `english`: `reasoning language: French`, as the system messages of HuggingFaceH4/Multilingual-Thinking say it.
- `japanese`: `推論言語: フランス語`, as the Japanese fine-tuning recipe says it that Raysoner grew from.
"""

INSTRUCTION = re.compile(r"^[^\S\n]*(?:reasoning language|推論言語)[^\S\n]*[:：](.*)$", re.MULTILINE | re.IGNORECASE)
"""a line that asks for a reasoning language, in either form; its group is the language as it is written"""


def reasoning_instruction(tag: str, form: InstructionForm = "english") -> str:
    """The developer instruction that asks for thinking in a language.

    Args:
        tag: a tag of `CATALOGUE`; `find_language` has it for a user's wish.
        form: which wording.
    """
    language = CATALOGUE[tag]
    if form == "japanese":
        return f"推論言語: {language.japanese_name}"
    return f"reasoning language: {language.name}"


def declared_language(text: str) -> str | None:
    """The tag of the language that a developer or system text asks to think in; the inverse of `reasoning_instruction`.

    The first line that starts with an instruction decides, in either form and any case, with a full-width colon too.
    The language may be named in any way that `find_language` knows.

    Returns:
        None where there is no instruction, or where it names no language of the catalogue.
    """
    instruction = INSTRUCTION.search(text)
    language = resolve(instruction[1].strip().rstrip(".。")) if instruction else None
    return language.tag if language else None
