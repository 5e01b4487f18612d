"""Tokens of many streams: taken together where nothing depends on one of them, and neither lost nor repeated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import httpx
import pytest

from cluster.harmony import Conversation, Message
from serving.api.asked import Asked, wishes
from serving.config import ServingConfig
from serving.engines.base import Batch, EngineError, Sampling, TokenLogprob
from serving.engines.dispatch import Stream
from serving.engines.sampling import Draw
from serving.engines.scripted import ScriptedEngine
from serving.generation import Generation
from tests.benchmarks.serving_replicas import Clocked
from tests.serving.harness import CODEC, answer, application, chat, events, http_client, joined, serving_config

THINKING = " ".join(["two is four"] * 20)
FINAL = "four is two"
TOKENS = answer(THINKING, FINAL)
STREAMS = 8
STEP_SECONDS = 0.002
SECTIONS: dict[str, Any] = {
    # The longest, for 256 streams: 31 ms for each of these.
    "endpoint": {"gathering_seconds": 1.0},
    "engine": {"maximum_concurrent": STREAMS, "maximum_cached_tokens": 100_000, "default_output_tokens": 300},
}


class Counted(Clocked):
    """An engine with a clock that begins when all streams are there, and counts the batches that it hands over."""

    def __init__(self, streams: int) -> None:
        super().__init__(TOKENS, STEP_SECONDS)
        self.batches = 0
        self._barrier = asyncio.Barrier(streams)

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Batch, None]:
        await self._barrier.wait()
        async with aclosing(super().generate(prompt, replace(sampling, maximum_tokens=len(TOKENS)))) as batches:
            async for batch in batches:
                self.batches += 1
                yield batch


def ask(engine: Counted, streams: int, **fields: Any) -> list[httpx.Response]:
    """Answers to requests that run at the same time."""

    async def run() -> list[httpx.Response]:
        async with http_client(application(engine, **SECTIONS)) as http:
            posts = [http.post("/v1/chat/completions", json=chat(**fields)) for _ in range(streams)]
            return list(await asyncio.gather(*posts))

    return asyncio.run(run())


def test_tokens_of_many_streams_are_taken_together() -> None:
    engine = Counted(STREAMS)
    for response in ask(engine, STREAMS, stream=True, stream_options={"include_usage": True}):
        *chunks, usage, done = events(response.text)
        assert (joined(chunks, "reasoning"), joined(chunks, "content")) == (THINKING, FINAL)
        assert usage["usage"]["completion_tokens"] == len(TOKENS)
        assert done == "[DONE]"
    seconds = len(TOKENS) * STEP_SECONDS
    assert engine.batches <= STREAMS * (2 + seconds / (SECTIONS["endpoint"]["gathering_seconds"] * STREAMS / 256))


def test_whole_answers_are_the_same() -> None:
    for response in ask(Counted(STREAMS), STREAMS):
        message = response.json()["choices"][0]["message"]
        assert (message["reasoning"], message["content"]) == (THINKING, FINAL)
        assert response.json()["usage"]["completion_tokens"] == len(TOKENS)


@pytest.mark.parametrize(
    ("fields", "policy", "patient"),
    [
        ({}, {}, True),
        ({"language": "fr"}, {"on_wrong_language": "retry"}, True),
        ({"stop": ("four",)}, {}, False),
        ({"parallel_calls": False}, {}, False),
        ({"must_call": "functions"}, {}, False),
        ({"rescue": True}, {}, False),
        ({}, {"rescue_share": 0.2}, False),
    ],
)
def test_where_the_server_acts_on_a_token_none_is_taken_late(
    fields: dict[str, Any], policy: dict[str, Any], patient: bool
) -> None:
    """What an engine made after that token would count against the caller."""
    config: ServingConfig = serving_config(policy=policy)
    conversation = Conversation(messages=(Message(role="user", content="What is two plus two?"),))
    (wish,) = asyncio.run(wishes(Asked("tiny", conversation, **fields), config, CODEC))
    assert Generation(ScriptedEngine([]), CODEC, wish).patient is patient


def test_who_comes_late_takes_all_that_has_come() -> None:
    async def run() -> None:
        sampling = Sampling(9, (), logprobs=0)
        stream = Stream(asyncio.get_running_loop(), 1, Draw(sampling))
        scores = [TokenLogprob(-float(token)) for token in range(4)]
        stream.put(Batch([0], scores[:1]), Batch([1, 2], scores[1:3]))
        stream.put(Batch([3], scores[3:]), EngineError("gone"))
        await asyncio.sleep(0)
        assert await stream.take() == Batch([0, 1, 2, 3], scores)
        with pytest.raises(EngineError, match="gone"):
            await stream.take()

        plain = Stream(asyncio.get_running_loop(), 1, Draw(replace(sampling, logprobs=None)))
        plain.put(Batch([0]))
        assert await plain.take() == Batch([0])
        plain.put(Batch([1]), Batch([2]), None)
        await asyncio.sleep(0)
        assert await plain.take() == Batch([1, 2])
        assert await plain.take() is None

    asyncio.run(run())
