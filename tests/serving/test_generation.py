"""One choice: drawn again, rescued, stopped; and what of it is counted."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest

from cluster.harmony import CALL, CHANNEL, END, MESSAGE, RETURN, START
from cluster.languages import CATALOGUE, detect_language, detection_candidates, opening
from serving.attempt import Wish
from serving.config import PolicyConfig
from serving.engines.base import Sampling
from serving.engines.scripted import ScriptedEngine
from serving.generation import Generation, GenerationError
from serving.stops import StopStrings
from tests.serving.harness import CODEC, answer, channel, spell

FRENCH = "Je réfléchis à la question posée, et deux et deux font quatre."
ENGLISH = "The question is simple, I think that two plus two is four."
GOOD, STRAYED, MALFORMED = answer(FRENCH, "Quatre"), answer(ENGLISH, "Four"), channel("musings", "hm", RETURN)
PROMPT = [1, 2, 3]


def draw(engine: ScriptedEngine, **fields: Any) -> tuple[Generation, str]:
    """A choice, and the text of its final channel as it was streamed."""
    policy = PolicyConfig.model_validate(fields.pop("policy", {}))
    sampling = Sampling(fields.pop("budget", 300), CODEC.stop_tokens, fields.pop("temperature", 1.0), seed=7)
    generation = Generation(engine, CODEC, Wish(PROMPT, sampling, policy=policy, **fields))

    async def run() -> str:
        text = ""
        async with aclosing(generation.stream()) as steps:
            async for step in steps:
                text += "".join(delta.text for delta in step.deltas if delta.part == "final")
        return text

    return generation, asyncio.run(run())


def test_a_good_choice_is_drawn_once() -> None:
    engine = ScriptedEngine([GOOD])
    generation, text = draw(engine, language="fr", policy={"on_malformed": "retry", "on_wrong_language": "retry"})
    assert (text, generation.reply.analysis, generation.attempts) == ("Quatre", FRENCH, 1)
    assert generation.tokens == len(GOOD)
    assert not generation.rescued
    assert not generation.prefilled


@pytest.mark.parametrize(
    ("first", "policy"),
    [(MALFORMED, {"on_malformed": "retry"}), (STRAYED, {"on_wrong_language": "retry"}), ([], {"on_malformed": "fail"})],
)
def test_a_fault_is_drawn_again_with_another_seed(first: list[int], policy: dict[str, str]) -> None:
    engine = ScriptedEngine([first, GOOD])
    generation, text = draw(engine, language="fr", policy=policy)
    assert (text, generation.attempts, generation.prefilled) == ("Quatre", 2, False)
    assert generation.tokens == len(first) + len(GOOD)
    (_, one), (prompt, other) = engine.requests
    assert prompt == PROMPT
    assert one.seed == 7 != other.seed


def test_the_last_attempt_begins_the_thinking() -> None:
    rest = spell("deux et deux font quatre.", END, START, "assistant", CHANNEL, "final", MESSAGE, "Quatre", RETURN)
    engine = ScriptedEngine([STRAYED, STRAYED, rest])
    generation, text = draw(engine, language="fr", policy={"on_wrong_language": "retry"})
    assert (text, generation.attempts, generation.prefilled) == ("Quatre", 3, True)
    assert generation.reply.analysis == opening("fr") + "deux et deux font quatre."
    begun = CODEC.analysis_opening(opening("fr"))
    prompt, sampling = engine.requests[-1]
    assert prompt == PROMPT + begun
    assert sampling.maximum_tokens == 300 - len(begun)
    assert generation.tokens == 2 * len(STRAYED) + len(rest)
    thought = rest.index(CODEC.ids[END]) + 1
    assert generation.reasoning_tokens == 2 * len(channel("analysis", ENGLISH)) + thought


def test_a_greedy_choice_is_not_drawn_again_as_it_was() -> None:
    engine = ScriptedEngine(
        [MALFORMED, spell("hm", END, START, "assistant", *[CHANNEL, "final", MESSAGE, "4", RETURN])]
    )
    generation, _ = draw(engine, temperature=0.0, policy={"on_malformed": "retry", "retries": 5})
    assert (generation.attempts, generation.prefilled, generation.reply.final) == (2, True, "4")


def test_retries_that_do_not_help_return_the_least_bad() -> None:
    engine = ScriptedEngine([MALFORMED, STRAYED, MALFORMED])
    policy = {"on_malformed": "retry", "on_wrong_language": "retry"}
    generation, text = draw(engine, language="fr", policy=policy)
    assert (text, generation.attempts, generation.language.verdict) == ("Four", 3, "not_followed")


@pytest.mark.parametrize(
    ("completion", "policy", "code"),
    [
        (MALFORMED, {"on_malformed": "fail"}, "malformed_output"),
        (STRAYED, {"on_wrong_language": "fail"}, "wrong_language"),
    ],
)
def test_a_policy_may_make_it_an_error(completion: list[int], policy: dict[str, str], code: str) -> None:
    with pytest.raises(GenerationError) as caught:
        draw(ScriptedEngine([completion]), language="fr", policy=policy | {"retries": 0})
    assert caught.value.code == code


def test_reported_faults_are_left_alone() -> None:
    engine = ScriptedEngine([MALFORMED])
    generation, _ = draw(engine, language="fr")
    assert (generation.attempts, generation.reply.outcome.value) == (1, "unknown_channel")


@pytest.mark.parametrize("batch", [1, 3, 50, 1000])
def test_thinking_is_closed_in_time_for_an_answer(batch: int) -> None:
    thinking = spell(CHANNEL, "analysis", MESSAGE, "and on " * 60)
    engine = ScriptedEngine([thinking, spell("Four", RETURN)], batch=batch)
    generation, text = draw(engine, budget=80, policy={"rescue_share": 0.25})
    assert (text, generation.rescued, generation.reply.outcome.value) == ("Four", True, "complete")
    (_, first), (prompt, second) = engine.requests
    assert first.maximum_tokens == 80
    assert prompt == PROMPT + thinking[:60] + CODEC.final_opening()
    assert second.maximum_tokens == 20 - len(CODEC.final_opening())
    assert generation.reasoning_tokens == 60
    assert generation.tokens == 60 + len(spell("Four", RETURN))
    assert generation.finish_reason == "stop"


def test_thinking_is_closed_in_time_for_a_call_that_must_come() -> None:
    thinking = spell(CHANNEL, "analysis", MESSAGE, "and on " * 60)
    engine = ScriptedEngine([thinking, spell("{}", CALL)])
    generation, _ = draw(engine, budget=80, must_call="functions.f", policy={"rescue_share": 0.5})
    assert (generation.rescued, generation.forced, generation.finish_reason) == (True, True, "tool_calls")
    assert [(call.recipient, call.arguments) for call in generation.reply.tool_calls] == [("functions.f", "{}")]
    assert (generation.reply.outcome.value, len(engine.requests)) == ("tool_call", 2)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.9])
@pytest.mark.parametrize("budget", [1, 4, 8, 20])
@pytest.mark.parametrize("must_call", [None, "functions.f", "functions"])
def test_no_more_is_written_than_the_budget_holds(budget: int, share: float, must_call: str | None) -> None:
    """An engine that holds a prompt and a budget holds every request of a choice, however small the budget is."""
    thinking, instead = spell(CHANNEL, "analysis", MESSAGE, "and on " * 60), answer("", "4")
    for completion in (thinking, instead, STRAYED):
        engine = ScriptedEngine([completion], repeat=True)
        policy = {"rescue_share": share, "on_malformed": "retry", "on_wrong_language": "retry"}
        generation, _ = draw(engine, budget=budget, language="fr", must_call=must_call, policy=policy)
        for prompt, sampling in engine.requests:
            assert sampling.maximum_tokens >= 1
            assert len(prompt) - len(PROMPT) + sampling.maximum_tokens <= budget
        assert generation.tokens <= budget * generation.attempts


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_what_already_answers_is_not_rescued(batch: int) -> None:
    completion = answer("hm", "a long answer that goes on and on until the budget is all used up and more " * 3)
    engine = ScriptedEngine([completion], batch=batch)
    generation, _ = draw(engine, budget=100, policy={"rescue_share": 0.5})
    assert (generation.rescued, generation.reply.outcome.value) == (False, "truncated_in_final")
    assert generation.tokens == 100


@pytest.mark.parametrize("batch", [1, 2, 1000])
@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [(("fox",), "The quick brown ", "stop"), (("dog.", "br"), "The quick ", "stop"), (("cat",), None, "stop")],
)
def test_the_answer_ends_before_a_stop_sequence(batch: int, stop: tuple[str, ...], text: str, reason: str) -> None:
    whole = "The quick brown fox jumps over the lazy dog. It was"
    engine = ScriptedEngine([answer("a fox thinks", whole)], batch=batch)
    generation, streamed = draw(engine, stop=stop)
    expected = whole if text is None else text
    assert (streamed, generation.reply.final) == (expected, expected)
    assert (generation.finish_reason, generation.reply.outcome.value) == (reason, "complete")
    assert generation.reply.analysis == "a fox thinks"
    assert engine.stats().running == 0


def test_stop_strings_hold_back_no_more_than_they_must() -> None:
    stops = StopStrings(["END", "EDGE"])
    assert [stops.push(text) for text in ("a", "bE", "x", "E", "N", "E", "ND!", "no")] == [
        "a", "b", "Ex", "", "", "EN", "", "",
    ]  # fmt: skip
    assert (stops.met, stops.passed, stops.flush()) == (True, "abExEN", "")


@pytest.mark.parametrize("tag", CATALOGUE)
def test_openings_are_in_their_language(tag: str) -> None:
    found = detect_language(opening(tag), detection_candidates(tag))
    assert found.split("-")[0] == tag.split("-")[0] or {found, tag} <= {"nb", "da"}
