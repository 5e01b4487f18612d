"""The Responses interface over a scripted engine: items, outcomes, usage, and what is repeated of the request."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.harmony import CALL, CHANNEL, MESSAGE, RETURN
from serving.engines.scripted import ScriptedEngine
from tests.serving.harness import CODEC, answer, channel, spell
from tests.serving.responses_harness import (
    ALL_KINDS,
    ARGUMENTS,
    CASES,
    ENGLISH,
    FRENCH,
    WEATHER,
    ask,
    call_of,
    post,
    respond,
    respond_streaming,
    stream_of,
)


def texts(response: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Kind, text and status of each item."""
    found = []
    for item in response["output"]:
        if item["type"] == "function_call":
            found.append((item["name"], item["arguments"], item["status"]))
            continue
        (part,) = item["content"]
        found.append((item.get("phase", "reasoning"), part["text"], item["status"]))
    return found


def test_each_kind_has_items_of_its_own() -> None:
    response = respond(ALL_KINDS, tools=[WEATHER])
    number = response["id"].removeprefix("resp_")
    reasoning, preamble, call, search = response["output"]
    assert reasoning == {
        "id": f"rs_{number}_0",
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": ENGLISH}],
        "status": "completed",
    }
    assert preamble == {
        "id": f"msg_{number}_1",
        "type": "message",
        "role": "assistant",
        "phase": "commentary",
        "content": [{"type": "output_text", "text": "I look. ", "annotations": [], "logprobs": []}],
        "status": "completed",
    }
    assert call == {
        "id": f"fc_{number}_2",
        "type": "function_call",
        "call_id": f"call_{number}_0",
        "name": "get_weather",
        "arguments": ARGUMENTS,
        "status": "completed",
    }
    assert (search["name"], search["call_id"]) == ("browser.search", f"call_{number}_1")
    assert (response["status"], response["outcome"]) == ("completed", "tool_call")
    assert [fault["code"] for fault in response["tool_errors"]] == ["unknown_tool"]


def test_the_answer_is_the_final_answer() -> None:
    assert texts(respond(CASES["answer"])) == [
        ("reasoning", FRENCH, "completed"),
        ("final_answer", "Quatre: 四 ✓", "completed"),
    ]


def test_items_keep_the_order_in_which_the_model_wrote() -> None:
    assert texts(respond(CASES["several of a channel"])) == [
        ("reasoning", "one two", "completed"),
        ("final_answer", "three ", "completed"),
        ("reasoning", "four", "completed"),
        ("final_answer", "five", "completed"),
    ]


@pytest.mark.parametrize(
    ("case", "outcome", "items"),
    [
        ("cut in thinking", "truncated_in_analysis", ["incomplete"]),
        ("cut in answer", "truncated_in_final", ["completed", "incomplete"]),
        ("cut in commentary", "truncated_in_commentary", ["incomplete"]),
        ("cut in call", "truncated_in_tool_call", ["completed", "incomplete"]),
        ("cut in header", "truncated_in_header", ["completed"]),
        ("cut before answer", "truncated_in_final", ["completed"]),
        ("malformed and cut", "unknown_channel", ["incomplete"]),
        ("empty", "empty", []),
    ],
)
def test_a_budget_that_ended_is_told(case: str, outcome: str, items: list[str]) -> None:
    response = respond(CASES[case])
    assert (response["status"], response["outcome"]) == ("incomplete", outcome)
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["completed_at"] is None
    assert [item["status"] for item in response["output"]] == items


@pytest.mark.parametrize(
    ("case", "outcome", "unparsed"),
    [
        ("unknown channel", "unknown_channel", "a thought"),
        ("stray text", "malformed_header", "stray text"),
        ("stray control token", "malformed_header", "<|message|>"),
        ("no answer", "no_final", None),
        ("call without recipient", "malformed_header", None),
    ],
)
def test_nothing_that_was_written_is_lost(case: str, outcome: str, unparsed: str | None) -> None:
    response = respond(CASES[case])
    assert (response["status"], response["outcome"], response["incomplete_details"]) == ("completed", outcome, None)
    if unparsed:
        assert unparsed in response["unparsed"]
    else:
        assert "unparsed" not in response


def test_usage_counts_tokens_of_the_model() -> None:
    completion = CASES["answer"]
    engine = ScriptedEngine([completion])
    usage = post(engine, ask()).json()["usage"]
    prompt = len(engine.requests[0][0])
    assert usage == {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": len(completion),
        "output_tokens_details": {"reasoning_tokens": len(channel("analysis", FRENCH))},
        "total_tokens": prompt + len(completion),
    }


def test_parameters_are_repeated() -> None:
    asked = {
        "instructions": "Be brief.",
        "max_output_tokens": 77,
        "metadata": {"run": "7"},
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "temperature": 0.5,
        "top_p": 0.25,
        "tool_choice": {"type": "function", "name": "get_weather"},
        "tools": [WEATHER],
        "user": "ann",
    }
    response = respond(call_of("functions.get_weather"), **asked, reasoning={"effort": "high"})
    assert {name: response[name] for name in asked} == asked
    assert response["reasoning"] == {"effort": "high", "summary": None}
    assert (response["store"], response["truncation"], response["background"]) == (False, "disabled", False)


def test_sampling_reaches_the_engine() -> None:
    engine = ScriptedEngine([CASES["answer"]])
    post(engine, ask(temperature=0.25, top_p=0.5, max_output_tokens=7, seed=3))
    ((_, sampling),) = engine.requests
    assert (sampling.maximum_tokens, sampling.temperature, sampling.top_p, sampling.seed) == (7, 0.25, 0.5, 3)
    assert sampling.stop_tokens == (CODEC.ids[RETURN], CODEC.ids[CALL])


@pytest.mark.parametrize(("thinking", "verdict"), [(FRENCH, "followed"), (ENGLISH, "not_followed")])
def test_reasoning_language_is_judged(thinking: str, verdict: str) -> None:
    found = respond(answer(thinking, "4"), reasoning_language="French")["reasoning_language"]
    assert (found["requested"], found["verdict"]) == ("fr", verdict)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_choice_that_is_drawn_again_comes_as_it_was_decided(streaming: bool) -> None:
    engine = ScriptedEngine([CASES["unknown channel"], CASES["answer"]])
    result = post(engine, ask(on_malformed="retry", retries=2, stream=streaming))
    response = stream_of(result.text)[-1]["response"] if streaming else result.json()
    assert (response["outcome"], response["attempts"]) == ("complete", 2)
    assert response["usage"]["output_tokens"] == sum(len(CASES[case]) for case in ("unknown channel", "answer"))
    assert "Quatre" in texts(response)[-1][1]


@pytest.mark.parametrize("streaming", [False, True])
def test_no_good_choice_is_an_error_where_that_was_asked_for(streaming: bool) -> None:
    engine = ScriptedEngine([CASES["unknown channel"]] * 2)
    result = post(engine, ask(on_malformed="fail", retries=1, stream=streaming))
    assert (result.status_code, result.json()["error"]["code"]) == (502, "malformed_output")


@pytest.mark.parametrize("streaming", [False, True])
def test_thinking_is_closed_in_time_where_that_was_asked_for(streaming: bool) -> None:
    thinking = spell(CHANNEL, "analysis", MESSAGE, *[ENGLISH] * 9)
    engine = ScriptedEngine([thinking, spell("Four", RETURN)])
    result = post(engine, ask(rescue=True, max_output_tokens=100, stream=streaming))
    response = stream_of(result.text)[-1]["response"] if streaming else result.json()
    assert (response["status"], response["rescued"]) == ("completed", True)
    assert [item[0] for item in texts(response)] == ["reasoning", "final_answer"]


@pytest.mark.parametrize("streaming", [False, True])
def test_thinking_is_hidden_on_request(streaming: bool) -> None:
    if streaming:
        events = respond_streaming(CASES["several of a channel"], include_reasoning=False)
        assert not [event for event in events if "reasoning_text" in event["type"]]
        response = events[-1]["response"]
    else:
        response = respond(CASES["several of a channel"], include_reasoning=False)
    assert texts(response) == [("final_answer", "three five", "completed")]
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


def test_an_answer_is_held_against_the_form_that_was_asked_for() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    text = {"format": {"type": "json_schema", "name": "number", "schema": schema}}
    good, bad = (respond(channel("final", spelled, RETURN), text=text) for spelled in ('{"n":4}', '{"n":"4"}'))
    assert good["response_format"] == {"valid": True, "error": None}
    assert bad["response_format"]["valid"] is False
    assert good["text"]["format"]["schema"] == schema
    whole = respond(channel("final", "4", RETURN), text={"format": {"type": "json_object"}})
    assert whole["response_format"]["valid"] is False
