"""What stands around every answer: keys, limits, turns, readiness, what is counted, and the description of it all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.admission import Admission
from serving.api.app import create_app
from serving.config import ServingConfig
from serving.engines.scripted import ScriptedEngine
from serving.keys import ApiKey, KeyFile, hash_of, new_key
from serving.services import Services
from tests.serving.harness import CODEC, answer, chat, events, http_client, serving_config

GOOD = answer("The question is simple, I think that two plus two is four.", "Four")
KEY = new_key()


def keys_file(folder: Path, **limits: Any) -> str:
    created = "2026-01-01T00:00:00Z"
    entry = ApiKey.model_validate({"name": "ann", "sha256": hash_of(KEY), "created": created, **limits})
    KeyFile(keys=(entry,)).write(folder / "keys.json")
    return str(folder / "keys.json")


def with_client(
    engine: ScriptedEngine,
    config: ServingConfig,
    call: Callable[[httpx.AsyncClient], Coroutine[Any, Any, list[httpx.Response]]],
) -> tuple[list[httpx.Response], Services]:
    """Responses to `call`, and the services that stood before the engine."""

    async def run() -> tuple[list[httpx.Response], Services]:
        services = Services.local(config, engine)
        async with http_client(create_app(config, CODEC, engine, services)) as http:
            return await call(http), services

    return asyncio.run(run())


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_without_a_valid_key_nothing_is_answered(tmp_path: Path) -> None:
    engine = ScriptedEngine([GOOD])
    config = serving_config(security={"keys": keys_file(tmp_path)})

    async def call(http: httpx.AsyncClient) -> list[httpx.Response]:
        return [
            await http.post("/v1/chat/completions", json=chat()),
            await http.post("/v1/chat/completions", json=chat(), headers=bearer("wrong")),
            await http.get("/v1/models"),
            await http.get("/v1/models", headers=bearer(KEY)),
            await http.post("/v1/chat/completions", json=chat(), headers=bearer(KEY)),
            await http.get("/health"),
            await http.get("/ready"),
        ]

    responses, _ = with_client(engine, config, call)
    assert [response.status_code for response in responses] == [401, 401, 401, 200, 200, 200, 200]
    assert responses[0].json()["error"]["code"] == "invalid_api_key"
    assert responses[0].headers["www-authenticate"] == "Bearer"
    assert len(engine.requests) == 1
    assert all(KEY not in response.text for response in responses)


@pytest.mark.parametrize("limits", [{"requests_per_minute": 1}, {"tokens_per_minute": 500}])
def test_a_key_that_used_what_it_may_is_told_when_to_come_again(tmp_path: Path, limits: dict[str, int]) -> None:
    config = serving_config(security={"keys": keys_file(tmp_path, **limits)})

    async def call(http: httpx.AsyncClient) -> list[httpx.Response]:
        # The budget counts until it is known what was used: both are in flight at once.
        return list(
            await asyncio.gather(
                *(http.post("/v1/chat/completions", json=chat(), headers=bearer(KEY)) for _ in range(2))
            )
        )

    responses, _ = with_client(ScriptedEngine([GOOD, GOOD], pause=0.01), config, call)
    accepted, refused = sorted(responses, key=lambda response: response.status_code)
    assert (accepted.status_code, refused.status_code) == (200, 429)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) >= 1


def test_more_than_may_wait_are_refused_before_they_cost_anything() -> None:
    engine = ScriptedEngine([GOOD] * 8, pause=0.01)
    config = serving_config(
        engine={
            "maximum_concurrent": 1,
            "maximum_output_tokens": 400,
            "default_output_tokens": 300,
            "maximum_cached_tokens": 2048,
        },
        limits={"prompt_tokens": 600, "waiting_requests": 2},
        replicas={"gpus": 0, "target_ongoing_requests": 2},
    )

    async def call(http: httpx.AsyncClient) -> list[httpx.Response]:
        return list(await asyncio.gather(*(http.post("/v1/chat/completions", json=chat()) for _ in range(6))))

    responses, services = with_client(engine, config, call)
    statuses = sorted(response.status_code for response in responses)
    assert statuses == [200] * 3 + [429] * 3
    refused = next(response for response in responses if response.status_code == 429)
    assert refused.json()["error"]["code"] == "overloaded"
    assert int(refused.headers["retry-after"]) >= 1
    assert services.admission.running == services.admission.waiting == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_ended(stream: bool) -> None:
    engine = ScriptedEngine([GOOD], pause=0.05)
    config = serving_config(limits={"prompt_tokens": 600, "request_seconds": 1.0})

    async def call(http: httpx.AsyncClient) -> list[httpx.Response]:
        return [await http.post("/v1/chat/completions", json=chat(stream=stream))]

    (response,), _ = with_client(engine, config, call)
    # A stream that has begun has its status already.
    error = events(response.text)[-1]["error"] if response.status_code == 200 else response.json()["error"]
    assert error["code"] == "deadline_exceeded"
    assert response.status_code == (200 if stream else 504)
    assert engine.stats().running == 0


def test_a_draining_replica_is_not_ready() -> None:
    engine = ScriptedEngine([GOOD])

    async def run() -> tuple[int, int, int]:
        config = serving_config()
        services = Services.local(config, engine)
        async with http_client(create_app(config, CODEC, engine, services)) as http:
            before = (await http.get("/ready")).status_code
            assert await services.admission.drain(1.0)
            refused = await http.post("/v1/chat/completions", json=chat())
            return before, (await http.get("/ready")).status_code, refused.status_code

    assert asyncio.run(run()) == (200, 503, 429)


def test_what_is_counted() -> None:
    malformed = answer("hm", "4")[:2]
    engine = ScriptedEngine([GOOD, malformed, malformed, GOOD])

    async def call(http: httpx.AsyncClient) -> list[httpx.Response]:
        return [
            await http.post("/v1/chat/completions", json=chat(reasoning_language="en")),
            await http.post("/v1/chat/completions", json=chat(on_wrong_language="retry", reasoning_language="fr")),
            await http.post("/v1/chat/completions", json=chat(stream=True)),
            await http.post("/v1/chat/completions", json=chat(colour="red")),
        ]

    responses, services = with_client(engine, serving_config(), call)
    metrics = services.metrics
    assert [response.status_code for response in responses] == [200, 200, 200, 400]
    assert (metrics.total("requests", status="200"), metrics.total("requests", status="400")) == (3, 1)
    assert metrics.total("outcomes", outcome="complete") == 1
    assert metrics.total("language_verdicts", language="en", verdict="followed") == 1
    generated = sum(response.json()["usage"]["completion_tokens"] for response in responses[:2])
    assert metrics.total("generated_tokens") >= generated
    assert metrics.total("first_token_seconds") == 3


def test_one_key_that_floods_leaves_room_for_another() -> None:
    """A quiet key's request overtakes those of a key that sent many before it."""
    engine = ScriptedEngine([GOOD] * 12, pause=0.002)
    admission = Admission(engine, serving_config().limits, maximum_concurrent=1, maximum_tokens=2048, keys=lambda: 2)

    async def draw(key: str, ended: list[str]) -> None:
        from serving.engines.base import Sampling

        async for _ in admission.engine_for(key).generate([1, 2, 3], Sampling(100, CODEC.stop_tokens)):
            pass
        ended.append(key)

    async def run() -> list[str]:
        ended: list[str] = []
        flood = [asyncio.create_task(draw("loud", ended)) for _ in range(10)]
        await asyncio.sleep(0)
        await draw("quiet", ended)
        place = ended.index("quiet")
        await asyncio.gather(*flood)
        assert place < 4, ended
        return ended

    assert len(asyncio.run(run())) == 11


def test_the_openapi_page_describes_requests_and_errors() -> None:
    async def call(http: httpx.AsyncClient) -> list[httpx.Response]:
        return [await http.get("/openapi.json")]

    (response,), _ = with_client(ScriptedEngine([]), serving_config(), call)
    page = response.json()
    operation = page["paths"]["/v1/chat/completions"]["post"]
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    fields = page["components"]["schemas"][body["$ref"].rsplit("/", 1)[1]]["properties"]
    assert {"messages", "reasoning_language", "reasoning_effort", "on_malformed", "rescue"} <= set(fields)
    assert {"200", "400", "401", "404", "413", "429", "500", "502", "503", "504"} <= set(operation["responses"])
    assert "/ready" in page["paths"]
    assert json.dumps(page).count("$ref") == sum(
        reference.split('"')[0].rsplit("/", 1)[1] in page["components"]["schemas"]
        for reference in json.dumps(page).split('"$ref": "')[1:]
    )
