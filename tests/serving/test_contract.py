"""The serving contract and the counting of a completion, without HTTP."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from cluster.harmony import CHANNEL, MESSAGE, Message
from serving.completion import Completion
from serving.config import ServingConfig
from serving.contract import Verdict, judge, to_conversation
from tests.serving.harness import CODEC, answer, spell

USER = Message(role="user", content="Hello")


def test_without_a_wish_nothing_is_added() -> None:
    assert to_conversation([USER], "low", None).messages == (USER,)


def test_instruction_alone_is_the_whole_developer_message() -> None:
    first, second = to_conversation([USER], "low", "fr").messages
    assert first == Message(role="developer", content="reasoning language: French")
    assert second == USER


@pytest.mark.parametrize("role", ["system", "developer"])
def test_instruction_goes_before_the_text(role: str) -> None:
    own = Message.model_validate({"role": role, "content": "Be brief."})
    other = Message(role="developer", content="Be kind.")
    first, second, third = to_conversation([own, other, USER], "high", "German").messages
    assert (first.role, first.content) == (role, "reasoning language: German\n\nBe brief.")
    assert (second, third) == (other, USER)


def test_instruction_comes_in_the_form_asked_for() -> None:
    assert to_conversation([USER], "low", "fr", "japanese").messages[0].content == "推論言語: フランス語"


def test_the_form_is_a_setting_of_the_model() -> None:
    assert ServingConfig.model_validate({"model": {"path": "x"}}).model.instruction_form == "english"
    japanese = {"path": "x", "instruction_form": "japanese"}
    assert ServingConfig.model_validate({"model": japanese}).model.instruction_form == "japanese"
    with pytest.raises(ValidationError, match="instruction_form"):
        ServingConfig.model_validate({"model": {"path": "x", "instruction_form": "french"}})


def test_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match="Klingon"):
        to_conversation([USER], "low", "Klingon")
    with pytest.raises(ValueError, match="Klingon"):
        judge("hm", "", "Klingon")


def test_verdicts() -> None:
    assert judge("二足す二は四です。質問について考えています。", "", "Japanese").verdict is Verdict.FOLLOWED
    assert judge("二足す二は四です。質問について考えています。", "", "zh").verdict is Verdict.NOT_FOLLOWED
    assert judge("", "", "zh").verdict is Verdict.UNDETERMINED
    assert judge("", "", None).verdict is Verdict.NOT_REQUESTED


@pytest.mark.parametrize(
    ("thinking", "wish", "detected", "verdict"),
    [
        ("Prima sommo i due numeri, poi controllo il risultato.", "Italian", "it", Verdict.FOLLOWED),
        ("Prima sommo i due numeri, poi controllo il risultato.", "fr", "it", Verdict.NOT_FOLLOWED),
        ("Primeiro somo os dois números e depois confiro o resultado.", "pt-BR", "pt-BR", Verdict.FOLLOWED),
        ("還剩三個蘋果,所以答案是三。", "zh", "zh-Hant", Verdict.FOLLOWED),
        ("还剩三个苹果,所以答案是三。", "zh-Hant", "zh", Verdict.NOT_FOLLOWED),
        ("Сначала я складываю оба числа, потом проверяю результат.", None, "ru", Verdict.NOT_REQUESTED),
    ],
)
def test_verdicts_across_the_catalogue(thinking: str, wish: str | None, detected: str, verdict: Verdict) -> None:
    judged = judge(thinking, "4", wish)
    assert (judged.detected, judged.verdict) == (detected, verdict)
    assert 0.5 < judged.confidence <= 1
    assert (judged.answer.detected, judged.answer.confidence) == ("und", 0)


@pytest.mark.parametrize("thinking", ["plain", "二足す二", "ends in ✓", "é"])
def test_reasoning_tokens_are_those_of_the_analysis(thinking: str) -> None:
    whole, cut = answer(thinking, "✓ four"), answer(thinking, "")
    opened = len(spell(CHANNEL, "analysis", MESSAGE, thinking))
    for completion_tokens, reasoning_tokens in ((whole, opened + 1), (cut[:opened], opened)):
        completion = Completion(CODEC)
        completion.push(completion_tokens)
        completion.finish()
        assert completion.tokens == len(completion_tokens)
        assert completion.reply is not None
        assert completion.reply.analysis == thinking
        assert completion.reasoning_tokens == reasoning_tokens
