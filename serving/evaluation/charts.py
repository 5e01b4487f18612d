"""Figures of several targets by language, drawn as SVG and as coloured tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from serving.evaluation.statistics import Interval
from serving.evaluation.suites import language_name

COLOURS = ("a", "b", "c", "d", "e", "f")
"""of targets, by their order; further ones share the last"""
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 560, 132, 20, 24, 26


def colour(place: int) -> str:
    """Of the target with a number."""
    return COLOURS[min(place, len(COLOURS) - 1)]


def key(names: Sequence[str]) -> str:
    """What the colours mean."""
    marks = "".join(
        f'<span class="key"><i style="border-color: var(--{colour(place)}); background: '
        f'{"transparent" if place == 0 and len(names) > 1 else f"var(--{colour(place)})"}"></i>{escape(name)}</span>'
        for place, name in enumerate(names)
    )
    return f"<p>{marks}</p>"


def by_language(title: str, rows: Mapping[str, Sequence[Interval | None]]) -> str:
    """Shares from 0 to 100 %, a row for each language and a dot with its interval for each target.

    Args:
        rows: name of a row → a share for each target.
    """
    height = _TOP + _ROW * len(rows) + 26
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)} by language">']
    for tick in range(5):
        x = _place(tick / 4)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 4}" y2="{height - 22}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{tick * 25} %</text>')
    for number, (name, shares) in enumerate(rows.items()):
        y = _TOP + _ROW * number + _ROW / 2
        parts.append(f'<text class="name" x="{_LEFT - 14}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>')
        told = [share.value for share in shares if share]
        if len(told) > 1:
            ends = f'x1="{_place(min(told)):.1f}" x2="{_place(max(told)):.1f}"'
            parts.append(f'<line class="step" {ends} y1="{y:.1f}" y2="{y:.1f}"/>')
        for place, share in enumerate(shares):
            if share:
                parts.append(_dot(name, share, place, len(shares), y))
    return f"<div><h3>{escape(title)}</h3>{''.join(parts)}</svg></div>"


def confusion(title: str, counts: Mapping[str, Mapping[str, int]]) -> str:
    """Languages asked for as rows, those found as columns, each cell as dark as its share of the row."""
    columns = list(counts)
    columns += [tag for row in counts.values() for tag in row if tag not in counts and tag != "und"]
    columns = list(dict.fromkeys(columns)) + (["und"] if any("und" in row for row in counts.values()) else [])
    head = "".join(f'<th title="{escape(language_name(tag))}">{escape(tag)}</th>' for tag in columns)
    rows = []
    for asked, found in counts.items():
        total = sum(found.values())
        cells = "".join(_cell(asked, tag, found.get(tag, 0), total) for tag in columns)
        rows.append(f"<tr><th>{escape(language_name(asked))}</th>{cells}</tr>")
    return (
        f'<div><h3>{escape(title)}</h3><div class="scroll"><table class="confusion"><tr><th></th>{head}</tr>'
        f"{''.join(rows)}</table></div></div>"
    )


def bar(counts: Mapping[str, int]) -> str:
    """Parts of a whole, as a bar with its legend: what the format asks for in green, faults in red."""
    total = sum(counts.values())
    pieces, legend = [], []
    for number, (name, count) in enumerate(sorted(counts.items(), key=lambda each: -each[1])):
        good = name in ("complete", "tool_call")
        shade = f"color-mix(in srgb, var(--{'good' if good else 'fault'}) {max(90 - 15 * number, 30)}%, var(--ground))"
        pieces.append(f'<span style="flex: {count} 0 0; background: {shade}" title="{escape(name)}: {count}"></span>')
        legend.append(f'<span class="key"><i style="border-color: {shade}; background: {shade}"></i>'
                      f"{escape(name.replace('_', ' '))} {count:,} ({count / total:.1%})</span>")  # fmt: skip
    return f'<div class="bar">{"".join(pieces)}</div><p>{"".join(legend)}</p>'


def _place(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _dot(name: str, share: Interval, place: int, targets: int, y: float) -> str:
    y += (place - (targets - 1) / 2) * min(5.0, 12.0 / targets)
    stroke = f'style="stroke: var(--{colour(place)})"'
    first = place == 0 and targets > 1
    fill = "" if first else f"; fill: var(--{colour(place)})"
    told = f"{name}: {share.value:.1%} ({share.low:.1%} to {share.high:.1%}) of {share.count}"
    return (
        f'<line class="whisker" {stroke} x1="{_place(share.low):.1f}" x2="{_place(share.high):.1f}" y1="{y:.1f}" '
        f'y2="{y:.1f}"/><circle class="{"first" if first else ""}" style="stroke: var(--{colour(place)}){fill}" '
        f'cx="{_place(share.value):.1f}" cy="{y:.1f}" r="4.5"><title>{escape(told)}</title></circle>'
    )


def _cell(asked: str, found: str, count: int, total: int) -> str:
    own = ' class="asked"' if asked == found else ""
    if not count:
        return f"<td{own}></td>"
    shade = f"background: rgba(var(--heat), {0.08 + 0.5 * count / total:.2f})"
    return f'<td{own} style="{shade}" title="{count / total:.1%} of {total}">{count}</td>'
