"""One request from its header to its last byte: who asks, what it costs, what is measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from cluster.harmony import Codec
from serving.api.asked import Asking
from serving.api.errors import to_api_error
from serving.api.fields import parse_request
from serving.api.http import event_stream, read_body, unless_disconnected
from serving.config import ServingConfig
from serving.engines.base import Batch, Engine, EngineView, Sampling
from serving.generation import Generation
from serving.keys import ANONYMOUS, Caller, Reservation
from serving.services import Services

_MANY_STREAMS = 256
"""from so many on tokens are gathered as long as they may be; up to there a replica's pieces a second stay the same"""
_EARLY = 0.75
"""after so much of the time what comes is sent, rather than held for what comes next"""


@dataclass(frozen=True)
class Endpoint:
    """What every route needs."""

    config: ServingConfig
    codec: Codec
    services: Services

    def gathering_seconds(self) -> float:
        """How long tokens of a stream are gathered before they are sent, growing with what runs beside it."""
        longest = self.config.endpoint.gathering_seconds
        return longest * min(1.0, self.services.admission.running / _MANY_STREAMS) if longest else 0.0

    def sending_seconds(self) -> float:
        """Least time between what is sent of a stream: tokens that an engine has gathered come a little early too."""
        return self.gathering_seconds() * _EARLY


class Job(Protocol):
    """A request that was found good."""

    @property
    def choices(self) -> list[Generation]: ...
    @property
    def prompt_tokens(self) -> int: ...


AskingT = TypeVar("AskingT", bound=Asking, contravariant=True)


class Interface(Protocol[AskingT]):
    """A form that requests and answers come in; a module is one. Its jobs are its own."""

    async def prepare(self, request: AskingT, config: ServingConfig, codec: Codec, engine: Engine) -> Any:
        """A `Job`: everything that can be refused is, before anything is drawn."""

    async def complete(self, job: Any) -> dict[str, Any]:
        """The answer in one piece."""
        ...

    def stream(self, job: Any) -> AsyncGenerator[str, None]:
        """The answer as server-sent events."""
        ...


async def answer(
    request: Request, endpoint: Endpoint, model: type[AskingT], interface: Interface[AskingT], ending: str
) -> Response:
    """The response to a request in one of the interfaces; `ending` closes its streams.

    Raises:
        ApiError: what the client is told, before the response has begun.
    """
    exchange = _Exchange(endpoint.services)
    try:
        caller = exchange.identify(request)
        wanted = parse_request(model, await read_body(request, endpoint.config.limits.body_bytes))
        engine = _RequestEngine(endpoint.services.admission.engine_for(caller.name), exchange)
        job = await interface.prepare(wanted, endpoint.config, endpoint.codec, engine)
        exchange.begin(job)
        if engine.accumulates and all(choice.patient for choice in job.choices):
            engine.gathering_seconds = endpoint.gathering_seconds
        if wanted.stream:
            return await event_stream(request, exchange.watch(interface.stream(job)), ending, endpoint.sending_seconds)
        body = await unless_disconnected(request, interface.complete(job))
        exchange.end(200)
        return JSONResponse(body)
    except Exception as error:
        told = to_api_error(error)
        exchange.end(told.status)
        # A bug must not go further: Serve would log its message, which may hold what the request does.
        raise told from None
    except BaseException:
        exchange.end(499)
        raise


class _Exchange:
    """What is known of one request, and told to metrics and limits when it ends."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._began = time.perf_counter()
        self._caller = Caller(ANONYMOUS)
        self._reservation: Reservation | None = None
        self._job: Job | None = None
        self._ended = False
        self.token_seconds = 0.0

    def identify(self, request: Request) -> Caller:
        """Who asks.

        Raises:
            InvalidKeyError, RateLimitError: the request may not come in, or not now.
        """
        self._caller = self._services.keys.authenticate(request.headers.get("authorization"))
        self._caller.count_request()
        return self._caller

    def begin(self, job: Job) -> None:
        """Nothing is refused any more, but for tokens that the caller has used up.

        Raises:
            RateLimitError: it has.
        """
        most = job.prompt_tokens + sum(choice.budget_tokens for choice in job.choices)
        self._reservation = self._caller.reserve_tokens(most)
        self._job = job
        self._services.metrics.prompted(self._caller.name, job.prompt_tokens)

    def first_token(self) -> None:
        """A generation's first token has come."""
        self._services.metrics.first_token(time.perf_counter() - self._began)

    async def watch(self, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        """The events; with the last of them, or with the client's leaving, the request has ended."""
        status = 499
        try:
            async with aclosing(events):
                async for each in events:
                    yield each
            status = 200
        except Exception as error:
            status = to_api_error(error).status
            raise
        finally:
            self.end(status)

    def end(self, status: int) -> None:
        """Tell what the request came to; a second call does nothing."""
        if self._ended:
            return
        self._ended = True
        metrics, key = self._services.metrics, self._caller.name
        metrics.responded(status, key, time.perf_counter() - self._began)
        choices = self._job.choices if self._job else []
        used = sum(choice.tokens for choice in choices)
        if self._reservation is not None and self._job is not None:
            self._reservation.settle(self._job.prompt_tokens + used)
        for choice in choices:
            for reason in choice.retry_reasons:
                metrics.retried(reason)
            if not choice.done:
                continue
            seconds = self.token_seconds / len(choices)
            metrics.finished(choice.reply.outcome.value, key=key, tokens=choice.tokens, seconds=seconds)
            language = choice.language
            if language.requested is not None:
                metrics.language(language.requested, language.verdict.value)
            if choice.rescued:
                metrics.rescued()


class _RequestEngine(EngineView):
    """One request's engine: tells an exchange when tokens come, and comes late for them where many run beside it.

    Each batch that an engine hands over costs as much as many tokens, so that those of an engine that `accumulates` are
    taken every `gathering_seconds`; the first are taken at once, and nobody waits after the last.
    """

    def __init__(self, engine: Engine, exchange: _Exchange) -> None:
        super().__init__(engine)
        self.gathering_seconds: Callable[[], float] = lambda: 0.0
        self._exchange = exchange

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Batch, None]:
        first = last = 0.0
        left = sampling.maximum_tokens
        async with aclosing(self.engine.generate(prompt, sampling)) as batches:
            try:
                async for batch in batches:
                    last = time.perf_counter()
                    if not first:
                        first = last
                        self._exchange.first_token()
                    yield batch
                    left -= len(batch.tokens)
                    if left <= 0 or batch.tokens[-1] in sampling.stop_tokens:
                        continue
                    if (wait := last + self.gathering_seconds() - time.perf_counter()) > 0:
                        await asyncio.sleep(wait)
            finally:
                self._exchange.token_seconds += last - first
