"""What is measured: the times of one request, and the figures of many.

All times are seconds on one clock that starts with the load. The definitions, which reports repeat, are `DEFINITIONS`.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

DEFINITIONS = {
    "time_to_first_token": "from when the request was due until the first chunk that carries text or a tool call",
    "inter_token_latency": "from the first such chunk to the last, divided by the tokens after the first; one figure a "
    "request",
    "inter_chunk_latency": "between two such chunks that follow each other in one stream; one figure a gap. Chunks "
    "that arrive in one read count as having come together",
    "end_to_end_latency": "from when the request was due until its stream ended",
    "send_delay": "from when the request was due until it was sent. Of the load generator, and contained in the "
    "others: in an open loop a request is due when its arrival was drawn, whatever the server or the generator does",
}
"""what each latency is, in words"""

LATENCIES = tuple(DEFINITIONS)
PERCENTILES = (50, 90, 95, 99)


@dataclass(eq=False)
class Exchange:
    """One request and its answer. Without an `error` the answer came whole."""

    due: float
    sent: float = 0.0
    first: float | None = None
    last: float | None = None
    end: float = 0.0
    chunks: int = 0
    """that carry text or a tool call"""
    gaps: array[float] = field(default_factory=lambda: array("d"))
    """between chunks"""
    chunks_by_second: Counter[int] = field(default_factory=Counter)
    completion_tokens: int | None = None
    """as the server counts; None where it sent no usage"""
    prompt_tokens: int | None = None
    error: str | None = None
    """kind of failure, such as `http 429`; the reason is in `message`"""
    message: str = ""

    @property
    def tokens(self) -> int:
        """Tokens of the answer; chunks, where the server does not count."""
        return self.chunks if self.completion_tokens is None else self.completion_tokens

    def receive(self, now: float) -> None:
        """A chunk with text or a call arrived."""
        if self.last is None:
            self.first = now
        else:
            self.gaps.append(now - self.last)
        self.last = now
        self.chunks += 1
        self.chunks_by_second[int(now)] += 1

    def fail(self, kind: str, message: str, now: float) -> None:
        """The answer did not come, or not whole."""
        self.error, self.message, self.end = kind, message, now


class Distribution(NamedTuple):
    """Figures of one latency over all requests, in seconds."""

    measured: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


@dataclass(frozen=True)
class Summary:
    """Figures of a whole load, or of a part of it. Latencies are of requests that were answered whole."""

    requests: int
    succeeded: int
    failed: int
    seconds: float
    """from the first request's time due to the last answer's end"""
    requests_per_second: float
    """answered whole"""
    tokens_per_second: float
    """of completions, over `seconds`; of answers that broke off, what came of them"""
    completion_tokens: int
    prompt_tokens: int | None
    """None where the server did not say of each request"""
    tokens_from: str
    """`usage`, `chunks`, or `usage, else chunks` where only some answers carried usage"""
    latencies: dict[str, Distribution | None]
    """by `LATENCIES`; None where nothing was measured"""
    errors: dict[str, int]
    """failures by kind"""
    error_messages: dict[str, str]
    """the first message of each kind"""


def summarise(exchanges: Sequence[Exchange]) -> Summary:
    """The figures of `exchanges`, which have ended."""
    whole = [exchange for exchange in exchanges if exchange.error is None]
    failed = [exchange for exchange in exchanges if exchange.error is not None]
    start = min((exchange.due for exchange in exchanges), default=0.0)
    seconds = max((exchange.end for exchange in exchanges), default=0.0) - start
    tokens = sum(exchange.tokens for exchange in exchanges)
    prompts = [exchange.prompt_tokens for exchange in whole]
    counted = {exchange.completion_tokens is not None for exchange in exchanges if exchange.chunks}
    messages: dict[str, str] = {}
    for exchange in failed:
        messages.setdefault(str(exchange.error), exchange.message)
    return Summary(
        requests=len(exchanges),
        succeeded=len(whole),
        failed=len(failed),
        seconds=seconds,
        requests_per_second=len(whole) / seconds if seconds > 0 else 0.0,
        tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
        completion_tokens=tokens,
        prompt_tokens=None if None in prompts else sum(prompt or 0 for prompt in prompts),
        tokens_from="usage, else chunks" if len(counted) > 1 else "usage" if True in counted else "chunks",
        latencies={name: distribution(_latencies(name, whole)) for name in LATENCIES},
        errors=dict(Counter(str(exchange.error) for exchange in failed).most_common()),
        error_messages=messages,
    )


def distribution(values: Iterable[float]) -> Distribution | None:
    """Mean, percentiles (nearest rank: values that were measured, none between them) and the largest."""
    ordered = sorted(values)
    if not ordered:
        return None
    p50, p90, p95, p99 = (percentile(ordered, share) for share in PERCENTILES)
    return Distribution(len(ordered), math.fsum(ordered) / len(ordered), p50, p90, p95, p99, ordered[-1])


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` percent of the values do not exceed."""
    return ordered[max(0, math.ceil(share / 100 * len(ordered)) - 1)]


class Window(NamedTuple):
    """A stretch of the load. Latencies are of the answers that ended in it, None where none did."""

    start: float
    seconds: float
    tokens_per_second: float
    time_to_first_token_p50: float | None
    time_to_first_token_p99: float | None
    end_to_end_latency_p50: float | None
    end_to_end_latency_p99: float | None
    failed: int


def over_time(exchanges: Sequence[Exchange], windows: int = 60) -> list[Window]:
    """The load cut into at most `windows` stretches of whole seconds.

    An answer's tokens are laid over its chunks evenly: a server that sends several tokens in a chunk does not say how
    many.
    """
    if not exchanges:
        return []
    end = max(exchange.end for exchange in exchanges)
    width = max(1, math.ceil(end / windows))
    count = max(1, int(end) // width)  # what is left of a stretch belongs to the last
    tokens: defaultdict[int, float] = defaultdict(float)
    ended: defaultdict[int, list[Exchange]] = defaultdict(list)
    for exchange in exchanges:
        ended[min(int(exchange.end) // width, count - 1)].append(exchange)
        for second, chunks in exchange.chunks_by_second.items():
            tokens[min(second // width, count - 1)] += chunks * exchange.tokens / exchange.chunks
    return [
        _window(place * width, end - place * width if place == count - 1 else width, tokens[place], ended[place])
        for place in range(count)
    ]


def _window(start: float, seconds: float, tokens: float, ended: Sequence[Exchange]) -> Window:
    whole = [exchange for exchange in ended if exchange.error is None]
    first = distribution(_latencies("time_to_first_token", whole))
    total = distribution(_latencies("end_to_end_latency", whole))
    return Window(
        start=float(start),
        seconds=seconds,
        tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
        time_to_first_token_p50=first and first.p50,
        time_to_first_token_p99=first and first.p99,
        end_to_end_latency_p50=total and total.p50,
        end_to_end_latency_p99=total and total.p99,
        failed=len(ended) - len(whole),
    )


def _latencies(name: str, exchanges: Iterable[Exchange]) -> Iterable[float]:
    for exchange in exchanges:
        if name == "end_to_end_latency":
            yield exchange.end - exchange.due
        elif name == "send_delay":
            yield exchange.sent - exchange.due
        elif exchange.first is None or exchange.last is None:
            continue
        elif name == "time_to_first_token":
            yield exchange.first - exchange.due
        elif name == "inter_chunk_latency":
            yield from exchange.gaps
        elif name == "inter_token_latency" and exchange.tokens > 1:
            yield (exchange.last - exchange.first) / (exchange.tokens - 1)
