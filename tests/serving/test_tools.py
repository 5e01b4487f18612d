"""Tools of chat completions: told, called, forced, answered, refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.harmony import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START
from serving.engines.scripted import ScriptedEngine
from tests.serving.harness import CODEC, answer, channel, chat, events, joined, spell
from tests.serving.test_api import post
from tests.serving.tiny import SPECIAL_TOKENS

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
LARGE: dict[str, Any] = {
    "type": "function",
    "function": {"name": "large", "parameters": {"properties": {"a": {"enum": list(range(1800))}}}},
}
MADE = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "clock", "arguments": "{}"}}],
}
ARGUMENTS = '{"city":"Nairobi"}'
WIDE = {"prompt_tokens": 1900, "messages": 16, "body_bytes": 200_000}
ENGINE = {"maximum_output_tokens": 148, "default_output_tokens": 140, "maximum_cached_tokens": 2048}


def call_of(recipient: str, arguments: str = ARGUMENTS) -> list[int]:
    return spell(f" to={recipient}", CHANNEL, "commentary ", CONSTRAIN, "json", MESSAGE, arguments, CALL)


def ask(engine: ScriptedEngine, **fields: Any) -> dict[str, Any]:
    response = post(engine, chat() | fields, limits=WIDE, engine=ENGINE)
    assert response.status_code == 200, response.text
    return dict(response.json()["choices"][0])


def refusal(**fields: Any) -> dict[str, Any]:
    engine = ScriptedEngine([answer("hm", "4")])
    response = post(engine, chat() | fields, limits=WIDE, engine=ENGINE)
    assert response.status_code == 400, response.text
    assert not engine.requests
    return dict(response.json()["error"])


def prompt_of(**fields: Any) -> str:
    engine = ScriptedEngine([answer("hm", "4")])
    ask(engine, **fields)
    return CODEC.decode(engine.requests[0][0])


def test_tools_are_told_in_the_developer_message() -> None:
    text = prompt_of(tools=[WEATHER, CLOCK])
    assert "# Tools\n\n## functions\n\nnamespace functions {" in text
    assert "// The weather of a city.\ntype get_weather = (_: {\ncity: string,\n}) => any;" in text
    assert "type clock = () => any;" in text
    assert (
        "functions" not in prompt_of(tools=[WEATHER], tool_choice="none").split("<|start|>user")[0].split("# Valid")[0]
    )


def test_a_round_trip_keeps_the_thinking_that_led_to_the_call() -> None:
    first = [*channel("analysis", "I need the weather."), *spell(START, "assistant"), *call_of("functions.get_weather")]
    choice = ask(ScriptedEngine([first]), tools=[WEATHER])
    message = choice["message"]
    assert (choice["finish_reason"], choice["outcome"]) == ("tool_calls", "tool_call")
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": ARGUMENTS}
    assert "tool_errors" not in choice

    question = {"role": "user", "content": "How is the weather?"}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
    text = prompt_of(tools=[WEATHER], messages=[question, message, result])
    assert (
        "<|start|>assistant<|channel|>analysis<|message|>I need the weather.<|end|>"
        "<|start|>assistant to=functions.get_weather<|channel|>commentary <|constrain|>json<|message|>"
        f"{ARGUMENTS}<|call|>"
        "<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>sunny<|end|>"
        "<|start|>assistant"
    ) in text
    done = {"role": "assistant", "content": "It is sunny.", "reasoning": "SECRET"}
    later = prompt_of(tools=[WEATHER], messages=[question, message, result, done, question])
    assert "I need the weather." not in later
    assert "SECRET" not in later
    assert "It is sunny." in later


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools.1.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]},
         "tools.0.function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}]},
         "tools.0.function.parameters"),
        ({"tools": [CLOCK] * 129}, "tools.1.function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "other"}}},
         "tool_choice.function.name"),
        ({"messages": [{"role": "tool", "tool_call_id": "x", "content": "y"}]}, "messages.0.tool_call_id"),
        ({"messages": [{"role": "tool", "content": "y"}]}, "messages.0.tool_call_id"),
        ({"messages": [{"role": "assistant"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages.0.tool_calls"),
        ({"messages": [MADE]}, "messages.0.tool_calls"),
        ({"messages": [MADE, {"role": "user", "content": "x"}]}, "messages.0.tool_calls"),
        ({"messages": [MADE | {"reasoning": "a", "reasoning_content": "b"}]}, "messages.0.reasoning_content"),
        ({"messages": [{"role": "assistant", "tool_calls": [
            {"id": "a", "function": {"name": "x" * 120, "arguments": "{}"}}]}]},
         "messages.0.tool_calls.0.function.name"),
        ({"tools": [CLOCK], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
        ({"tools": [LARGE | {"function": LARGE["function"] | {"name": f"f{place}"}} for place in range(6)]},
         "tools.4.function.parameters"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refusal(**fields)
    assert error["param"] == param
    assert param.split(".")[0] in error["message"]


def test_a_result_is_given_once() -> None:
    result = {"role": "tool", "tool_call_id": "a", "content": "noon"}
    assert "result already" in refusal(messages=[MADE, result, result])["message"]
    assert refusal(messages=[MADE, MADE])["param"] == "messages.1.tool_calls.0.id"
    assert "to=functions.clock" in prompt_of(messages=[MADE, result])


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"$ref": "#"}, "circular"),
        ({"$defs": {"a": {"properties": {"b": {"$ref": "#/$defs/a"}}}}, "$ref": "#/$defs/a"}, "circular"),
        ({"$ref": "http://example.com/schema"}, "no place in the schema itself"),
        ({"$ref": "#/$defs/none"}, "points to nothing"),
        ({"$dynamicRef": "#x"}, "dynamic"),
        ({"type": "nothing"}, "is not valid"),
        ({"enum": list(range(3000))}, "2000 values"),
        ({"$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 8} for i in range(6)} | {"d6": {}},
          "$ref": "#/$defs/d0"}, "20000 values"),
    ],
)  # fmt: skip
def test_schemas_that_cannot_be_used_are_refused(schema: dict[str, Any], reason: str) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert reason in refusal(response_format=asked)["message"]
    deep: dict[str, Any] = {}
    for _ in range(20):
        deep = {"properties": {"a": deep}}
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": deep}}
    assert "levels deep" in refusal(response_format=asked)["message"]


@pytest.mark.parametrize(
    ("recipient", "arguments", "code"),
    [
        ("functions.other", ARGUMENTS, "unknown_tool"),
        ("browser.search", ARGUMENTS, "unknown_tool"),
        ("functions.get_weather", '{"city": 5}', "invalid_arguments"),
        ("functions.get_weather", "{", "invalid_arguments"),
        ("functions.get_weather", '{"city": NaN}', "invalid_arguments"),
        ("functions.clock", "[]", "invalid_arguments"),
    ],
)
def test_calls_that_are_no_good_are_returned_and_flagged(recipient: str, arguments: str, code: str) -> None:
    choice = ask(ScriptedEngine([call_of(recipient, arguments)]), tools=[WEATHER, CLOCK])
    (fault,) = choice["tool_errors"]
    assert (fault["index"], fault["code"]) == (0, code)
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == arguments
    retried = ask(
        ScriptedEngine([call_of(recipient, arguments), call_of("functions.get_weather")]),
        tools=[WEATHER, CLOCK],
        on_malformed="retry",
    )
    assert (retried["attempts"], "tool_errors" in retried) == (2, False)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("batch", [1, 4, 1000])
@pytest.mark.parametrize(
    "instead",
    [
        answer("Let me think.", "I do not feel like calling."),
        [*channel("analysis", "Let me think."), *spell(START, "assistant"), *call_of("functions.clock", "{}")],
        channel("analysis", "Let me think.", RETURN),
    ],
)
def test_a_tool_that_must_be_called_is(instead: list[int], batch: int, stream: bool) -> None:
    """The thinking is kept; what the model does instead of calling is cut, and the call begun for it."""
    engine = ScriptedEngine([instead, spell(ARGUMENTS, CALL)], batch=batch)
    named = {"type": "function", "function": {"name": "get_weather"}}
    fields = {"tools": [WEATHER, CLOCK], "tool_choice": named}
    if stream:
        chunks = events(post(engine, chat(stream=True) | fields, limits=WIDE, engine=ENGINE).text)[:-1]
        calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", ())]
        assert calls[0]["function"]["name"] == "get_weather"
        assert "".join(call["function"]["arguments"] for call in calls) == ARGUMENTS
        assert (joined(chunks, "reasoning"), joined(chunks, "content")) == ("Let me think.", "")
        choice = chunks[-1]["choices"][0]
    else:
        choice = ask(engine, **fields)
        message = choice["message"]
        assert (message["reasoning"], message["content"]) == ("Let me think.", "")
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather"]
    assert (choice["outcome"], choice["finish_reason"], choice["forced"]) == ("tool_call", "tool_calls", True)
    thought = channel("analysis", "Let me think.")
    opening = CODEC.call_opening("functions.get_weather", started=False)
    prompt, sampling = engine.requests[1]
    assert prompt[-len(thought) - len(opening) :] == thought + opening
    assert sampling.maximum_tokens == 140 - len(thought) - len(opening)


def test_a_tool_that_is_called_anyway_is_left_alone() -> None:
    engine = ScriptedEngine([call_of("functions.clock", "{}")])
    choice = ask(engine, tools=[WEATHER, CLOCK], tool_choice="required")
    assert ("forced" in choice, len(engine.requests)) == (False, 1)


def test_a_call_that_must_come_is_asked_for() -> None:
    named = {"type": "function", "function": {"name": "clock"}}
    system = {"role": "system", "content": "Be brief."}
    fields: dict[str, Any] = {
        "tools": [WEATHER, CLOCK],
        "reasoning_language": "fr",
        "messages": [system, *chat()["messages"]],
    }
    engine = ScriptedEngine([call_of("functions.clock", "{}")] * 3)
    ask(engine, tool_choice=named, **fields)
    ask(engine, tool_choice="required", **fields)
    ask(engine, tool_choice="auto", **fields)
    one, some, none = (CODEC.decode(prompt) for prompt, _ in engine.requests)
    assert "reasoning language: French\n\nBe brief.\n\nCall functions.clock before you answer.\n\n# Tools" in one
    assert "Be brief.\n\nCall one of the tools in the namespace functions before you answer.\n\n# Tools" in some
    assert "before you answer" not in none


def test_a_call_that_had_to_come_and_did_not_is_told() -> None:
    thinking = channel("analysis", "I think on and on. " * 20)
    choice = ask(ScriptedEngine([thinking]), tools=[CLOCK], tool_choice="required", max_completion_tokens=20)
    assert (choice["finish_reason"], choice["outcome"]) == ("length", "truncated_in_analysis")
    (fault,) = choice["tool_errors"]
    assert (fault["index"], fault["code"]) == (None, "missing_call")
    assert "functions.clock" in fault["message"]


@pytest.mark.parametrize("batch", [1, 1000])
def test_one_call_at_a_time_where_no_more_are_wanted(batch: int) -> None:
    call = call_of("functions.clock", "{}")
    two = [*call[:-1], *spell(END, START, "assistant"), *call]
    assert len(ask(ScriptedEngine([two], batch=batch), tools=[CLOCK])["message"]["tool_calls"]) == 2
    engine = ScriptedEngine([two], batch=batch)
    choice = ask(engine, tools=[CLOCK], parallel_tool_calls=False)
    assert len(choice["message"]["tool_calls"]) == 1
    assert (choice["finish_reason"], choice["outcome"]) == ("tool_calls", "tool_call")
    assert engine.stats().running == 0


def test_nested_types_are_told_in_full() -> None:
    parameters = {
        "type": "object",
        "$defs": {"City": {"type": "object", "properties": {"name": {"type": "string"}}}},
        "properties": {"city": {"$ref": "#/$defs/City"}},
    }
    text = prompt_of(tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    assert "type f = (_: {\ncity?: {\n    name?: string,\n    },\n}) => any;" in text


def test_names_of_calls_come_back_as_they_went() -> None:
    for recipient in ("functions.f", "browser.search", "functions.a.b"):
        message = ask(ScriptedEngine([call_of(recipient, "{}")]))["message"]
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "x"}
        assert f"assistant to={recipient}<|channel|>" in prompt_of(messages=[message, result])


def test_any_tool_may_be_opened_by_its_namespace() -> None:
    rest = spell(".clock", CHANNEL, "commentary ", CONSTRAIN, "json", MESSAGE, "{}", CALL)
    choice = ask(ScriptedEngine([answer("hm", "no")[:], rest]), tools=[WEATHER, CLOCK], tool_choice="required")
    assert (choice["message"]["tool_calls"][0]["function"]["name"], choice["forced"]) == ("clock", True)


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_no_text_of_tools_becomes_a_control_token(name: str) -> None:
    def control_tokens(text: str) -> list[int]:
        engine = ScriptedEngine([answer("hm", "4")])
        parameters = {
            "type": "object",
            "title": text,
            "description": text,
            "properties": {text: {"type": "string", "description": text, "enum": [text], "default": text}},
        }
        tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": parameters}}
        call = {"id": text, "type": "function", "function": {"name": "f", "arguments": json.dumps({"a": text})}}
        asked = {"name": "person", "description": text, "schema": {"type": "object", "title": text, "enum": [text]}}
        messages = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": text, "reasoning": text, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": text, "content": text},
        ]
        ask(
            engine,
            messages=messages,
            tools=[tool],
            response_format={"type": "json_schema", "json_schema": asked},
            stop=[text],
            user=text,
        )
        return [token for token in engine.requests[0][0] if token in CODEC.names]

    assert control_tokens(f"a{name}b") == control_tokens("harmless")
    assert refusal(tools=[{"type": "function", "function": {"name": name}}])["code"] == "invalid_value"
    bad = {"id": "x", "type": "function", "function": {"name": name, "arguments": "{}"}}
    assert refusal(messages=[{"role": "assistant", "tool_calls": [bad]}])["code"] == "invalid_value"
    assert END in SPECIAL_TOKENS
