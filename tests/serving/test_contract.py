"""The serving contract and the counting of a completion, without HTTP."""

from __future__ import annotations

import pytest

from cluster.harmony import Message
from serving.completion import Completion
from serving.contract import Verdict, judge, to_conversation
from tests.serving.harness import CODEC, answer

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


def test_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match="Klingon"):
        to_conversation([USER], "low", "Klingon")
    with pytest.raises(ValueError, match="Klingon"):
        judge("hm", "Klingon")


def test_verdicts() -> None:
    assert judge("二足す二は四です。質問について考えています。", "Japanese").verdict is Verdict.FOLLOWED
    assert judge("二足す二は四です。質問について考えています。", "zh").verdict is Verdict.NOT_FOLLOWED
    assert judge("", "zh").verdict is Verdict.UNDETERMINED
    assert judge("", None).verdict is Verdict.NOT_REQUESTED


@pytest.mark.parametrize("thinking", ["plain", "二足す二", "ends in ✓", "é"])
def test_reasoning_tokens_are_those_of_the_analysis(thinking: str) -> None:
    whole, cut = answer(thinking, "✓ four"), answer(thinking, "")
    for completion_tokens in (whole, cut[: 3 + len(CODEC.encode("analysis")) - 1 + len(CODEC.encode(thinking))]):
        completion = Completion(CODEC)
        completion.push(completion_tokens)
        completion.finish()
        assert completion.tokens == len(completion_tokens)
        assert completion.reply is not None
        assert completion.reasoning_tokens == len(CODEC.encode(completion.reply.analysis))
