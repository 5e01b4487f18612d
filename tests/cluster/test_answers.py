"""Numbers as the world writes them, and words that are the same."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.answers import final_number, holds_name, normalised, read_number, read_numbers, same_number


@pytest.mark.parametrize(
    ("text", "language", "value"),
    [
        ("1,234.5", "en", "1234.5"),
        ("1.234,5", "de", "1234.5"),
        ("1.234,5", "en", "1234.5"),
        ("1 234,5", "fr", "1234.5"),
        ("1\u202f234,5", "en", "1234.5"),
        ("1’234.50", "de", "1234.5"),
        ("1,23,456.7", "hi", "123456.7"),
        ("1.234.567,89", "es", "1234567.89"),
        ("1,234", "en", "1234"),
        ("1,234", "de", "1.234"),
        ("1.234", "de", "1234"),
        ("1.234", "en", "1.234"),
        ("0,125", "en", "0.125"),
        ("0.125", "de", "0.125"),
        ("24,9", "en", "24.9"),
        (".5", None, "0.5"),
        ("١٬٢٣٤٫٥", "ar", "1234.5"),
        ("۱۲۳", "fa", "123"),
        ("१,२३,४५६", "hi", "123456"),
        ("৪২", "bn", "42"),
        ("๔๒", "th", "42"),
        ("１，２３４．５", "ja", "1234.5"),
        ("四十二", "ja", "42"),
        ("二〇二四", "ja", "2024"),
        ("三点一四", "zh", "3.14"),
        ("3万5千", "ja", "35000"),
        ("1億2,345万円", "ja", "123450000"),
        ("1.5万", "zh", "15000"),
        ("2억 5천만", "ko", "250000000"),
        ("3/4", None, "3/4"),
        ("2 1/2", None, "5/2"),
        ("1 1/2", None, "3/2"),
        ("2½", None, "5/2"),
        ("⅓", None, "1/3"),
        (r"\frac{3}{4}", None, "3/4"),
        (r"-2\frac{3}{4}", None, "-11/4"),
        ("1{,}234", None, "1234"),
        ("1.5e6", None, "1500000"),
        ("3 × 10^5", None, "300000"),
        (r"3 \times 10^{-2}", None, "3/100"),
        ("3×10⁻²", None, "3/100"),
        ("−7 °C", None, "-7"),
        ("$1,234.50", "en", "1234.5"),
        ("20 000 €", "fr", "20000"),
        ("5 cm²", None, "5"),
    ],
)
def test_a_number_is_read(text: str, language: str | None, value: str) -> None:
    found = read_number(text, language)
    assert found is not None
    assert found.readings[0] == Fraction(value)


@pytest.mark.parametrize(
    ("text", "language", "values"),
    [
        ("1,2,3", None, ["1", "2", "3"]),
        ("version 3.4.5", None, ["3", "4", "5"]),
        ("12/5/2020", None, ["12", "5", "2020"]),
        ("3:45", None, ["3", "45"]),
        ("10-3 = 7", None, ["10", "3", "7"]),
        ("en 2020 100 personnes", "fr", ["2020", "100"]),
        ("gpt-5", None, ["5"]),
        ("50%-60%", None, ["50", "60"]),
        ("一步一步地想，答案是42", "zh", ["42"]),
        ("5/0", None, []),
        ("none at all", None, []),
        ("9" * 400, None, []),
        ("1e99999", None, []),
    ],
)
def test_numbers_of_a_text(text: str, language: str | None, values: list[str]) -> None:
    assert [number.readings[0] for number in read_numbers(text, language)] == [Fraction(value) for value in values]


def test_the_final_number_is_in_a_box_behind_hashes_or_last() -> None:
    for text in (
        r"So \boxed{42} of 50.",
        "It is 3.\n#### 42",
        "6 times 7 is 42.",
        r"\boxed{1} \boxed{\text{42 cm}} 5",
        "42\n#### Done",
    ):
        found = final_number(text)
        assert found is not None
        assert found.value == 42
    assert final_number("no idea") is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("45 %", "45", True),
        ("45 %", "0.45", True),
        ("45%", "٤٥٪", True),
        ("0.45", "45", False),
        ("45 %", "0.45 %", False),
        ("3/4", "0.75", True),
        ("1/3", "0.333", False),
        ("1.234", "1234", True),
        ("1.234", "1.234", True),
        ("1.234", "12.34", False),
        ("-5", "5", False),
    ],
)
def test_numbers_that_agree(one: str, other: str, same: bool) -> None:
    left, right = read_number(one), read_number(other)
    assert left is not None
    assert right is not None
    assert same_number(left, right) is same
    assert same_number(right, left) is same


def test_a_tolerance_is_absolute() -> None:
    third, near = read_number("1/3"), read_number("0.333")
    assert third is not None
    assert near is not None
    assert same_number(third, near, Fraction(1, 1000))
    assert not same_number(third, near, Fraction(1, 10000))


SCRIPTS = {"en": "0", "ar": "٠", "hi": "०", "bn": "০", "th": "๐", "ja": "０"}


@given(st.integers(-(10**12), 10**12), st.sampled_from(sorted(SCRIPTS)), st.booleans())
def test_whole_numbers_come_back_from_any_script(value: int, language: str, grouped: bool) -> None:
    written = f"{value:,}" if grouped else str(value)
    first = ord(SCRIPTS[language])
    text = "".join(chr(first + int(each)) if each.isdigit() else each for each in written)
    found = read_number(f"= {text}", language)
    assert found is not None
    assert value in found.readings


@settings(max_examples=300)
@given(
    st.text(alphabet="0123456789.,/٫٬ '-+e×10^%½万千十一二\\boxedfrac{}#٪", max_size=60),
    st.sampled_from(["ja", "fr", "de", None]),
)
def test_no_text_breaks_the_reader(text: str, language: str | None) -> None:
    for number in read_numbers(text, language):
        assert number.readings
    final_number(text, language)


@pytest.mark.parametrize(
    "piece", ["1", "1,", "1 ", "1/", "\\frac{1}{2}", "\\boxed{", "万", "1万", "一", "{", "- ", "1.1,"]
)
def test_long_texts_take_time_in_proportion(piece: str) -> None:
    began = time.perf_counter()
    final_number(piece * 20_000, "ja")
    assert time.perf_counter() - began < 10


def test_names_and_normalised_words() -> None:
    assert holds_name("The capital is NAIROBI.", "Nairobi")
    assert not holds_name("Das ist romantisch.", "Rom")
    assert holds_name("首都はナイロビです。", "ナイロビ")
    assert normalised("  Ｎairobi,  Kenya! ") == "nairobi kenya"
    assert normalised("مُحَمَّـد") == normalised("محمد")
    assert normalised("-5") != normalised("5")
    with pytest.raises(ValueError, match="empty"):
        holds_name("anything", "")
