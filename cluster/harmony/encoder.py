"""Text to tokens, quicker than the tokenizer alone: words that were seen before are looked up.

A pre-tokenizer of the GPT family never lets a piece reach over a single space that follows a visible character: the
space begins the next piece. So text may be cut there, and the words encoded by themselves, without changing a token.
Other tokenizers encode the text whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import chain
from threading import Lock

from tokenizers import Tokenizer, models

WORDS_KEPT = 1 << 18
LONGEST_WORD = 48
"""longer stretches without a space, such as sentences of Chinese, hardly ever come again"""
SHORT_LETTERS = 4096
"""of texts that are encoded in about a millisecond"""

_BEFORE_WORD = re.compile(r"(?<=\S)(?= \S)")
O200K = "|".join(
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""the pattern of o200k (openai/tiktoken, tiktoken_ext/openai_public.py), as gpt-oss's tokenizer.json has it"""


class Encoder:
    """Encodes text as `tokenizer.encode(text, add_special_tokens=False)` does, many texts at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.cuts_at_spaces = splits_before_words(tokenizer)
        self._known: dict[str, tuple[int, ...]] = {}
        self._lock = Lock()

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text. Short texts do not wait for long ones that another thread encodes."""
        wait = not _are_short(texts)
        if not self.cuts_at_spaces or not self._lock.acquire(blocking=wait):
            return [encoding.ids for encoding in self._encode(texts)]
        try:
            return self._look_up([_BEFORE_WORD.split(text) for text in texts])
        finally:
            self._lock.release()

    def _look_up(self, pieces: list[list[str]]) -> list[list[int]]:
        known = self._known
        new = list({piece: None for words in pieces for piece in words if piece not in known})
        if len(known) + len(new) > WORDS_KEPT:
            known.clear()
            new = list({piece: None for words in pieces for piece in words})
        known.update(zip(new, (tuple(encoding.ids) for encoding in self._encode(new)), strict=True))
        encoded = [list(chain.from_iterable(map(known.__getitem__, words))) for words in pieces]
        for piece in new:
            if len(piece) > LONGEST_WORD:
                del known[piece]
        return encoded

    def _encode(self, texts: Sequence[str]):  # type: ignore[no-untyped-def]
        if _are_short(texts):
            # A batch is handed to threads, and to wait for them takes longer than this.
            return [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)


def _are_short(texts: Sequence[str]) -> bool:
    return sum(map(len, texts)) <= SHORT_LETTERS


def splits_before_words(tokenizer: Tokenizer) -> bool:
    """Whether a piece of this tokenizer never reaches over a single space after a visible character.

    True for byte-level BPE with GPT-2's or o200k's pattern, without a normalizer and with no added tokens that are
    looked for in text.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    if (
        tokenizer.normalizer is not None
        or tokenizer.pre_tokenizer is None
        or not isinstance(tokenizer.model, models.BPE)
    ):
        return False
    if any(not token.special for token in added):
        return False
    steps = json.loads(tokenizer.pre_tokenizer.__getstate__())
    if steps.get("type") == "Sequence" and len(steps["pretokenizers"]) == 2:
        split, steps = steps["pretokenizers"]
        known = split.get("type") == "Split" and split["pattern"].get("Regex") == O200K and not split["invert"]
        return known and split["behavior"] == "Isolated" and steps["type"] == "ByteLevel" and not steps["use_regex"]
    return steps.get("type") == "ByteLevel" and bool(steps["use_regex"]) and not steps["add_prefix_space"]
