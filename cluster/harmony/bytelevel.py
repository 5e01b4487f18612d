"""The bytes that tokens of a byte-level vocabulary stand for."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF_LETTER = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
"""Byte-level BPE writes bytes as letters: printable ones as they are, the others from U+0100 on.

As `bytes_to_unicode` in openai/gpt-2, src/encoder.py.
"""
TOKENIZERS_KEPT = 8


class TokenBytes(dict[int, bytes]):
    """The bytes of each token, found when first asked for; an id outside the vocabulary has none.

    From bytes a letter is known to be cut, or broken for good, by itself. `tokenizers.DecodeStream` decodes all that
    it holds back again with every token, and holds back as long as the text ends in U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> bytes:
        try:
            piece = self._tokenizer.id_to_token(token) or ""
        except OverflowError:
            piece = ""
        self[token] = spelled_bytes(piece) or piece.encode()
        return self[token]


def spelled_bytes(piece: str) -> bytes | None:
    """The bytes that a vocabulary's `piece` spells, or None where it is text as it stands, as control tokens are."""
    if any(letter not in BYTE_OF_LETTER for letter in piece):
        return None
    return bytes(BYTE_OF_LETTER[letter] for letter in piece)


@lru_cache(TOKENIZERS_KEPT)
def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """The bytes of a tokenizer's tokens, shared by all that ask.

    Raises:
        ValueError: the tokenizer is not byte-level.
    """
    if not isinstance(tokenizer.decoder, ByteLevel):
        raise ValueError("the tokenizer is not byte-level: it is not a Harmony tokenizer")
    return TokenBytes(tokenizer)
