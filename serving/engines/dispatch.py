"""The way back from the batching thread: tokens to the event loops that wait for them, and word of its death to all."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import dataclass, field

from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput

from serving.engines.base import Batch, EngineError
from serving.engines.sampling import Draw

_POLL_SECONDS = 0.1
"""longest time until a dead batching thread is noticed"""
_REPEAT_SECONDS = 1.0
"""how long a cancellation is said again"""

_logger = logging.getLogger(__name__)


@dataclass
class Stream:
    """One request's way back: what the dispatcher found, on the event loop that asked."""

    loop: asyncio.AbstractEventLoop
    prompt_tokens: int
    draw: Draw
    items: asyncio.Queue[Batch | EngineError | None] = field(default_factory=asyncio.Queue)
    delivered: int = 0

    async def take(self) -> Batch | None:
        """All tokens that came since the last call, once there are some; None when the generation has ended.

        Raises:
            EngineError: it failed, and what came before was taken.
        """
        item = await self.items.get()
        if item is None:
            return None
        if isinstance(item, EngineError):
            raise item
        while not self.items.empty():
            more = self.items.get_nowait()
            if not isinstance(more, Batch):
                self.items.put_nowait(more)  # the ending, which is the last
                break
            item = Batch(item.tokens + more.tokens, item.logprobs and item.logprobs + (more.logprobs or []))
        return item

    def put(self, *items: Batch | EngineError | None) -> None:
        """Called by the dispatcher's thread."""
        try:
            for item in items:
                self.loop.call_soon_threadsafe(self.items.put_nowait, item)
        except RuntimeError:
            _logger.debug("a result was dropped: the event loop that asked for it is closed")


class Dispatcher:
    """A thread that takes results off the library's queue and hands each to its stream; ends with the batching thread.

    Streams may be added and cancelled from any thread. `death` is why the batching thread has ended, and None before.
    """

    def __init__(self, manager: ContinuousBatchingManager) -> None:
        self.death: str | None = None
        self.generated_tokens = 0
        self._manager = manager
        self._streams: dict[str, Stream] = {}
        self._cancelled: dict[str, float] = {}
        self._repeated_at = 0.0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine-dispatcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def alive(self) -> bool:
        return self.death is None and self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()

    def end(self, reason: str) -> None:
        """Refuses further streams; those that are open end with the batching thread."""
        with self._lock:
            self.death = self.death or reason

    def add(self, request_id: str, stream: Stream) -> None:
        """Awaits results for `stream`; EngineError once the batching thread has ended."""
        with self._lock:
            if self.death:
                raise EngineError(self.death)
            self._streams[request_id] = stream

    def forget(self, request_id: str) -> bool:
        """Awaits no more results for a request; whether it had not ended yet."""
        return self._streams.pop(request_id, None) is not None

    def cancel(self, request_id: str) -> None:
        """Ends the request in the library, where it leaves the batch before the next step."""
        self._manager.cancel_request(request_id)
        self._cancelled[request_id] = time.monotonic() + _REPEAT_SECONDS

    def tokens_in_flight(self) -> int:
        """Prompt and generated tokens of the requests that have not ended."""
        return sum(stream.prompt_tokens + stream.delivered for stream in list(self._streams.values()))

    def _run(self) -> None:
        manager = self._manager
        try:
            while manager.is_running():
                output = manager.get_result(timeout=_POLL_SECONDS)
                if output is not None:
                    self._deliver(output)
                self._repeat_cancellations()
            while (output := manager.get_result(timeout=0)) is not None:
                self._deliver(output)
        finally:
            self.end(f"the batching thread has died: {manager.background_thread_status.fatal_error!r}")
            with self._lock:
                streams, self._streams = self._streams, {}
            for stream in streams.values():
                stream.put(EngineError(self.death))

    def _deliver(self, output: GenerationOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            if not output.is_finished():
                self._manager.cancel_request(output.request_id)
            return
        start = stream.delivered
        new = output.generated_tokens[start:]
        stream.delivered += len(new)
        self.generated_tokens += len(new)
        asked = stream.draw.sampling.logprobs is not None
        logprobs = stream.draw.logprobs[start : stream.delivered] if asked else None
        pieces = [Batch(new, logprobs)] if new else []
        if not output.is_finished():
            stream.put(*pieces)
        elif self.forget(output.request_id):
            stream.put(*pieces, EngineError(output.error) if output.error is not None else None)

    def _repeat_cancellations(self) -> None:
        """Says recent cancellations again. The library empties its queue of requests first and that of cancellations
        after it: one that falls between the two overtakes its request there and is forgotten."""
        now = time.monotonic()
        if not self._cancelled or now < self._repeated_at + _POLL_SECONDS:
            return
        self._repeated_at = now
        for request_id, until in list(self._cancelled.items()):
            self._manager.cancel_request(request_id)
            if now > until:
                self._cancelled.pop(request_id, None)
