"""Numbers in running text, in any script's digits and in the formats that languages write them in.

Understood are decimal digits of every script; `1,234.5`, `1.234,5`, `1 234,5`, `1'234.5`, `1,23,456.7` and `١٬٢٣٤٫٥`;
signs; percentages; fractions as `3/4`, `2 1/2`, `2½` and `\\frac{3}{4}`; `1.5e6` and `3 × 10^5`; the multipliers of
Chinese, Japanese and Korean as in `3万5千`; and numerals of the first two such as `四十二`, in a text without digits.

Of `1.234` the language decides whether it is a thousand or one; the other reading is kept beside it, since models write
numbers of one language in sentences of another.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from typing import NamedTuple

from cluster.answers.numerals import cjk_value

LONGEST_DIGITS = 300
"""of one number; what is longer is none: reading it would take longer than it is worth"""
LARGEST_EXPONENT = 300

_DECIMAL_COMMA = frozenset(
    (
        *("fr", "de", "es", "pt", "pt-BR", "it", "nl", "pl", "ru", "uk", "tr", "vi", "id", "sv", "da", "nb", "fi"),
        *("cs", "sk", "hu", "ro", "bg", "el", "hr", "sr", "sl", "lt", "lv", "et", "ca"),
    )
)
_SPACED_GROUPS = frozenset(["fr", "pt", "ru", "uk", "sv", "nb", "fi", "cs", "sk", "pl", "hu", "bg", "lt", "lv", "et"])
_IDEOGRAPHIC = frozenset({"ja", "zh", "zh-Hant", "ko"})

_DIGITS = {
    code: str(unicodedata.decimal(chr(code))) for code in range(128, sys.maxunicode + 1) if chr(code).isdecimal()
}
_PLAIN = (
    _DIGITS
    | {ord(each): "." for each in "．｡"}
    | {ord(each): "-" for each in "−－﹣"}
    | {ord("／"): "/", ord("⁄"): "/"}
)
"""digits of all scripts, and signs that are written otherwise in some of them"""
_GROUPS = "٬'’，\u00a0\u202f\u2009"
"""marks between groups of three digits and nowhere else in a number"""
_VULGAR = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_LATEX_FRACTION = re.compile(r"(\d?)\s*\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\}|\{[^{}]*\{[^{}]*\}[^{}]*\})*)\}")


class Number(NamedTuple):
    """A number that was read. `readings` holds its value, and where the format is ambiguous its other value.

    Of a percentage the values are those before the sign: 45 for `45 %`.
    """

    readings: tuple[Fraction, ...]
    percent: bool = False

    @property
    def value(self) -> Fraction:
        """As the language reads it."""
        return self.readings[0] / 100 if self.percent else self.readings[0]


def read_numbers(text: str, language: str | None = None) -> list[Number]:
    """All numbers of a text, in its order.

    Args:
        text: up to some thousand characters.
        language: tag of `cluster.languages.CATALOGUE` of the language that it is written in; None reads as English.
    """
    return list(_found(text, language))


def read_number(text: str, language: str | None = None) -> Number | None:
    """The number that `text` is, with a currency or a unit at most; None where it holds none, or several."""
    found = read_numbers(text, language)
    return found[0] if len(found) == 1 else None


def final_number(text: str, language: str | None = None) -> Number | None:
    r"""The number that a text ends up with: in its last `\boxed{}`, behind its last `####`, or the last of all."""
    places = [text]
    if "####" in text:
        places.insert(0, text.rpartition("####")[2])
    if "\\boxed" in text:
        places[:0] = _BOXED.findall(text)[-1:]
    lasts = (next(iter(deque(_found(place, language), maxlen=1)), None) for place in places)
    return next(filter(None, lasts), None)


def same_number(one: Number, other: Number, tolerance: Fraction = Fraction(0)) -> bool:
    """Whether two numbers agree in one of their readings, to within an absolute tolerance.

    A percentage agrees with a bare number that is either the count of hundredths or the share: `45 %` with 45 and 0.45.
    """
    for left in one.readings:
        for right in other.readings:
            if abs(left - right) <= tolerance:
                return True
            if one.percent != other.percent:
                share, bare = (left, right) if one.percent else (right, left)
                if abs(share / 100 - bare) <= tolerance:
                    return True
    return False


def _found(text: str, language: str | None) -> Iterator[Number]:
    if not text.isascii():
        text = text.translate(_PLAIN)
    if "\\" in text:
        text = _LATEX_FRACTION.sub(lambda found: f"{found[1] and found[1] + ' '}{found[2]}/{found[3]}", text)
    if "{,}" in text:
        text = text.replace("{,}", ",")
    if language in _IDEOGRAPHIC and (read := cjk_value(text)):
        text = read
    for found in _pattern(language in _SPACED_GROUPS).finditer(text):
        yield from _read(found, language)


@cache
def _pattern(spaced: bool) -> re.Pattern[str]:
    groups = _GROUPS + (" " if spaced else "")
    return re.compile(
        rf"""
        (?P<dated>(?<=\d/))?
        (?P<sign>(?<![\w.,)\]%٪％])[-+])?
        (?:
          (?P<body>(?<![.\d])\.\d+|\d+(?:(?:[.,٫](?=\d)|(?<!\d\d\d\d)[{groups}](?=\d{{3}}(?!\d)))\d+)*)
          (?:\s?(?P<part>[{_VULGAR}])|\s+(?P<above>\d+)/(?P<below>\d+)(?![\d/])|(?(dated)(?!)|\s?/\s?(?P<divisor>\d+)(?!\s?/\s?\d|\d)))?
          (?:[eE](?P<exponent>[-+]?\d+)(?!\w)
            |\s?(?:[×x·*]|\\times|\\cdot)\s?10\s?(?:(?:\^|\*\*)\s?\{{?(?P<power>[-+]?\d+)\}}?|(?P<raised>[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)))?
          |(?P<alone>[{_VULGAR}])
        )
        (?P<percent>\s?\\?[%٪％﹪])?
        """,
        re.VERBOSE,
    )


def _read(found: re.Match[str], language: str | None) -> Iterator[Number]:
    """The number of a match; several where it is a list without spaces, such as `1,2,3`."""
    sign = -1 if found["sign"] == "-" else 1
    percent = found["percent"] is not None
    if found["alone"]:
        yield Number((sign * _vulgar(found["alone"]),), percent)
        return
    *before, last = _readings(found["body"], language)
    for values in before:
        yield Number(values)
    if not last:
        return
    if before:
        sign = 1
    if found["part"]:
        last = tuple(value + _vulgar(found["part"]) for value in last)
    below = found["divisor"] or found["below"]
    if below and (len(below) > LONGEST_DIGITS or len(found["above"] or "") > LONGEST_DIGITS or int(below) == 0):
        return
    if found["divisor"]:
        last = tuple(value / int(below) for value in last)
    elif below:
        last = tuple(value + Fraction(int(found["above"]), int(below)) for value in last)
    exponent = found["exponent"] or found["power"] or (found["raised"] or "").translate(_SUPERSCRIPTS)
    if exponent:
        if len(exponent) > 4 or abs(int(exponent)) > LARGEST_EXPONENT:
            return
        last = tuple(value * Fraction(10) ** int(exponent) for value in last)
    yield Number(tuple(sign * value for value in last), percent)


def _readings(body: str, language: str | None) -> list[tuple[Fraction, ...]]:
    """What digits with marks between them may mean: one number, or the members of a list."""
    if len(body) > LONGEST_DIGITS:
        return [()]
    if body.isdecimal():
        return [(Fraction(int(body)),)]
    for mark in (*_GROUPS, " "):
        body = body.replace(mark, "\0") if mark in body else body
    if body.startswith("."):
        return [(Fraction(f"0{body}"),)]
    if "٫" in body:
        whole, _, rest = body.rpartition("٫")
        return [(_decimal(whole, rest),)]
    points, commas, others = body.count("."), body.count(","), body.count("\0")
    if not points and not commas:
        return [(Fraction(int(body.replace("\0", ""))),)]
    last = max(body.rfind("."), body.rfind(","))
    mark, whole, rest = body[last], body[:last], body[last + 1 :]
    if "\0" in rest:
        return [_plain(part) for part in re.split(r"[.,\0]", body)]
    if (points and commas) or (others and points + commas == 1):
        if body.count(mark) == 1 and _is_grouped(whole):
            return [(_decimal(whole, rest),)]
    elif points + commas > 1:
        if _is_grouped(body):
            return [(Fraction(int(re.sub(r"\D", "", body))),)]
    elif len(rest) == 3 and len(whole) <= 3 and not whole.startswith("0"):
        decimal, grouped = _decimal(whole, rest), Fraction(int(whole + rest))
        is_decimal = mark == ("," if language in _DECIMAL_COMMA else ".")
        return [(decimal, grouped) if is_decimal else (grouped, decimal)]
    else:
        return [(_decimal(whole, rest),)]
    return [_plain(part) for part in re.split(r"[.,\0]", body)]


def _is_grouped(digits: str) -> bool:
    """Whether marks of one kind stand between groups of three, or of two before the last three as in India."""
    return (
        re.fullmatch(r"\d{1,3}(?:([.,\0])\d{3}(?:\1\d{3})*)|\d{1,2}(?:(,)\d{2}(?:,\d{2})*)?,\d{3}|\d+", digits)
        is not None
    )


def _plain(digits: str) -> tuple[Fraction, ...]:
    return (Fraction(int(digits)),)


def _decimal(whole: str, rest: str) -> Fraction:
    digits = re.sub(r"\D", "", whole)
    return Fraction(int(digits + rest), 10 ** len(rest))


def _vulgar(character: str) -> Fraction:
    return Fraction(unicodedata.numeric(character)).limit_denominator(8)
