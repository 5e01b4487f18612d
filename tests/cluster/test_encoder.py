"""The encoder's tokens are the tokenizer's, whatever the text and whatever was encoded before."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from cluster.harmony import Codec
from cluster.harmony import encoder as module
from cluster.harmony.encoder import Encoder, splits_before_words

SPACES = [" ", "  ", "\n", "\r\n", "\t", " ", "　", "\x1c", "\u2028", " \n ", "\v"]
PIECES = [
    "word",
    "WORD'S",
    "it's",
    "'ll",
    "don",
    "7",
    "1234567",
    "…!?",
    "//\n",
    "<|end|>",
    "日本語。",
    "हिन्दी",
    "السلام",
    "🙂‍↕️",
    "é",
]


def direct(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def test_gpt_oss_and_gpt_2_are_known_to_split_before_words(o200k: Codec) -> None:
    assert splits_before_words(o200k.tokenizer)
    assert splits_before_words(_byte_level())


@pytest.mark.parametrize("change", ["normalizer", "added token", "prefix space", "other pattern", "no pre-tokenizer"])
def test_other_tokenizers_are_left_alone(change: str) -> None:
    tokenizer = _byte_level()
    if change == "normalizer":
        tokenizer.normalizer = normalizers.NFC()
    elif change == "added token":
        tokenizer.add_tokens([AddedToken("a b", special=False)])
    elif change == "prefix space":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "other pattern":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        tokenizer = Tokenizer(models.BPE())
    assert not splits_before_words(tokenizer)


def _byte_level() -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    merges = [("a", "b"), ("Ġ", "a"), ("Ġa", "b")]
    vocabulary |= {left + right: len(letters) + number for number, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.one_of(st.sampled_from(SPACES + PIECES), st.text(max_size=4)), max_size=12).map("".join)))
def test_tokens_are_the_tokenizers(o200k: Codec, texts: list[str]) -> None:
    encoder = Encoder(o200k.tokenizer)
    expected = [direct(o200k.tokenizer, text) for text in texts]
    assert encoder.encode_all(texts) == expected
    assert encoder.encode_all(texts) == expected


def test_a_full_memory_begins_anew(o200k: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORDS_KEPT", 20)
    encoder = Encoder(o200k.tokenizer)
    rng = random.Random(0)
    for _ in range(50):
        texts = [" ".join(rng.choices(PIECES, k=12)) + f" {rng.random()} {'x' * 60}" for _ in range(3)]
        assert encoder.encode_all(texts) == [direct(o200k.tokenizer, text) for text in texts]
        assert len(encoder._known) < 60
