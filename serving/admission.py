"""Who gets in: requests of many keys wait for their fair turn at one engine, and for no longer than they may.

Back-pressure comes here, before memory is at risk: what runs at a time never takes more places or tokens than the
engine has, prompt and whole budget counted, and what waits is bounded too. All of it runs on one event loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable

from serving.config import LimitsConfig, ServingConfig
from serving.engines.base import Batch, Engine, EngineError, EngineView, Sampling
from serving.fairness import FairQueue, Ticket

_RATE_SECONDS = 30.0
"""how far back the rate of service looks"""
_UNKNOWN_RATE_RETRY_SECONDS = 5


class OverloadedError(Exception):
    """There is more to do than may wait; `retry_after_seconds` is a guess at when that will be over, at least 1."""

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class DeadlineError(Exception):
    """The request took longer than `limits.request_seconds`, waiting included, and was ended."""


class Admission:
    """A fair, bounded queue in front of an engine; see `serving.fairness` for whose turn it is.

    Args:
        engine: what generates.
        limits: how many may wait and for how long, and how long a request may take.
        maximum_concurrent: requests that the engine has places for.
        maximum_tokens: tokens that the engine can hold.
        keys: how many keys may come; with more than one, an eighth of places and tokens is kept for those that run
            nothing.
        waited: is told the seconds that each admitted request waited.
        clock: seconds.
    """

    def __init__(
        self,
        engine: Engine,
        limits: LimitsConfig,
        *,
        maximum_concurrent: int,
        maximum_tokens: int,
        keys: Callable[[], int] = lambda: 1,
        waited: Callable[[float], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.limits = limits
        self._queue = FairQueue(maximum_concurrent, maximum_tokens, keys)
        self._wakers: dict[Ticket, asyncio.Future[None]] = {}
        self._emptied: list[asyncio.Future[None]] = []
        self._waited = waited
        self._clock = clock
        self._rate = _Rate(clock())
        self._draining = False
        self._closed = False

    @classmethod
    def of(
        cls,
        config: ServingConfig,
        engine: Engine,
        *,
        keys: Callable[[], int] = lambda: 1,
        waited: Callable[[float], None] = lambda _: None,
    ) -> Admission:
        """The admission that a configuration asks for."""
        return cls(
            engine,
            config.limits,
            maximum_concurrent=config.engine.maximum_concurrent,
            maximum_tokens=config.engine.maximum_cached_tokens,
            keys=keys,
            waited=waited,
        )

    def engine_for(self, key: str) -> Engine:
        """The engine as one request of `key` sees it: each of its generations waits for its turn.

        `limits.request_seconds` count from this call, for all generations of the request together. Beside the engine's
        own errors, `generate` raises `OverloadedError` and `DeadlineError`.
        """
        return _Turns(self, key, self._clock() + self.limits.request_seconds, refused=self._draining)

    @property
    def open(self) -> bool:
        """Whether a request made now would be let in, if need be after a wait."""
        return not self._draining

    @property
    def waiting(self) -> int:
        """Requests that wait for a place."""
        return self._queue.waiting

    @property
    def running(self) -> int:
        """Requests that the engine has."""
        return self._queue.running

    @property
    def tokens_in_flight(self) -> int:
        """Tokens of prompts and budgets that the running requests may come to take."""
        return self._queue.running_tokens

    @property
    def waiting_tokens(self) -> int:
        """The same for the waiting requests."""
        return self._queue.waiting_tokens

    @property
    def queue_seconds(self) -> float:
        """How long the oldest waiting request has waited; 0 when none does."""
        oldest = self._queue.oldest()
        return 0.0 if oldest is None else max(0.0, self._clock() - oldest.arrived)

    def gauges(self) -> dict[str, float]:
        """Where the queue stands now, by the names of the metrics."""
        return {
            "queue_seconds": self.queue_seconds,
            "tokens_in_flight": self.tokens_in_flight,
            "running": self.running,
            "waiting": self.waiting,
        }

    async def drain(self, seconds: float) -> bool:
        """Let in no request made from now on, and wait until the others have ended, at most so long.

        Returns:
            Whether all have ended.
        """
        self._draining = True
        if not (self.running or self.waiting):
            return True
        emptied: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._emptied.append(emptied)
        done, _ = await asyncio.wait((emptied,), timeout=seconds)
        return bool(done)

    def close(self) -> None:
        """Let nothing in any more; waiting requests raise `EngineError`, running ones go on."""
        self._draining = self._closed = True
        for ticket in self._queue.all_waiting():
            self._refuse(ticket, EngineError("the replica is shutting down"))

    async def _enter(self, key: str, tokens: int, deadline: float) -> Ticket:
        """Wait for a place; whoever gets the ticket gives it back with `_leave`."""
        if self._closed:
            raise EngineError("the replica is shutting down")
        if tokens > self._queue.tokens:
            raise ValueError(f"prompt and answer take up to {tokens} tokens, more than the {self._queue.tokens} kept")
        ticket = Ticket(key, tokens, self._clock())
        self._queue.push(ticket)
        self._admit()
        if ticket.admitted:
            self._waited(0.0)
            return ticket
        loop = asyncio.get_running_loop()
        waker = self._wakers[ticket] = loop.create_future()
        if self.waiting > self.limits.waiting_requests:
            self._refuse(self._queue.surplus(key), self._overloaded("too many requests wait for the engine already"))
        left = deadline - ticket.arrived
        timer = loop.call_later(min(self.limits.waiting_seconds, left), self._give_up, ticket, left)
        try:
            await waker
        except BaseException:
            # Cancelled, perhaps after a place was given: then the place goes to the next.
            if ticket.admitted:
                self._leave(ticket, 0)
            elif self._wakers.pop(ticket, None) is not None:
                self._queue.remove(ticket)
                self._admit()
            raise
        finally:
            timer.cancel()
        self._waited(self._clock() - ticket.arrived)
        return ticket

    def _leave(self, ticket: Ticket, used: int) -> None:
        if ticket.ended:
            return
        self._queue.release(ticket, used)
        if used:
            self._rate.count(self._clock())
        self._admit()

    def _admit(self) -> None:
        """Give every free place to the one whose turn it is."""
        while (ticket := self._queue.admit()) is not None:
            waker = self._wakers.pop(ticket, None)
            if waker is not None and not waker.done():
                waker.set_result(None)
        if self._emptied and not (self.running or self.waiting):
            for future in self._emptied:
                if not future.done():
                    future.set_result(None)
            self._emptied.clear()

    def _give_up(self, ticket: Ticket, left: float) -> None:
        """The request has waited as long as it may."""
        if ticket not in self._wakers:
            return
        if left <= self.limits.waiting_seconds:
            self._refuse(ticket, _deadline_exceeded(self.limits))
        else:
            self._refuse(ticket, self._overloaded(f"no place came free in {self.limits.waiting_seconds:g} s"))

    def _refuse(self, ticket: Ticket, error: Exception) -> None:
        self._queue.remove(ticket)
        waker = self._wakers.pop(ticket)
        if not waker.done():
            waker.set_exception(error)
        self._admit()

    def _overloaded(self, message: str) -> OverloadedError:
        """Says when those that wait now will have been served, at the rate of the last half minute."""
        rate = self._rate.at(self._clock())
        seconds = math.ceil((self.waiting + 1) / rate) if rate > 0 else _UNKNOWN_RATE_RETRY_SECONDS
        return OverloadedError(message, max(1, min(seconds, math.ceil(self.limits.waiting_seconds))))


class _Turns(EngineView):
    """One request's view of the engine."""

    def __init__(self, admission: Admission, key: str, deadline: float, *, refused: bool) -> None:
        super().__init__(admission.engine)
        self._admission = admission
        self._key = key
        self._deadline = deadline
        self._refused = refused

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncGenerator[Batch, None]:
        admission = self._admission
        if self._refused:
            raise OverloadedError("the replica is shutting down", 1)
        if self._deadline <= admission._clock():
            raise _deadline_exceeded(admission.limits)
        ticket = await admission._enter(self._key, len(prompt) + sampling.maximum_tokens, self._deadline)
        passage = _Passage(admission, ticket, self.engine.generate(prompt, sampling), len(prompt))
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._deadline - admission._clock(), passage.expire)
        batches = passage.batches
        try:
            while True:
                passage.begin_reading()
                batch = await anext(batches)
                passage.reading = False
                passage.used += len(batch.tokens)
                yield batch
                if passage.expired:
                    raise _deadline_exceeded(admission.limits)
        except StopAsyncIteration:
            return
        except asyncio.CancelledError:
            if passage.woke_reader():
                raise _deadline_exceeded(admission.limits) from None
            raise
        finally:
            timer.cancel()
            await passage.close()


class _Passage:
    """One generation on its way through: what it took so far, and how it ends early."""

    def __init__(self, admission: Admission, ticket: Ticket, batches: AsyncGenerator[Batch, None], used: int) -> None:
        self.admission = admission
        self.ticket = ticket
        self.batches = batches
        self.used = used
        self.reading = False
        """whether the reader waits for the engine now, or does something else with what it got"""
        self.expired = False
        self._reader: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._woken = False
        self._closing: asyncio.Task[None] | None = None

    def begin_reading(self) -> None:
        """The running task waits for the next batch; it need not be the one that waited for the last."""
        reader = asyncio.current_task()
        if reader is not self._reader and reader is not None:
            self._reader, self._cancelling = reader, reader.cancelling()
        self.reading = True

    def expire(self) -> None:
        """The request's time is over: wakes its reader, or ends the generation behind the back of a slow one."""
        self.expired = True
        if self.reading and self._reader is not None:
            self._woken = True
            self._reader.cancel()
        else:
            self._closing = asyncio.get_running_loop().create_task(self._close())

    def woke_reader(self) -> bool:
        """Whether the cancellation that the running task received is the one of `expire`, and no other."""
        return self._woken and self._reader is not None and self._reader.uncancel() <= self._cancelling

    async def close(self) -> None:
        """End the engine's part and give the place back."""
        if self._closing is not None:
            await asyncio.shield(self._closing)
        else:
            await self._close()

    async def _close(self) -> None:
        try:
            await self.batches.aclose()
        finally:
            self.admission._leave(self.ticket, self.used)


class _Rate:
    """Requests ended in a second, the recent ones weighing most."""

    def __init__(self, now: float) -> None:
        self._started = self._last = now
        self._count = 0.0

    def count(self, now: float) -> None:
        self._count = self._faded(now) + 1
        self._last = now

    def at(self, now: float) -> float:
        """0 where nothing has ended yet."""
        return self._faded(now) / max(1.0, min(_RATE_SECONDS, now - self._started))

    def _faded(self, now: float) -> float:
        return self._count * math.exp((self._last - now) / _RATE_SECONDS)


def _deadline_exceeded(limits: LimitsConfig) -> DeadlineError:
    return DeadlineError(f"the request took longer than the {limits.request_seconds:g} s that are allowed")
