"""Charts and tables of a page that needs nothing beside itself: no script, no font, no request."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 860, 310, 70, 40, 30, 16
_TICKS = 4
COLOURS = ("a", "b", "c", "d", "e", "f")
"""classes of lines and dots; the last is for all that have none of their own"""

STYLE = (
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
    + "".join(f".{c} {{ stroke: var(--{c}); }} .dot.{c} {{ fill: var(--{c}); }}\n" for c in COLOURS)
    + """
.x { stroke: var(--bad); stroke-width: 2; } .key { display: inline-block; margin-right: 1.2rem; }
.key svg { width: 1.6em; height: .6em; margin-right: .4em; }
"""
)


class Dot(NamedTuple):
    """A point of a chart; `title` is shown where it is pointed at, a ring marks the chosen one."""

    x: float
    y: float
    title: str
    chosen: bool = False


class Line(NamedTuple):
    """Dots of one colour, joined or not; a guess is dashed and has no dots."""

    name: str
    colour: str
    dots: Sequence[Dot]
    joined: bool = True
    guess: bool = False


def chart(
    lines: Sequence[Line],
    across: str,
    up: str,
    label: Callable[[float], str],
    *,
    wall: float | None = None,
    out: Sequence[Dot] = (),
    bottom: float = 0.0,
) -> str:
    """Lines and dots from `bottom` up; `wall` is a height that nothing passes, `out` are crosses on the axis."""
    every = [dot for line in lines for dot in line.dots]
    right = _round_up(max((dot.x for dot in (*every, *out)), default=1.0))
    highest = max([dot.y for dot in every] + ([wall] if wall else []), default=1.0)
    top = bottom + _round_up(highest - bottom)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + x / right * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (y - bottom) / (top - bottom) * (_HEIGHT - _BOTTOM - _TOP),
        )

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(up)} over {escape(across)}">']
    for tick in range(_TICKS + 1):
        height = bottom + (top - bottom) * tick / _TICKS
        x, y = place(right * tick / _TICKS, height)
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label(height)}</text>')
        parts.append(
            f'<text x="{x:.1f}" y="{_HEIGHT - 24}" text-anchor="middle">{number(right * tick / _TICKS)}</text>'
        )
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
        x, y = place(dot.x, bottom)
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


def _dot(place: Callable[[float, float], tuple[float, float]], dot: Dot, colour: str) -> str:
    x, y = place(dot.x, dot.y)
    ring = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="8"/>' if dot.chosen else ""
    return (
        f'{ring}<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
        f"<title>{escape(dot.title)}</title></circle>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, which is escaped."""
    top = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>" if any(head) else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}{body}</table></div>'


def number(value: float) -> str:
    """Of an axis."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def _round_up(value: float) -> float:
    """The next of 1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8 and 10 times a power of ten; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(s * power for s in (1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10) if s * power >= value * (1 - 1e-9))
