"""A load's figures: as a table for the terminal, and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from serving.bench.load import Plan
from serving.bench.measurement import DEFINITIONS, Exchange, Summary, Window, over_time, summarise

COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")
BUSY_SHARE = 0.9
"""of one processor: a load generator that takes more may be what was measured"""


@dataclass(frozen=True)
class Report:
    """A load, what it was, and what came of it."""

    url: str
    model: str
    plan: Plan
    prompts: str
    """where they came from, in words"""
    maximum_tokens: int
    summary: Summary
    windows: list[Window]
    generator_cpu: float
    """processor seconds that the load generator took in a second: it has one thread, so 1 is all it can have"""
    interrupted: int = 0
    """requests that were under way when the load was stopped; they are in none of the figures"""

    @property
    def load(self) -> str:
        """What was done, in words."""
        plan = self.plan
        kind = f"open loop, {plan.rate:g} requests/s" if plan.rate else f"closed loop, {plan.concurrency} at a time"
        return f"{kind}; {self.prompts}; at most {self.maximum_tokens} tokens"

    @property
    def warnings(self) -> list[str]:
        """What the reader must know before believing the figures."""
        found = []
        if self.generator_cpu > BUSY_SHARE:
            found.append(
                f"the load generator took {self.generator_cpu:.0%} of a processor and may be the bottleneck itself; "
                "run several side by side"
            )
        if self.summary.tokens_from != "usage" and self.summary.completion_tokens:
            found.append("not every answer carried usage: chunks were counted in place of tokens")
        if self.interrupted:
            found.append(f"the load was stopped: {self.interrupted} requests under way are in none of the figures")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, latencies in seconds."""
        summary = asdict(self.summary)
        summary["latencies"] = {
            name: None if figures is None else figures._asdict() for name, figures in self.summary.latencies.items()
        }
        return {
            "url": self.url,
            "model": self.model,
            "plan": asdict(self.plan),
            "prompts": self.prompts,
            "maximum_tokens": self.maximum_tokens,
            "definitions": DEFINITIONS,
            "summary": summary,
            "over_time": [window._asdict() for window in self.windows],
            "generator_cpu": self.generator_cpu,
            "interrupted": self.interrupted,
            "warnings": self.warnings,
        }


def make(
    url: str,
    model: str,
    plan: Plan,
    prompts: str,
    maximum_tokens: int,
    exchanges: Sequence[Exchange],
    generator_cpu: float,
) -> Report:
    """The report of requests that have ended; those that were interrupted are only counted."""
    kept = [exchange for exchange in exchanges if exchange.error != "interrupted"]
    return Report(
        url=url,
        model=model,
        plan=plan,
        prompts=prompts,
        maximum_tokens=maximum_tokens,
        summary=summarise(kept),
        windows=over_time(kept),
        generator_cpu=generator_cpu,
        interrupted=len(exchanges) - len(kept),
    )


def show(report: Report, console: Console) -> None:
    """Prints the report for a human."""
    summary = report.summary
    console.print(Text(f"{report.model} at {report.url}", style="bold"))
    console.print(Text(report.load, style="dim"))
    console.print(_throughput(summary))
    console.print(latencies(summary))
    for kind, count in summary.errors.items():
        console.print(Text(f"{count} × {kind}: {summary.error_messages[kind]}", style="red"))
    for warning in report.warnings:
        console.print(Text(warning, style="yellow"))


def _throughput(summary: Summary) -> Table:
    table = Table.grid(padding=(0, 2))
    prompt = "" if summary.prompt_tokens is None else f", {summary.prompt_tokens:,} of prompts"
    for name, value in (
        ("requests", f"{summary.succeeded:,} answered, {summary.failed:,} failed, in {summary.seconds:.1f} s"),
        ("requests/s", f"{summary.requests_per_second:,.2f}"),
        ("tokens/s", f"{summary.tokens_per_second:,.1f}"),
        ("tokens", f"{summary.completion_tokens:,} of answers (from {summary.tokens_from}){prompt}"),
    ):
        table.add_row(Text(name), Text(value))
    return table


def latencies(summary: Summary) -> Table:
    """Percentiles in milliseconds, a row for each latency."""
    table = Table("milliseconds", *(Column(name, justify="right") for name in COLUMNS), box=None, pad_edge=False)
    for name, figures in summary.latencies.items():
        shown = ["-"] * len(COLUMNS) if figures is None else [milliseconds(getattr(figures, c)) for c in COLUMNS]
        table.add_row(Text(name.replace("_", " ")), *map(Text, shown))
    return table


def milliseconds(seconds: float) -> str:
    """`seconds` in milliseconds, with three digits where they are few."""
    value = seconds * 1000
    if not value:
        return "0"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
