"""Requests of the Responses interface: what is refused, what reaches the prompt, and text that stays text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serving.engines.scripted import ScriptedEngine
from tests.serving.harness import CODEC, MODEL, answer, refusal, spell
from tests.serving.responses_harness import ALL_KINDS, ARGUMENTS, WEATHER, ask, post, respond
from tests.serving.tiny import SPECIAL_TOKENS

USER = {"role": "user", "content": "hello"}
CALL_ITEM = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": ARGUMENTS}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "SECRET"}]}


def given_items(*items: Any, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": list(items), **fields}


def prompt_of(body: dict[str, Any]) -> str:
    engine = ScriptedEngine([answer("hm", "4")])
    response = post(engine, body, limits={"prompt_tokens": 1500})
    assert response.status_code == 200, response.text
    return CODEC.decode(engine.requests[0][0])


def refused(body: Any) -> tuple[int, dict[str, Any]]:
    return refusal("/v1/responses", body)


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        (b"{", 400, None, "invalid_json"),
        (b"[]", 400, None, "invalid_value"),
        (b'{"model": "tiny", "input": "\\ud800"}', 400, None, "invalid_json"),
        ({"model": MODEL}, 400, "input", "missing_required_parameter"),
        ({"input": "x"}, 400, "model", "missing_required_parameter"),
        (ask() | {"model": "gpt-5"}, 404, "model", "model_not_found"),
        (ask() | {"input": 5}, 400, "input", "invalid_value"),
        (ask() | {"input": []}, 400, "input", "invalid_value"),
        (given_items("x"), 400, "input.0", "invalid_value"),
        (given_items({"role": "user"}), 400, "input.0.content", "missing_required_parameter"),
        (given_items({"role": "tool", "content": "x"}), 400, "input.0.role", "invalid_value"),
        (given_items(USER | {"colour": "red"}), 400, "input.0.colour", "unknown_parameter"),
        (given_items(USER | {"phase": "commentary"}), 400, "input.0.phase", "unsupported_parameter"),
        (
            given_items({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}),
            400,
            "input.0.content.0.type",
            "invalid_value",
        ),
        (given_items(USER, {"type": "item_reference", "id": "x"}), 400, "input.1.type", "invalid_value"),
        (given_items(USER, {"type": ["message"]}), 400, "input.1.type", "invalid_value"),
        (
            given_items(USER, THOUGHT | {"encrypted_content": "x"}),
            400,
            "input.1.encrypted_content",
            "unsupported_parameter",
        ),
        (given_items(USER, CALL_ITEM | {"name": "a b"}), 400, "input.1.name", "invalid_value"),
        (given_items(USER, CALL_ITEM | {"name": "x" * 120}), 400, "input.1.name", "invalid_value"),
        (given_items(USER, CALL_ITEM, CALL_ITEM), 400, "input.2.call_id", "invalid_value"),
        (given_items(USER, RESULT), 400, "input.1.call_id", "invalid_value"),
        (given_items(USER, CALL_ITEM, RESULT, RESULT), 400, "input.3.call_id", "invalid_value"),
        (given_items(*[USER] * 9), 400, "input", "invalid_value"),
        (ask("word " * 700), 400, "input", "context_length_exceeded"),
        (ask("word " * 7000), 413, None, "request_too_large"),
        (ask(colour="red"), 400, "colour", "unknown_parameter"),
        (ask(n=1), 400, "n", "unknown_parameter"),
        (ask(instructions=[USER]), 400, "instructions", "invalid_value"),
        (ask(max_output_tokens=0), 400, "max_output_tokens", "invalid_value"),
        (ask(max_output_tokens=401), 400, "max_output_tokens", "invalid_value"),
        (ask(temperature=2.5), 400, "temperature", "invalid_value"),
        (ask(temperature="1"), 400, "temperature", "invalid_value"),
        (ask(top_p=0), 400, "top_p", "invalid_value"),
        (ask(seed=2**63), 400, "seed", "invalid_value"),
        (ask(stream="yes"), 400, "stream", "invalid_value"),
        (ask(reasoning="high"), 400, "reasoning", "invalid_value"),
        (ask(reasoning={"effort": "xhigh"}), 400, "reasoning.effort", "invalid_value"),
        (ask(reasoning={"summary": "detailed"}), 400, "reasoning.summary", "unsupported_parameter"),
        (ask(reasoning={"colour": 1}), 400, "reasoning.colour", "unknown_parameter"),
        (ask(reasoning_language="Klingon"), 400, "reasoning_language", "invalid_value"),
        (ask(on_malformed="never"), 400, "on_malformed", "invalid_value"),
        (ask(retries=9), 400, "retries", "invalid_value"),
        (ask(text={"verbosity": "low"}), 400, "text.verbosity", "unsupported_parameter"),
        (ask(text={"format": {"type": "grammar"}}), 400, "text.format.type", "invalid_value"),
        (ask(text={"format": {}}), 400, "text.format.type", "missing_required_parameter"),
        (
            ask(text={"format": {"type": "json_schema", "name": "a"}}),
            400,
            "text.format.schema",
            "missing_required_parameter",
        ),
        (
            ask(text={"format": {"type": "json_schema", "name": "a", "schema": {"type": 5}}}),
            400,
            "text.format.schema",
            "invalid_value",
        ),
        (ask(tools=["x"]), 400, "tools.0", "invalid_value"),
        (ask(tools=[{"type": "web_search"}]), 400, "tools.0.type", "unsupported_parameter"),
        (ask(tools=[WEATHER | {"name": "a b"}]), 400, "tools.0.name", "invalid_value"),
        (ask(tools=[WEATHER | {"defer_loading": True}]), 400, "tools.0.defer_loading", "unsupported_parameter"),
        (ask(tools=[WEATHER, WEATHER]), 400, "tools.1.name", "invalid_value"),
        (ask(tools=[WEATHER | {"parameters": {"type": "string"}}]), 400, "tools.0.parameters", "invalid_value"),
        (ask(tool_choice="required"), 400, "tool_choice", "invalid_value"),
        (ask(tool_choice="perhaps"), 400, "tool_choice", "invalid_value"),
        (ask(tool_choice={"type": "mcp"}), 400, "tool_choice.type", "invalid_value"),
        (ask(tool_choice={"type": "function", "name": "f"}), 400, "tool_choice.name", "invalid_value"),
        (
            ask(
                tools=[WEATHER],
                tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
            ),
            400,
            "tool_choice.tools.0.name",
            "invalid_value",
        ),
        (ask(metadata={"a": 1}), 400, "metadata.a", "invalid_value"),
        (ask(metadata={"a": "x" * 513}), 400, "metadata.a", "invalid_value"),
        (ask(metadata={str(n): "x" for n in range(17)}), 400, "metadata", "invalid_value"),
        (ask(include=["everything"]), 400, "include.0", "invalid_value"),
        (ask(include=["message.output_text.logprobs"]), 400, "include.0", "invalid_value"),
    ],
)
def test_refusals_name_the_field(body: Any, status: int, param: str | None, code: str) -> None:
    got_status, error = refused(body)
    assert (got_status, error["param"]) == (status, param), error
    assert error["code"] == code, error
    assert error["type"] == "invalid_request_error"
    if param and code not in ("model_not_found", "context_length_exceeded"):
        assert param.rsplit(".", 1)[-1] in error["message"], error


@pytest.mark.parametrize(
    ("name", "asking"),
    [
        ("access_programs", {"cyber": "standard"}),
        ("background", True),
        ("background_options", {}),
        ("context_management", [{"type": "compaction"}]),
        ("conversation", "conv_1"),
        ("image", {"context_compression": "auto"}),
        ("max_tool_calls", 3),
        ("moderation", {"model": "m"}),
        ("previous_response_id", "resp_1"),
        ("prompt", {"id": "p"}),
        ("prompt_cache_options", {"prewarm": True}),
        ("service_tier", "flex"),
        ("store", True),
        ("stream_options", {"include_obfuscation": True}),
        ("top_logprobs", 3),
        ("truncation", "auto"),
    ],
)
def test_openai_fields_pass_only_if_they_ask_for_nothing(name: str, asking: Any) -> None:
    status, error = refused(ask(**{name: asking}))
    assert (status, error["param"], error["code"]) == (400, name, "unsupported_parameter")
    assert name in error["message"]
    assert post(ScriptedEngine([answer("hm", "4")]), ask(**{name: None})).status_code == 200


def test_refusals_say_what_to_do_instead() -> None:
    assert "`input`" in refused(ask(previous_response_id="resp_1"))[1]["message"]
    error = refused(ask(include=["reasoning.encrypted_content"]))[1]
    assert (error["param"], error["code"]) == ("include", "unsupported_parameter")
    assert "items of type reasoning" in error["message"]


def test_what_asks_for_nothing_passes() -> None:
    respond(
        answer("hm", "4"),
        background=False,
        include=["file_search_call.results"],
        prompt_cache_retention="24h",
        reasoning={"summary": "auto", "context": "current_turn", "generate_summary": None},
        service_tier="auto",
        store=False,
        stream_options={"include_obfuscation": False},
        text={"verbosity": "medium", "format": {"type": "text"}},
        tool_choice="none",
        tools=[],
        top_logprobs=0,
        truncation="disabled",
    )


def test_instructions_and_items_reach_the_prompt_in_order() -> None:
    text = prompt_of(
        given_items(
            {"type": "message", "role": "developer", "content": "Second."},
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "one "}, {"type": "input_text", "text": "two"}],
            },
            {"role": "assistant", "content": "three"},
            USER,
            instructions="First.",
            reasoning={"effort": "high"},
        )
    )
    places = [text.index(part) for part in ("Reasoning: high", "First.", "Second.", "one two<|end|>", "three", "hello")]
    assert places == sorted(places)


def test_effort_language_tools_and_form_reach_the_prompt() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    form = {"format": {"type": "json_schema", "name": "number", "schema": schema}}
    text = prompt_of(ask(reasoning_language="français", tools=[WEATHER], text=form))
    assert "# Instructions\n\nreasoning language: French" in text
    assert "type get_weather = (_: {\ncity: string,\n}) => any;" in text
    assert '## number\n\n{"type":"object","properties":{"n":{"type":"integer"}}}' in text
    assert "get_weather" not in prompt_of(ask(tools=[WEATHER], tool_choice="none"))


def test_only_allowed_tools_are_shown() -> None:
    other = WEATHER | {"name": "other"}
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "other"}]}
    text = prompt_of(ask(tools=[WEATHER, other], tool_choice=choice))
    assert "type other =" in text
    assert "get_weather" not in text


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "get_weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_come_comes(choice: Any, stream: bool) -> None:
    engine = ScriptedEngine([answer("hm", "It is sunny."), spell(ARGUMENTS, "<|call|>")])
    text = post(engine, ask(tools=[WEATHER], tool_choice=choice, stream=stream)).text
    response = json.loads(text.rstrip().rpartition("data: ")[2])["response"] if stream else json.loads(text)
    call = response["output"][-1]
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "get_weather", ARGUMENTS)
    assert response["forced"] is True
    assert "It is sunny." not in json.dumps(response["output"])


def test_a_call_and_its_result_are_fed_back_with_the_thinking_between_them() -> None:
    preamble = {"role": "assistant", "phase": "commentary", "content": "I look."}
    text = prompt_of(given_items(USER, THOUGHT, preamble, CALL_ITEM, RESULT, tools=[WEATHER]))
    assert (
        "<|start|>assistant<|channel|>analysis<|message|>SECRET<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant to=functions.get_weather<|channel|>commentary <|constrain|>json"
        f"<|message|>{ARGUMENTS}<|call|>"
        "<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>sunny<|end|>"
        "<|start|>assistant"
    ) in text


def test_thinking_before_the_last_answer_is_dropped() -> None:
    text = prompt_of(given_items(USER, THOUGHT, CALL_ITEM, RESULT, {"role": "assistant", "content": "Sunny."}, USER))
    assert "SECRET" not in text
    assert "to=functions.get_weather" in text
    assert "<|channel|>final<|message|>Sunny.<|end|>" in text


def test_thinking_and_preambles_that_lead_to_nothing_are_left_out() -> None:
    preamble = {"role": "assistant", "phase": "commentary", "content": "PREAMBLE"}
    text = prompt_of(given_items(USER, THOUGHT, preamble, USER, CALL_ITEM, RESULT))
    assert "SECRET" not in text
    assert "PREAMBLE" not in text
    assert "PREAMBLE" not in prompt_of(given_items(USER, preamble, {"role": "assistant", "content": "Four"}, USER))


def test_results_find_their_calls_in_any_order() -> None:
    second = CALL_ITEM | {"call_id": "c2", "name": "browser.search"}
    output = [{"type": "input_text", "text": "two "}, {"type": "input_text", "text": "pages"}]
    results = ({"type": "function_call_output", "call_id": "c2", "output": output}, RESULT)
    text = prompt_of(given_items(USER, CALL_ITEM, second, *results))
    assert "<|start|>browser.search to=assistant<|channel|>commentary<|message|>two pages<|end|>" in text
    assert text.index("two pages") < text.index("sunny")


def test_own_items_can_be_sent_back() -> None:
    output = respond(ALL_KINDS, tools=[WEATHER])["output"]
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": f"result of {item['name']}"}
        for item in output
        if item["type"] == "function_call"
    ]
    text = prompt_of(given_items(USER, *output, *results, tools=[WEATHER]))
    assert "result of get_weather<|end|>" in text
    assert "<|start|>browser.search to=assistant" in text
    assert "<|channel|>commentary<|message|>I look. <|end|>" in text
    final = respond(answer("SECRET", "Four"))["output"]
    text = prompt_of(given_items(USER, *final, USER))
    assert "Four" in text
    assert "SECRET" not in text


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_text_never_becomes_a_control_token(name: str) -> None:
    """The same conversation with harmless text of the same shape has exactly as many control tokens."""

    def control_tokens(text: str) -> list[int]:
        engine = ScriptedEngine([answer("hm", "4")])
        parts = [{"type": "input_text", "text": text}, {"type": "input_text", "text": text}]
        schema = {"type": "object", "description": text, "properties": {text: {"title": text, "default": text}}}
        body = given_items(
            {"role": "system", "content": text},
            {"role": "user", "content": parts},
            {
                "type": "reasoning",
                "summary": [{"type": "summary_text", "text": text}],
                "content": [{"type": "reasoning_text", "text": text}],
            },
            {"role": "assistant", "phase": "commentary", "content": [{"type": "output_text", "text": text}]},
            CALL_ITEM | {"call_id": text, "arguments": text},
            {"type": "function_call_output", "call_id": text, "output": text},
            {"role": "assistant", "content": text},
            {"role": "user", "content": text},
            instructions=text,
            metadata={text: text},
            user=text,
            safety_identifier=text,
            prompt_cache_key=text,
            reasoning_language="fr",
            tools=[WEATHER | {"description": text, "parameters": schema}],
            text={"format": {"type": "json_schema", "name": "n", "description": text, "schema": schema}},
        )
        response = post(engine, body, limits={"prompt_tokens": 1600})
        assert response.status_code == 200, response.text
        return [token for token in engine.requests[0][0] if token in CODEC.names]

    assert control_tokens(f"a{name}b{name}") == control_tokens("harmless")


def test_control_tokens_in_names_are_refused() -> None:
    for name in SPECIAL_TOKENS:
        assert refused(ask() | {"model": name})[0] == 404
        assert refused(given_items(USER, CALL_ITEM | {"name": name}))[0] == 400
        assert refused(ask(tools=[WEATHER | {"name": name}]))[0] == 400
        assert refused(ask(reasoning_language=name))[0] == 400
