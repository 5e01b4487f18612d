"""What an endpoint measures about its requests. The definitions are `cluster.metrics.SERVING_METRICS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cluster.metrics import RESEND_SECONDS, SERVING, SERVING_METRICS, Recorder

__all__ = ["SERVING_METRICS", "ServingMetrics"]


class ServingMetrics:
    """Counts requests, tokens, outcomes and times; each call is for a whole request or choice, none for a token.

    Where this process belongs to a Ray, Prometheus finds everything at the node's metrics port, some seconds later.

    Args:
        application: name of the Serve application.
        replica: id of the replica.
        gauges: asked for `queue_seconds`, `tokens_in_flight`, `running` and `waiting` every few seconds.
        period: seconds between two reports to Ray.
    """

    def __init__(
        self,
        application: str,
        replica: str,
        gauges: Callable[[], Mapping[str, float]] = dict,
        *,
        period: float = RESEND_SECONDS,
    ) -> None:
        self.replica = replica
        tags = {"application": application, "replica": replica}
        self.recorder = Recorder(SERVING, SERVING_METRICS, tags, gauges=gauges, period=period)

    def queue_wait(self, seconds: float) -> None:
        """A generation got its place after `seconds`."""
        self.recorder.observe("queue_wait_seconds", seconds)

    def first_token(self, seconds: float) -> None:
        """A choice's first token came `seconds` after its request."""
        self.recorder.observe("first_token_seconds", seconds)

    def responded(self, status: int, key: str, seconds: float) -> None:
        """A request of the key named `key` was answered, to its end, with an HTTP status."""
        self.recorder.count("requests", status=str(status), key=key)
        self.recorder.observe("request_seconds", seconds)

    def prompted(self, key: str, tokens: int) -> None:
        """A request brought a prompt of `tokens`."""
        self.recorder.count("prompt_tokens", tokens, key=key)

    def finished(self, outcome: str, *, key: str, tokens: int, seconds: float) -> None:
        """A choice has ended.

        Args:
            outcome: of its completion, as the codec names it.
            key: name of the API key.
            tokens: generated for it, in all its attempts.
            seconds: from its first token to its last, over all attempts.
        """
        self.recorder.count("outcomes", outcome=outcome)
        self.recorder.count("generated_tokens", tokens, key=key)
        if tokens > 1:
            self.recorder.observe("inter_token_seconds", seconds / (tokens - 1))

    def language(self, language: str, verdict: str, *, part: str = "analysis") -> None:
        """Whether thinking (`part` analysis) or answer (final) was in the language that was asked for."""
        self.recorder.count("language_verdicts", language=language, part=part, verdict=verdict)

    def retried(self, reason: str) -> None:
        """Another attempt at a choice begins, because of `reason`."""
        self.recorder.count("retries", reason=reason)

    def rescued(self) -> None:
        """A choice's thinking was closed so that an answer came."""
        self.recorder.count("rescues")

    def total(self, name: str, **tags: str) -> float:
        """What a counter has come to, or how many values a histogram holds, over all tags that are not given."""
        return self.recorder.total(name, **tags)

    def close(self) -> None:
        """Report what is left, and stop."""
        self.recorder.close()
