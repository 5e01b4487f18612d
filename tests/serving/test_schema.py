"""Requests: what is refused and how it is said, what passes, and that text stays text."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.harmony import CONTROL_TOKENS
from serving.engines.scripted import ScriptedEngine
from tests.serving.harness import CODEC, MODEL, answer, application, chat, http_client, refusal
from tests.serving.test_api import post
from tests.serving.tiny import SPECIAL_TOKENS

USER = {"role": "user", "content": "hello"}


def refused(body: Any, **sections: Any) -> tuple[int, dict[str, Any]]:
    return refusal("/v1/chat/completions", body, **sections)


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        (b"{", 400, None, "invalid_json"),
        (b"", 400, None, "invalid_json"),
        (b"\xff\xfe", 400, None, "invalid_json"),
        (b"[]", 400, None, "invalid_value"),
        (b"[" * 8000, 400, None, "invalid_json"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, None, "invalid_json"),
        ({"model": MODEL}, 400, "messages", "missing_required_parameter"),
        ({"messages": [USER]}, 400, "model", "missing_required_parameter"),
        (chat() | {"model": "gpt-5"}, 404, "model", "model_not_found"),
        (chat() | {"model": 5}, 400, "model", "invalid_value"),
        (chat() | {"messages": []}, 400, "messages", "invalid_value"),
        (chat() | {"messages": "hello"}, 400, "messages", "invalid_value"),
        (chat() | {"messages": ["hello"]}, 400, "messages.0", "invalid_value"),
        (chat() | {"messages": [USER] * 9}, 400, "messages", "invalid_value"),
        (chat() | {"messages": [{"role": "user"}]}, 400, "messages.0.content", "missing_required_parameter"),
        (chat() | {"messages": [{"role": "function", "content": "x"}]}, 400, "messages.0.role", "invalid_value"),
        (chat() | {"messages": [USER | {"content": 5}]}, 400, "messages.0.content", "invalid_value"),
        (chat() | {"messages": [USER | {"content": []}]}, 400, "messages.0.content", "invalid_value"),
        (
            chat() | {"messages": [USER | {"content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "messages.0.content.0.type",
            "invalid_value",
        ),
        (chat() | {"messages": [USER | {"reasoning": "hm"}]}, 400, "messages.0.reasoning", "unsupported_parameter"),
        (chat() | {"messages": [USER | {"colour": "red"}]}, 400, "messages.0.colour", "unknown_parameter"),
        (chat() | {"messages": [USER | {"name": "bob"}]}, 400, "messages.0.name", "unsupported_parameter"),
        (chat(colour="red"), 400, "colour", "unknown_parameter"),
        (chat(temperature="1"), 400, "temperature", "invalid_value"),
        (chat(temperature=2.5), 400, "temperature", "invalid_value"),
        (chat(temperature=-1), 400, "temperature", "invalid_value"),
        (chat(temperature=True), 400, "temperature", "invalid_value"),
        (
            b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
            400,
            "temperature",
            "invalid_value",
        ),
        (chat(top_p=0), 400, "top_p", "invalid_value"),
        (chat(max_tokens=0), 400, "max_tokens", "invalid_value"),
        (chat(max_tokens=1.5), 400, "max_tokens", "invalid_value"),
        (chat(max_tokens=401), 400, "max_tokens", "invalid_value"),
        (chat(max_completion_tokens=401), 400, "max_completion_tokens", "invalid_value"),
        (chat(stream="yes"), 400, "stream", "invalid_value"),
        (chat(stream_options={"x": 1}), 400, "stream_options.x", "unknown_parameter"),
        (chat(reasoning_effort="maximal"), 400, "reasoning_effort", "invalid_value"),
        (chat(reasoning_language="Klingon"), 400, "reasoning_language", "invalid_value"),
        (chat("word " * 700), 400, "messages", "context_length_exceeded"),
        (chat("word " * 7000), 413, None, "request_too_large"),
    ],
)
def test_refusals_name_the_field(body: Any, status: int, param: str | None, code: str) -> None:
    got_status, error = refused(body)
    assert (got_status, error["param"]) == (status, param), error
    assert error["code"] == code, error
    assert error["type"] == "invalid_request_error"
    if param:
        assert param.rsplit(".", 1)[-1] in error["message"] or code in ("model_not_found", "context_length_exceeded")


def test_unknown_language_lists_the_known_ones() -> None:
    assert "fr (French)" in refused(chat(reasoning_language="Klingon"))[1]["message"]


@pytest.mark.parametrize(
    ("name", "neutral", "asking"),
    [
        ("logit_bias", {}, {"5": 1}),
        ("presence_penalty", 0, 0.5),
        ("frequency_penalty", 0.0, -1),
        ("store", False, True),
        ("modalities", ["text"], ["text", "audio"]),
    ],
)
def test_openai_fields_pass_only_if_they_ask_for_nothing(name: str, neutral: Any, asking: Any) -> None:
    assert post(ScriptedEngine([answer("hm", "4")]), chat(**{name: neutral})).status_code == 200
    status, error = refused(chat(**{name: asking}))
    assert (status, error["param"], error["code"]) == (400, name, "unsupported_parameter")
    assert name in error["message"]


def test_labels_pass_with_any_value() -> None:
    body = chat(user="u-1", metadata={"a": "b"}, safety_identifier="s", prompt_cache_key="k")
    assert post(ScriptedEngine([answer("hm", "4")]), body).status_code == 200


def prompt_of(body: dict[str, Any]) -> str:
    engine = ScriptedEngine([answer("hm", "4")])
    response = post(engine, body, limits={"prompt_tokens": 1500})
    assert response.status_code == 200, response.text
    return CODEC.decode(engine.requests[0][0])


def test_own_answers_can_be_sent_back() -> None:
    message = post(ScriptedEngine([answer("SECRET", "Four")]), chat()).json()["choices"][0]["message"]
    message |= {"refusal": None, "tool_calls": None, "annotations": []}
    text = prompt_of(chat() | {"messages": [USER, message, USER]})
    assert "Four" in text
    assert "SECRET" not in text


def test_content_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert "<|message|>one two<|end|>" in prompt_of(chat() | {"messages": [USER | {"content": parts}]})


def test_effort_and_language_reach_the_prompt() -> None:
    text = prompt_of(chat(reasoning_effort="high", reasoning_language="français"))
    assert "Reasoning: high" in text
    assert "<|start|>developer<|message|># Instructions\n\nreasoning language: French<|end|>" in text
    assert "Reasoning: medium" in prompt_of(chat())
    assert "reasoning language" not in prompt_of(chat())


@pytest.mark.parametrize("role", ["system", "developer"])
def test_language_goes_first_in_the_developer_message(role: str) -> None:
    system = {"role": role, "content": "Be brief."}
    text = prompt_of(chat(reasoning_language="ja") | {"messages": [system, USER]})
    assert "<|start|>developer<|message|># Instructions\n\nreasoning language: Japanese\n\nBe brief.<|end|>" in text
    assert text.count("reasoning language") == 1


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_text_never_becomes_a_control_token(name: str) -> None:
    """The same conversation with harmless text of the same shape has exactly as many control tokens."""

    def control_tokens(text: str) -> list[int]:
        engine = ScriptedEngine([answer("hm", "4")])
        messages = [
            {"role": "system", "content": text},
            {"role": "developer", "content": text},
            {"role": "user", "content": [{"type": "text", "text": text}, {"type": "text", "text": text}]},
            {"role": "assistant", "content": text, "reasoning": text, "reasoning_content": text, "commentary": text},
            {"role": "user", "content": text},
        ]
        response = post(engine, chat(reasoning_language="fr") | {"messages": messages}, limits={"prompt_tokens": 1500})
        assert response.status_code == 200, response.text
        return [token for token in engine.requests[0][0] if token in CODEC.names]

    assert control_tokens(f"a{name}b{name}") == control_tokens("harmless")


def test_control_tokens_in_other_fields_do_no_harm() -> None:
    for name in CONTROL_TOKENS:
        assert refused(chat() | {"model": name})[0] == 404
        assert refused(chat(reasoning_language=name))[0] == 400
        assert refused(chat(reasoning_effort=name))[0] == 400


def test_body_is_read_only_up_to_its_limit() -> None:
    """A body without a length is cut off while it arrives."""

    async def endless() -> Any:
        while True:
            yield b" " * 1024

    async def run() -> int:
        async with http_client(application(ScriptedEngine([]))) as http:
            return (await http.post("/v1/chat/completions", content=endless())).status_code

    assert asyncio.run(run()) == 413
