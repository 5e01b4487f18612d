"""Languages: wishes are found or refused with what there is; detection names each, and admits when it cannot."""

from __future__ import annotations

import pytest

from cluster.languages import LANGUAGES, UNDETERMINED, detect_language, find_language, reasoning_instruction

SENTENCES = [
    ("en", "First I add the two numbers, then I check the result once more."),
    ("en", "There are three apples left, so the answer is three."),
    ("ja", "まず二つの数を足して、それから結果を確かめます。"),
    ("ja", "りんごが三個残っているので、答えは三です。"),
    ("ja", "東京都知事選挙投票日変更は未定"),
    ("ja", "コンピューターは計算が速い"),
    ("fr", "D'abord j'additionne les deux nombres, puis je vérifie le résultat."),
    ("fr", "Il reste trois pommes, donc la réponse est trois."),
    ("de", "Zuerst addiere ich die beiden Zahlen, dann prüfe ich das Ergebnis."),
    ("de", "Es bleiben drei Äpfel übrig, also ist die Antwort drei."),
    ("es", "Primero sumo los dos números y luego compruebo el resultado."),
    ("es", "Quedan tres manzanas, así que la respuesta es tres."),
    ("zh", "首先把两个数字相加,然后再检查一遍结果。"),
    ("zh", "還剩三個蘋果,所以答案是三。"),
    ("ko", "먼저 두 수를 더한 다음 결과를 다시 확인합니다."),
    ("ko", "사과가 세 개 남았으므로 답은 셋입니다."),
    ("ar", "أولا أجمع العددين ثم أتحقق من النتيجة مرة أخرى."),
    ("ar", "بقيت ثلاث تفاحات، إذن الجواب هو ثلاثة."),
    ("hi", "पहले मैं दोनों संख्याओं को जोड़ता हूँ, फिर परिणाम की जाँच करता हूँ।"),
    ("hi", "तीन सेब बचे हैं, इसलिए उत्तर तीन है।"),
]


@pytest.mark.parametrize("tag", LANGUAGES)
def test_found_by_every_name(tag: str) -> None:
    language = LANGUAGES[tag]
    wishes = (
        tag,
        tag.upper(),
        language.name,
        language.name.upper(),
        language.native_name,
        f"  {language.name.lower()} ",
    )
    assert [find_language(wish) for wish in wishes] == [language] * len(wishes)


@pytest.mark.parametrize(
    ("wish", "tag"), [("fr-CA", "fr"), ("en_US", "en"), ("zh-Hant-TW", "zh"), ("ES-mx", "es"), ("Français", "fr")]
)
def test_found_by_region(wish: str, tag: str) -> None:
    assert find_language(wish).tag == tag


@pytest.mark.parametrize("wish", ["", "tlh", "Klingon", "french fries", "fra", "-fr"])
def test_unknown_wish_names_what_there_is(wish: str) -> None:
    with pytest.raises(ValueError, match="is unknown") as caught:
        find_language(wish)
    assert repr(wish) in str(caught.value)
    for tag, language in LANGUAGES.items():
        assert f"{tag} ({language.name})" in str(caught.value)


def test_nine_languages_with_their_own_tags() -> None:
    assert set(LANGUAGES) == {"en", "ja", "fr", "de", "es", "zh", "ko", "ar", "hi"} == {tag for tag, _ in SENTENCES}
    assert all(language.tag == tag for tag, language in LANGUAGES.items())


@pytest.mark.parametrize(("tag", "text"), SENTENCES)
def test_detected(tag: str, text: str) -> None:
    assert detect_language(text) == tag


@pytest.mark.parametrize(("tag", "text"), SENTENCES)
def test_detected_beside_numbers_and_a_foreign_word(tag: str, text: str) -> None:
    assert detect_language(f"12 × (3 + 4) = 84. {text} OK? 84!\n") == tag


@pytest.mark.parametrize("text", ["", "  \n", "42", "3 × 4 = 12", "!?…", "x = y", "Привет, как твои дела сегодня?"])
def test_too_little_or_none_of_ours_is_undetermined(text: str) -> None:
    assert detect_language(text) == UNDETERMINED == "und"


def test_the_script_with_most_letters_decides() -> None:
    assert detect_language("The Japanese word for apple is りんご, and it is a common word there.") == "en"
    assert detect_language("「apple」という英語の単語は、日本語ではりんごと言います。") == "ja"


@pytest.mark.parametrize(
    ("tag", "instruction"), [("fr", "reasoning language: French"), ("ja", "reasoning language: Japanese")]
)
def test_instruction(tag: str, instruction: str) -> None:
    assert reasoning_instruction(tag) == instruction
