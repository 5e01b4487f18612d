"""Results of searches as one HTML page that needs nothing beside itself: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from cluster.hardware import GIB
from tuning.charts import COLOURS, STYLE, Dot, Line, chart, number, table
from tuning.journal import Trial
from tuning.quality.page import section
from tuning.quality.result import QualityResult
from tuning.result import Result
from tuning.rows import HEADERS, cells, gains, ordered, point_text
from tuning.space import Point


def render(results: Sequence[Result | QualityResult]) -> str:
    """The page."""
    title = "Fastest batches" if all(isinstance(result, Result) for result in results) else "What searches found"
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{title}</title><style>{STYLE}</style></head><body>",
            f"<h1>{title}</h1>",
            '<p class="faint">Tokens a second are the median of a trial’s measured steps, padding not counted; '
            "± is its standard error.</p>",
            *(part for each in results for part in (_section(each) if isinstance(each, Result) else section(each))),
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
    yield table(("", ""), facts)
    if result.chosen is None:
        yield f'<p class="bad">Nothing chosen: {escape(result.why)}</p>'
    else:
        yield f"<p><b>{escape(point_text(result.chosen))}</b>: {escape(result.why)}.</p>"
    yield from (f"<p>{escape(line)}</p>" for line in gains(result))
    measured = [trial for trial in result.trials if trial.tokens_per_second is not None]
    if measured:
        kinds = _kinds(result.trials)
        yield "<h3>Throughput over micro-batch</h3>"
        yield chart(_throughput(result, kinds), "rows of a micro-batch", "tokens/s", number, out=_out_of_memory(result))
        yield "<h3>Memory over micro-batch, and the wall</h3>"
        yield chart(_memory(result, kinds), "rows of a micro-batch", "GiB", number, wall=_gib(result.memory_bytes))
        yield "<h3>The frontier: what speed costs in memory</h3>"
        yield chart(_frontier(result, kinds), "GiB", "tokens/s", number)
        yield '<p class="faint">The line joins the points that no other beats in both.</p>'
    if result.trials:
        yield "<h3>Every trial</h3>"
        yield _trials(result)
    if result.dropped:
        yield f"<h3>Not tried</h3><p>Ruled out by memory ({len(result.dropped)}):</p>"
        yield table(("batch", ""), [(point_text(drop["point"]), drop["reason"]) for drop in result.dropped])


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
        colour = COLOURS[min(len(names), len(COLOURS) - 1)]
        names.setdefault(kind, (str(kind).partition(" × 1 ")[2], colour))
    return names


def _throughput(result: Result, kinds: dict[Point, tuple[str, str]]) -> list[Line]:
    lines = []
    for kind, (name, colour) in kinds.items():
        own = [t for t in result.trials if t.where.kind == kind and t.tokens_per_second is not None]
        dots = [
            Dot(t.where.micro_batch_size, t.tokens_per_second or 0, _title(t), t.point == result.chosen) for t in own
        ]
        lines.append(Line(name, colour, sorted(dots)))
    return lines


def _memory(result: Result, kinds: dict[Point, tuple[str, str]]) -> list[Line]:
    lines = []
    for kind, (name, colour) in kinds.items():
        own = [trial for trial in result.trials if trial.where.kind == kind]
        dots = [
            Dot(t.where.micro_batch_size, t.peak_bytes / GIB, _title(t), t.point == result.chosen)
            for t in own
            if t.peak_bytes is not None and t.outcome != "out_of_memory"
        ]
        guesses = {t.where.micro_batch_size: t.predicted_bytes / GIB for t in own if t.predicted_bytes}
        for drop in result.dropped:
            where = Point(**drop["point"])
            if where.kind == kind:
                guesses[where.micro_batch_size] = drop["needed_bytes"] / GIB
        lines.append(Line(name, colour, sorted(dots)))
        guessed = [Dot(x, y, "by arithmetic") for x, y in sorted(guesses.items())]
        lines.append(Line(f"{name}, by arithmetic", colour, guessed, guess=True))
    return lines


def _frontier(result: Result, kinds: dict[Point, tuple[str, str]]) -> list[Line]:
    whole = [t for t in result.trials if t.tokens_per_second is not None and t.peak_bytes is not None]
    dots = [
        (Dot(t.peak_bytes / GIB, t.tokens_per_second, _title(t), t.point == result.chosen), kinds[t.where.kind])
        for t in whole
        if t.peak_bytes and t.tokens_per_second
    ]
    best: list[Dot] = []
    for dot, _ in sorted(dots):
        if not best or dot.y > best[-1].y:
            best.append(dot)
    lines = [Line("frontier", "f", [dot._replace(title="", chosen=False) for dot in best], guess=True)]
    for name, colour in dict.fromkeys(kinds.values()):
        lines.append(Line(name, colour, [dot for dot, kind in dots if kind == (name, colour)], joined=False))
    return lines


def _out_of_memory(result: Result) -> list[Dot]:
    lost = [trial for trial in result.trials if trial.outcome == "out_of_memory"]
    return [Dot(trial.where.micro_batch_size, 0, _title(trial)) for trial in lost]


def _title(trial: Trial) -> str:
    speed = "" if trial.tokens_per_second is None else f": {trial.tokens_per_second:,.0f} tokens/s"
    peak = "" if trial.peak_bytes is None else f", {trial.peak_bytes / GIB:.1f} GiB"
    ended = "" if trial.outcome == "measured" else f" ({trial.outcome.replace('_', ' ')})"
    return f"{trial.where}{speed}{peak}{ended}"


def _gib(number: int | None) -> float | None:
    return None if number is None else number / GIB
