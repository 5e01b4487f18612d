"""Numerals of Chinese, Japanese and Korean: `四十二`, `3万5千`, `2억 5천만`."""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 300
"""characters of a numeral that is read"""

_ONES = {
    character: value
    for value, characters in enumerate(("〇零", "一壱", "二兩两弐", "三参", *"四五六七八九"))
    for character in characters
}
_TENS = {"十": 10, "拾": 10, "百": 100, "千": 1000, "십": 10, "백": 100, "천": 1000}
_MYRIADS = {"万": 10**4, "萬": 10**4, "만": 10**4, "亿": 10**8, "億": 10**8, "억": 10**8, "兆": 10**12}
_UNITS = "".join((*_TENS, *_MYRIADS))
_MIXED = re.compile(
    rf"(?<![\d.,])\d[\d,]*(?:\.\d+)?[{_UNITS}](?:\s?\d[\d,]*(?:\.\d+)?[{_UNITS}]|[{_UNITS}])*(?:\s?\d+(?![\d.,]))?"
)
"""digits with multipliers; what follows the last of them may be bare digits"""
_PURE = re.compile(rf"[{''.join(_ONES)}十百千万萬亿億兆]+(?:点[{''.join(_ONES)}]+)?")
_PIECE = re.compile(rf"(\d[\d,]*(?:\.\d+)?)|([{''.join(_ONES)}])|([{''.join(_TENS)}])|([{''.join(_MYRIADS)}])")


def cjk_value(text: str) -> str | None:
    """`text` with its numerals as decimal digits; None where it holds none.

    Numerals without any digit are read only in a text that has no digits at all, since 一 is in words too.
    """
    if any(character in text for character in _UNITS):
        read = _MIXED.sub(lambda found: _mixed(found[0]), text)
        if read != text:
            return read
    if any(character.isdecimal() for character in text):
        return None
    read = _PURE.sub(lambda found: _pure(found[0]), text)
    return read if read != text else None


def _mixed(numeral: str) -> str:
    return numeral if len(numeral) > LONGEST else _written(_value(numeral))


def _pure(numeral: str) -> str:
    whole, _, decimals = numeral.partition("点")
    digits = "".join(str(_ONES[character]) for character in decimals)
    if all(character in _ONES for character in whole):
        read = "".join(str(_ONES[character]) for character in whole)
    else:
        read = _written(_value(whole))
    return f" {read}{'.' + digits if digits else ''} "


def _value(numeral: str) -> Fraction:
    """Of tens within myriads; a multiplier without a digit before it counts once."""
    total, section, digits = Fraction(0), Fraction(0), None
    for number, one, ten, myriad in _PIECE.findall(numeral):
        if number:
            digits = Fraction(number.replace(",", ""))
        elif one:
            digits = Fraction(_ONES[one])
        elif ten:
            section += (1 if digits is None else digits) * _TENS[ten]
            digits = None
        else:
            section += digits or 0
            total += (section or 1) * _MYRIADS[myriad]
            section, digits = Fraction(0), None
    return total + section + (digits or 0)


def _written(value: Fraction) -> str:
    """In digits; the values are multiples of a power of ten."""
    if value.denominator == 1:
        return str(value.numerator)
    whole, rest = divmod(value, 1)
    decimals = str(rest.numerator * 10**12 // rest.denominator).rjust(12, "0").rstrip("0")
    return f"{whole}.{decimals or '0'}"
