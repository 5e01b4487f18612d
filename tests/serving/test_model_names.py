"""Several models at one endpoint: the checkpoint and adapters beside it, each under its own name."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from serving.engines.scripted import ScriptedEngine
from tests.serving.harness import MODEL, answer, application, chat, events, http_client, send, serving_config

MODELS: dict[str, dict[str, Any]] = {
    "model": {
        "path": "nowhere",
        "name": MODEL,
        "adapters": {"tiny-french": "runs/french", "tiny/日本語": "runs/japanese"},
    },
    "replicas": {"gpus": 1},
}
NAMES = [MODEL, "tiny-french", "tiny/日本語"]


def test_all_are_listed() -> None:
    async def call() -> httpx.Response:
        async with http_client(application(ScriptedEngine([]), **MODELS)) as http:
            return await http.get("/v1/models")

    models = asyncio.run(call()).json()["data"]
    assert [model["id"] for model in models] == NAMES
    assert all(set(model) == {"id", "object", "created", "owned_by"} for model in models)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_generates_with_the_adapter_that_it_names(name: str, stream: bool) -> None:
    engine = ScriptedEngine([answer("hm", "4")] * 2)
    body = chat(model=name, n=2, stream=stream)
    response = send("/v1/chat/completions", engine, body, **MODELS)
    assert response.status_code == 200, response.text
    told = [chunk for chunk in events(response.text) if chunk != "[DONE]"] if stream else [response.json()]
    assert {each["model"] for each in told} == {name}
    assert [sampling.adapter for _, sampling in engine.requests] == [None if name == MODEL else name] * 2


@pytest.mark.parametrize("name", NAMES)
def test_responses_do_too(name: str) -> None:
    engine = ScriptedEngine([answer("hm", "4")])
    response = send("/v1/responses", engine, {"model": name, "input": "2 + 2?"}, **MODELS)
    assert response.json()["model"] == name
    assert [sampling.adapter for _, sampling in engine.requests] == [None if name == MODEL else name]


def test_another_attempt_keeps_the_adapter() -> None:
    engine = ScriptedEngine([[], answer("hm", "4")])
    body = chat(model="tiny-french", on_malformed="retry")
    assert send("/v1/chat/completions", engine, body, **MODELS).status_code == 200
    assert [sampling.adapter for _, sampling in engine.requests] == ["tiny-french"] * 2


@pytest.mark.parametrize("name", ["tiny-german", "runs/french", "", "TINY"])
@pytest.mark.parametrize(("path", "rest"), [("chat/completions", chat()), ("responses", {"input": "2 + 2?"})])
def test_another_name_is_not_found(name: str, path: str, rest: dict[str, Any]) -> None:
    response = send(f"/v1/{path}", ScriptedEngine([answer("hm", "4")]), rest | {"model": name}, **MODELS)
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error["message"] == f"model {name!r} is not served here; 'tiny', 'tiny-french', 'tiny/日本語' are"


def test_a_name_is_given_once() -> None:
    model = {"path": "runs/tiny", "adapters": {"tiny": "runs/french"}}
    with pytest.raises(ValidationError, match="'tiny', which is what the checkpoint itself is served as"):
        serving_config(model=model, replicas={"gpus": 1})


def test_paths_of_adapters_hold_in_every_process(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = serving_config(**MODELS).with_absolute_paths()
    assert config.model.adapters["tiny-french"] == str(tmp_path / "runs" / "french")
