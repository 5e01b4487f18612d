"""Sentences, the language of each, and adherence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.languages import detect_language
from cluster.languages.openings import opening
from cluster.languages.sentences import adherence, sentence_languages, split_sentences

FRENCH = "Je cherche la lettre dans le mot proposé."
ENGLISH = "Now I will count the letters one by one."


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("It is 3.5 metres. Yes.", ["It is 3.5 metres.", "Yes."]),
        ("一です。二です！三？", ["一です。", "二です！", "三？"]),
        ("पहला वाक्य। दूसरा वाक्य।", ["पहला वाक्य।", "दूसरा वाक्य।"]),
        ("كيف حالك؟ بخير.", ["كيف حالك؟", "بخير."]),
        ("a line\n\nanother", ["a line", "another"]),
        ("He said “no.” Then left.", ["He said “no.", "” Then left."]),
        ("", []),
        (" \n ", []),
    ],
)
def test_sentences_end_with_a_mark_of_their_script(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


def test_a_switch_of_language_is_counted() -> None:
    found = adherence(f"{FRENCH} {FRENCH} {ENGLISH} {FRENCH}", "fr")
    assert (found.verdict, found.detected) == ("followed", "fr")
    assert (found.sentences, found.followed, found.undetermined, found.switches) == (4, 3, 0, 2)
    assert [tag for _, tag in sentence_languages(f"{FRENCH}\n{ENGLISH}")] == ["fr", "en"]


def test_what_cannot_be_told_is_neither() -> None:
    found = adherence(f"{FRENCH} 3 + 4 = 7. ok.", "fr")
    assert (found.sentences, found.undetermined, found.switches) == (1, 2, 0)
    assert adherence("17 + 25 = 42", "fr").verdict == "undetermined"
    assert adherence("", "ja").verdict == "undetermined"
    formula = adherence("x = (a + b) * (c + d) / 12345 - 67890 + abc + def", "en")
    assert formula.sentences == 0


def test_without_a_wish_the_whole_is_the_measure() -> None:
    found = adherence(f"{FRENCH} {FRENCH} {ENGLISH}", None)
    assert (found.verdict, found.requested, found.followed, found.switches) == ("not_requested", None, 2, 1)


def test_a_more_specific_language_follows_the_wish() -> None:
    text = "這個問題很簡單，我們來計算這些數字的總和。"
    assert adherence(text, "zh", {"zh", "zh-Hant", "en"}).verdict == "followed"
    assert (
        adherence("这个问题很简单，我们来计算这些数字的总和。", "zh-Hant", {"zh", "zh-Hant"}).verdict == "not_followed"
    )


@pytest.mark.parametrize("tag", ["en", "ja", "fr", "de", "es", "zh", "ko", "ar", "hi"])
def test_the_demos_thinking_is_in_its_language_sentence_by_sentence(tag: str) -> None:
    lines = Path("training/demo/data/train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [
        turn["thinking"]
        for record in map(json.loads, lines)
        if record["reasoning_language"] == tag
        for turn in record["messages"]
        if turn.get("thinking")
    ][:60]
    found = [adherence(text, tag) for text in texts]
    assert {each.verdict for each in found} == {"followed"}
    assert [each.detected for each in found] == [detect_language(text) for text in texts]
    sentences, followed = sum(each.sentences for each in found), sum(each.followed for each in found)
    assert sentences >= len(texts)
    assert followed >= 0.98 * sentences
    assert adherence(opening(tag) + " ".join(texts[:3]), tag).switches == 0
