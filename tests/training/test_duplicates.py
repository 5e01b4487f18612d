"""Duplicates: exact and near ones are found among others, as often as their similarity promises."""

from __future__ import annotations

import random

import numpy as np
import pytest

from training.data.duplicates import DuplicateIndex, shingles, signature


@pytest.mark.parametrize(
    "letters", ["abcdefghijklmnopqrstuvwxyz  ", "天地玄黄宇宙洪荒日月盈昃辰宿列張寒来暑往秋収冬蔵閏余成歳"]
)
def test_near_duplicates(letters: str) -> None:
    draw = random.Random(5)
    texts = ["".join(draw.choices(letters, k=400)) for _ in range(50)]
    changed = f"{texts[7][:200]}Z{texts[7][201:]}"
    index = DuplicateIndex()
    for number, text in enumerate([*texts, changed]):
        index.add([number], text)
    (pair,) = index.find()
    assert (pair.later, pair.earlier, pair.exact) == (50, 7, False)
    assert pair.similarity == pytest.approx(0.975, abs=0.05)


def pair_of(similarity: float, draw: random.Random) -> tuple[str, str]:
    """Two texts with about that share of 5-grams in common: the second repeats the first but for its end."""
    length = 400
    kept = round(length * 2 * similarity / (1 + similarity))
    first = "".join(map(chr, draw.choices(range(0x4E00, 0x9000), k=length)))
    return first, first[:kept] + "".join(map(chr, draw.choices(range(0x4E00, 0x9000), k=length - kept)))


@pytest.mark.parametrize(("similarity", "least", "most"), [(0.95, 90, 100), (0.9, 30, 75), (0.8, 0, 3), (0.75, 0, 0)])
def test_how_many_near_duplicates_are_found_by_similarity(similarity: float, least: int, most: int) -> None:
    """Of a hundred pairs: what the docstring of `duplicates` promises."""
    draw, index = random.Random(3), DuplicateIndex()
    for number in range(100):
        for half, text in enumerate(pair_of(similarity, draw)):
            index.add([number, half], text)
    assert least <= len(index.find()) <= most


def test_near_duplicates_have_the_words_in_common_not_the_words_of_a_template() -> None:
    index = DuplicateIndex()
    for number, animal in enumerate(["hedgehog", "crocodile", "albatross"]):
        index.add([number], f"How many legs does a {animal} have? The {animal} is known to me: I count its legs.")
    assert index.find() == []


def test_signature_sees_neither_case_nor_white_space_and_takes_any_text() -> None:
    (bands, bits), (same_bands, same_bits) = signature("Le  ciel\n est bleu."), signature("le ciel est BLEU. ")
    assert np.array_equal(bands, same_bands)
    assert np.array_equal(bits, same_bits)
    assert len(shingles("")) == len(shingles("abc")) == 1
    assert len(shingles("".join(map(chr, range(0x4E00, 0x6E00))))) == 1024
