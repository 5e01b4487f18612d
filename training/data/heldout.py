"""In which language each held-out document was asked to think, told from its own tokens, and the rows with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from cluster.harmony import Codec, Label
from cluster.languages import UNDETERMINED, declared_language

INSTRUCTED = (Label.SYSTEM, Label.DEVELOPER)
SPECIAL = re.compile(r"<\|[a-z]+\|>")


class HeldOut(NamedTuple):
    """Held-out rows, and the tags that their column `languages` gives the places of."""

    rows: Dataset
    languages: tuple[str, ...]


def with_languages(rows: Dataset, base: Path) -> HeldOut:
    """Held-out rows with a column `languages`, for each document of a row the place of its language among those that
    are returned beside them: tags, sorted, with `und` for documents that ask for none.

    Where no document asks for a language the rows come back as they are, and no tag.

    Args:
        rows: as `training.data.shards.read_shards` gives them.
        base: checkpoint folder, for its tokenizer.
    """
    codec = Codec.from_folder(base)
    tags = [[_language(codec, *document) for document in documents_of(row)] for row in rows]
    names = tuple(sorted({tag for row in tags for tag in row}))
    if names in ((), (UNDETERMINED,)):
        return HeldOut(rows, ())
    return HeldOut(rows.add_column("languages", [[names.index(tag) for tag in row] for row in tags]), names)


def documents_of(row: Mapping[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and labels of each document of a row."""
    ends = np.cumsum(row["lengths"])[:-1]
    return zip(*(np.split(np.asarray(row[name]), ends) for name in ("tokens", "labels")), strict=True)


def _language(codec: Codec, tokens: np.ndarray, labels: np.ndarray) -> str:
    """Of the last instruction that names one; what a user or the model wrote is none."""
    text = codec.decode(tokens[np.isin(labels, INSTRUCTED)].tolist())
    found = (declared_language(message) for message in reversed(SPECIAL.split(text)))
    return next((tag for tag in found if tag), UNDETERMINED)
