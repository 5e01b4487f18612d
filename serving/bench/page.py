"""A load's report as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from serving.bench.measurement import DEFINITIONS, Window
from serving.bench.report import COLUMNS, Report, milliseconds

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 860, 220, 64, 30, 12
_TICKS = 4


class _Line(NamedTuple):
    name: str
    colour: str
    value: Callable[[Window], float | None]


_THROUGHPUT = (_Line("tokens/s", "a", lambda window: window.tokens_per_second),)
_LATENCIES = (
    _Line("first token, p50", "a", lambda window: window.time_to_first_token_p50),
    _Line("first token, p99", "b", lambda window: window.time_to_first_token_p99),
    _Line("whole answer, p50", "c", lambda window: window.end_to_end_latency_p50),
    _Line("whole answer, p99", "d", lambda window: window.end_to_end_latency_p99),
)

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --faint: #6b6b70; --rule: #d8d8dc; --paper: #fff;
  --a: #1f6feb; --b: #b35900; --c: #1a7f37; --d: #a01c7d; --bad: #b00020; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --faint: #a0a0a8; --rule: #3a3a40; --paper: #16161a;
  --a: #6ea8ff; --b: #ffb36b; --c: #6fd08c; --d: #ef8ed6; --bad: #ff7b8a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 900px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; }
dt { font-weight: 600; margin-top: .5rem; } dd { margin: 0; color: var(--faint); }
.bad { color: var(--bad); } .faint { color: var(--faint); }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--faint); }
svg .axis { stroke: var(--rule); } svg path { fill: none; stroke-width: 2; }
.a { stroke: var(--a); } .b { stroke: var(--b); } .c { stroke: var(--c); } .d { stroke: var(--d); }
.key { display: inline-block; margin-right: 1.2rem; } .key svg { width: 1.6em; height: .6em; margin-right: .4em; }
"""


def render(report: Report) -> str:
    """The page."""
    summary = report.summary
    prompts = "" if summary.prompt_tokens is None else f", {summary.prompt_tokens:,} of prompts"
    facts = (
        ("requests", f"{summary.succeeded:,} answered, {summary.failed:,} failed, in {summary.seconds:.1f} s"),
        ("requests/s", f"{summary.requests_per_second:,.2f}"),
        ("tokens/s", f"{summary.tokens_per_second:,.1f}"),
        ("tokens", f"{summary.completion_tokens:,} of answers (from {summary.tokens_from}){prompts}"),
    )
    errors = [f"{count} × {kind}: {summary.error_messages[kind]}" for kind, count in summary.errors.items()]
    title = f"{report.model} at {report.url}"
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
            f'<h1>{escape(title)}</h1><p class="faint">{escape(report.load)}</p>',
            *(f'<p class="bad">{escape(line)}</p>' for line in (*errors, *report.warnings)),
            _table(("", ""), facts),
            "<h2>Latency, milliseconds</h2>",
            _latencies(report),
            "<h2>Throughput over time, tokens/s</h2>",
            _chart(report.windows, _THROUGHPUT, "tokens per second over time", lambda value: f"{value:,.0f}"),
            "<h2>Latency over time, milliseconds</h2>",
            _chart(report.windows, _LATENCIES, "latency percentiles over time", milliseconds),
            '<p class="faint">Each point is of the answers that ended in its stretch of time.</p>',
            "<h2>What the figures mean</h2><dl>",
            *(
                f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(meaning)}</dd>"
                for name, meaning in DEFINITIONS.items()
            ),
            "</dl></body></html>",
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>" if any(head) else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{top}{body}</table>"


def _latencies(report: Report) -> str:
    rows = []
    for name, figures in report.summary.latencies.items():
        shown = ["-"] * len(COLUMNS) if figures is None else [milliseconds(getattr(figures, c)) for c in COLUMNS]
        rows.append([name.replace("_", " "), *shown])
    return _table(["", *COLUMNS], rows)


def _chart(windows: Sequence[Window], lines: Sequence[_Line], title: str, label: Callable[[float], str]) -> str:
    """Lines over time, from 0 to the largest value; a stretch without a value leaves a gap."""
    values = [value for line in lines for window in windows if (value := line.value(window)) is not None]
    end = windows[-1].start + windows[-1].seconds if windows else 0.0
    if not values or end <= 0:
        return '<p class="faint">Nothing was measured.</p>'
    top = _round_up(max(values))

    def place(seconds: float, value: float) -> str:
        x = _LEFT + seconds / end * (_WIDTH - _LEFT - 10)
        y = _HEIGHT - _BOTTOM - value / top * (_HEIGHT - _BOTTOM - _TOP)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in range(_TICKS + 1):
        x, y = place(0, top * tick / _TICKS).split(",")
        parts.append(f'<line class="axis" x1="{x}" x2="{_WIDTH - 10}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{label(top * tick / _TICKS)}</text>'
        )
        x, _ = place(end * tick / _TICKS, 0).split(",")
        anchor = "end" if tick == _TICKS else "middle"
        parts.append(f'<text x="{x}" y="{_HEIGHT - 10}" text-anchor="{anchor}">{end * tick / _TICKS:.3g} s</text>')
    for line in lines:
        parts.append(f'<path class="{line.colour}" d="{_path(windows, line, place)}"/>')
    keys = "".join(
        f'<span class="key"><svg viewBox="0 0 16 6"><path class="{line.colour}" d="M0,3 H16"/></svg>'
        f"{escape(line.name)}</span>"
        for line in lines
    )
    return "".join([*parts, "</svg><p>", keys, "</p>"])


def _path(windows: Sequence[Window], line: _Line, place: Callable[[float, float], str]) -> str:
    """Each value is drawn as long as its stretch."""
    pieces, drawing = [], False
    for window in windows:
        value = line.value(window)
        if value is None:
            drawing = False
            continue
        start, end = place(window.start, value), place(window.start + window.seconds, value)
        pieces.append(f"{'L' if drawing else 'M'}{start} L{end}")
        drawing = True
    return " ".join(pieces)


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 and 10 times a power of ten; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9))
