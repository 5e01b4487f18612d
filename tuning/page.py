"""Results of searches as one HTML page that needs nothing beside itself: no script, no font, no request."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import NamedTuple

from cluster.hardware import GIB
from tuning.journal import Trial
from tuning.result import Result
from tuning.rows import HEADERS, cells, gains, ordered, point_text
from tuning.space import Point

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 860, 310, 70, 40, 30, 16
_TICKS = 4
_COLOURS = ("a", "b", "c", "d", "e", "f")

_STYLE = (
    """
:root { color-scheme: light dark; --ink: #1d1d1f; --faint: #6b6b70; --rule: #d8d8dc; --paper: #fff;
  --a: #1f6feb; --b: #b35900; --c: #1a7f37; --d: #a01c7d; --e: #6e5494; --f: #57606a; --bad: #b00020; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --faint: #a0a0a8; --rule: #3a3a40; --paper: #16161a;
  --a: #6ea8ff; --b: #ffb36b; --c: #6fd08c; --d: #ef8ed6; --e: #b9a3e3; --f: #a9b1ba; --bad: #ff7b8a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 900px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.2rem; margin-top: 3rem; } h3 { font-size: 1rem; margin: 1.5rem 0 .3rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
td:last-child { white-space: normal; }
.faint { color: var(--faint); } .bad { color: var(--bad); } .chosen td { font-weight: 600; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--faint); }
svg .axis { stroke: var(--rule); } svg .wall { stroke: var(--bad); stroke-dasharray: 6 4; stroke-width: 1.5; }
svg path { fill: none; stroke-width: 2; } svg .guess { stroke-dasharray: 3 4; stroke-width: 1.5; }
svg .ring { fill: none; stroke: var(--ink); stroke-width: 2; }
"""
    + "".join(f".{c} {{ stroke: var(--{c}); }} .dot.{c} {{ fill: var(--{c}); }}\n" for c in _COLOURS)
    + """
.x { stroke: var(--bad); stroke-width: 2; } .key { display: inline-block; margin-right: 1.2rem; }
.key svg { width: 1.6em; height: .6em; margin-right: .4em; }
"""
)


class _Dot(NamedTuple):
    x: float
    y: float
    title: str
    chosen: bool = False


class _Line(NamedTuple):
    name: str
    colour: str
    dots: Sequence[_Dot]
    joined: bool = True
    guess: bool = False


def render(results: Sequence[Result]) -> str:
    """The page."""
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>Fastest batches</title><style>{_STYLE}</style></head><body>",
            "<h1>Fastest batches</h1>",
            '<p class="faint">Tokens a second are the median of a trial’s measured steps, padding not counted; '
            "± is its standard error.</p>",
            *(part for result in results for part in _section(result)),
            "</body></html>",
        ]
    )


def _section(result: Result) -> Iterable[str]:
    device = result.device or result.gpu
    yield f"<h2>{escape(result.gpu)}: {escape(result.model)}</h2>"
    facts = [
        ("device", f"{device}" + (f", driver {result.driver}" if result.driver else "")),
        ("rows", f"{result.conditions.sequence_length} tokens, LoRA rank {result.conditions.rank}"),
        ("kind", f"{result.kind}, {result.date}, commit {result.commit}"),
        ("made by", result.source or result.command),
    ]
    if result.versions:
        facts.append(("versions", ", ".join(f"{name} {number}" for name, number in result.versions.items())))
    if result.kind == "measured" and not result.source:
        facts.append(("search ended", result.ended or "not: it was interrupted"))
    yield _table(("", ""), facts)
    if result.chosen is None:
        yield f'<p class="bad">Nothing chosen: {escape(result.why)}</p>'
    else:
        yield f"<p><b>{escape(point_text(result.chosen))}</b>: {escape(result.why)}.</p>"
    yield from (f"<p>{escape(line)}</p>" for line in gains(result))
    measured = [trial for trial in result.trials if trial.tokens_per_second is not None]
    if measured:
        kinds = _kinds(result.trials)
        yield "<h3>Throughput over micro-batch</h3>"
        yield _chart(
            _throughput(result, kinds), "rows of a micro-batch", "tokens/s", _number, out=_out_of_memory(result)
        )
        yield "<h3>Memory over micro-batch, and the wall</h3>"
        yield _chart(_memory(result, kinds), "rows of a micro-batch", "GiB", _number, wall=_gib(result.memory_bytes))
        yield "<h3>The frontier: what speed costs in memory</h3>"
        yield _chart(_frontier(result, kinds), "GiB", "tokens/s", _number)
        yield '<p class="faint">The line joins the points that no other beats in both.</p>'
    if result.trials:
        yield "<h3>Every trial</h3>"
        yield _trials(result)
    if result.dropped:
        yield f"<h3>Not tried</h3><p>Ruled out by memory ({len(result.dropped)}):</p>"
        yield _table(("batch", ""), [(point_text(drop["point"]), drop["reason"]) for drop in result.dropped])


def _trials(result: Result) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in HEADERS)
    rows = []
    for trial in ordered(result):
        own = ' class="chosen"' if trial.point == result.chosen else ""
        rows.append(f"<tr{own}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells(trial))}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _kinds(trials: Sequence[Trial]) -> dict[Point, tuple[str, str]]:
    """Name and colour of each kind of point; the last colour is for all that have none of their own."""
    names: dict[Point, tuple[str, str]] = {}
    for trial in trials:
        kind = trial.where.kind
        colour = _COLOURS[min(len(names), len(_COLOURS) - 1)]
        names.setdefault(kind, (str(kind).partition(" × 1 ")[2], colour))
    return names


def _throughput(result: Result, kinds: dict[Point, tuple[str, str]]) -> list[_Line]:
    lines = []
    for kind, (name, colour) in kinds.items():
        own = [t for t in result.trials if t.where.kind == kind and t.tokens_per_second is not None]
        dots = [
            _Dot(t.where.micro_batch_size, t.tokens_per_second or 0, _title(t), t.point == result.chosen) for t in own
        ]
        lines.append(_Line(name, colour, sorted(dots)))
    return lines


def _memory(result: Result, kinds: dict[Point, tuple[str, str]]) -> list[_Line]:
    lines = []
    for kind, (name, colour) in kinds.items():
        own = [trial for trial in result.trials if trial.where.kind == kind]
        dots = [
            _Dot(t.where.micro_batch_size, t.peak_bytes / GIB, _title(t), t.point == result.chosen)
            for t in own
            if t.peak_bytes is not None and t.outcome != "out_of_memory"
        ]
        guesses = {t.where.micro_batch_size: t.predicted_bytes / GIB for t in own if t.predicted_bytes}
        for drop in result.dropped:
            where = Point(**drop["point"])
            if where.kind == kind:
                guesses[where.micro_batch_size] = drop["needed_bytes"] / GIB
        lines.append(_Line(name, colour, sorted(dots)))
        guessed = [_Dot(x, y, "by arithmetic") for x, y in sorted(guesses.items())]
        lines.append(_Line(f"{name}, by arithmetic", colour, guessed, guess=True))
    return lines


def _frontier(result: Result, kinds: dict[Point, tuple[str, str]]) -> list[_Line]:
    whole = [t for t in result.trials if t.tokens_per_second is not None and t.peak_bytes is not None]
    dots = [
        (_Dot(t.peak_bytes / GIB, t.tokens_per_second, _title(t), t.point == result.chosen), kinds[t.where.kind])
        for t in whole
        if t.peak_bytes and t.tokens_per_second
    ]
    best: list[_Dot] = []
    for dot, _ in sorted(dots):
        if not best or dot.y > best[-1].y:
            best.append(dot)
    lines = [_Line("frontier", "f", [dot._replace(title="", chosen=False) for dot in best], guess=True)]
    for name, colour in dict.fromkeys(kinds.values()):
        lines.append(_Line(name, colour, [dot for dot, kind in dots if kind == (name, colour)], joined=False))
    return lines


def _out_of_memory(result: Result) -> list[_Dot]:
    lost = [trial for trial in result.trials if trial.outcome == "out_of_memory"]
    return [_Dot(trial.where.micro_batch_size, 0, _title(trial)) for trial in lost]


def _title(trial: Trial) -> str:
    speed = "" if trial.tokens_per_second is None else f": {trial.tokens_per_second:,.0f} tokens/s"
    peak = "" if trial.peak_bytes is None else f", {trial.peak_bytes / GIB:.1f} GiB"
    ended = "" if trial.outcome == "measured" else f" ({trial.outcome.replace('_', ' ')})"
    return f"{trial.where}{speed}{peak}{ended}"


def _chart(
    lines: Sequence[_Line],
    across: str,
    up: str,
    label: Callable[[float], str],
    *,
    wall: float | None = None,
    out: Sequence[_Dot] = (),
) -> str:
    """Lines and dots from 0 up; `wall` is a height that nothing passes, `out` are crosses on the axis."""
    every = [dot for line in lines for dot in line.dots]
    right = _round_up(max((dot.x for dot in (*every, *out)), default=1.0))
    top = _round_up(max([dot.y for dot in every] + ([wall] if wall else [])))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + x / right * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - y / top * (_HEIGHT - _BOTTOM - _TOP),
        )

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(up)} over {escape(across)}">']
    for tick in range(_TICKS + 1):
        x, y = place(right * tick / _TICKS, top * tick / _TICKS)
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label(top * tick / _TICKS)}</text>')
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{label(right * tick / _TICKS)}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end">{escape(across)}</text>')
    parts.append(f'<text x="4" y="{_TOP - 16}">{escape(up)}</text>')
    if wall:
        _, y = place(0, wall)
        parts.append(f'<line class="wall" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT + 6}" y="{y - 5:.1f}">{wall:.1f} GiB of the GPU</text>')
    for line in lines:
        if line.joined and len(line.dots) > 1:
            path = " L".join("{:.1f},{:.1f}".format(*place(dot.x, dot.y)) for dot in line.dots)
            parts.append(f'<path class="{line.colour}{" guess" if line.guess else ""}" d="M{path}"/>')
        parts += [_dot(place, dot, line.colour) for dot in line.dots if not line.guess]
    for dot in out:
        x, y = place(dot.x, 0)
        parts.append(
            f'<path class="x" d="M{x - 4:.1f},{y - 12:.1f} l8,8 m0,-8 l-8,8"><title>{escape(dot.title)}</title></path>'
        )
    keys = "".join(
        f'<span class="key"><svg viewBox="0 0 16 6"><path class="{line.colour}{" guess" if line.guess else ""}" '
        f'd="M0,3 H16"/></svg>{escape(line.name)}</span>'
        for line in lines
        if line.dots
    )
    crosses = '<span class="key bad">× out of memory</span>' if out else ""
    return "".join([*parts, "</svg><p>", keys, crosses, "</p>"])


def _dot(place: Callable[[float, float], tuple[float, float]], dot: _Dot, colour: str) -> str:
    x, y = place(dot.x, dot.y)
    ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="8"/>' if dot.chosen else ""
    return (
        f'{ring}<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
        f"<title>{escape(dot.title)}</title></circle>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>" if any(head) else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}{body}</table></div>'


def _gib(number: int | None) -> float | None:
    return None if number is None else number / GIB


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _round_up(value: float) -> float:
    """The next of 1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8 and 10 times a power of ten; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(s * power for s in (1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10) if s * power >= value * (1 - 1e-9))
