"""A search for quality as a section of the page of results: curves, losses of each language, and noise."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from tuning.charts import COLOURS, Dot, Line, chart, table
from tuning.quality.candidates import Candidate, Curve
from tuning.quality.result import HEADERS, QualityResult, cells, ordered


def section(result: QualityResult) -> Iterable[str]:
    """The section's parts."""
    yield f"<h2>Quality: {escape(result.model)}</h2>"
    noise = "not known" if result.noise is None else f"{result.noise:.4f} nats, standard deviation between seeds"
    yield table(
        ("", ""),
        [
            ("device", f"{result.device or result.gpu}" + (f", driver {result.driver}" if result.driver else "")),
            ("rows", f"{result.rows:,} of {result.conditions.sequence_length} tokens for each candidate"),
            ("noise", noise),
            ("kind", f"measured, {result.date}, commit {result.commit}"),
            ("made by", result.command),
            ("versions", ", ".join(f"{name} {release}" for name, release in result.versions.items())),
            ("search ended", result.ended or "not: it was interrupted"),
        ],
    )
    if result.chosen is None:
        yield f'<p class="bad">Nothing chosen: {escape(result.why)}</p>'
    else:
        yield f"<p><b>{escape(str(Candidate(**result.chosen)))}</b>: {escape(result.why)}.</p>"
    if any(curve.evaluations for curve in result.curves):
        yield "<h3>Held-out loss while training</h3>"
        yield _chart(_curves(result), "rows trained on")
        yield '<p class="faint">The mean over the languages, in nats a token; those of bad candidates end early.</p>'
    best = result.curve_of(result.chosen)
    if best is not None and best.evaluations[-1].languages:
        yield "<h3>The chosen settings, language by language</h3>"
        yield _chart(_languages(best), "rows trained on")
        yield from _against_own(result, best)
    if result.curves:
        yield "<h3>Every candidate</h3>"
        yield table(HEADERS, [cells(curve, result) for curve in ordered(result)])
    if result.refused:
        yield "<h3>Not trained</h3>"
        yield table(("settings and reason",), [(reason,) for reason in result.refused])


def _chart(lines: list[Line], across: str) -> str:
    lowest = min(dot.y for line in lines for dot in line.dots)
    highest = max(dot.y for line in lines for dot in line.dots)
    bottom = max(0.0, lowest - 0.05 * (highest - lowest or lowest))
    return chart(lines, across, "nats", lambda value: f"{value:.3f}", bottom=bottom)


def _curves(result: QualityResult) -> list[Line]:
    """The best get colours of their own; all others have the last one's."""
    lines = []
    for number, curve in enumerate(each for each in ordered(result) if each.evaluations):
        colour = COLOURS[min(number, len(COLOURS) - 1)]
        dots = [
            Dot(each.rows, each.loss, f"{curve.where}: {each.loss:.4f} after {each.rows} rows")
            for each in curve.evaluations
        ]
        if curve.candidate == result.chosen and curve.outcome == "measured":
            dots[-1] = dots[-1]._replace(chosen=True)
        lines.append(Line(cells(curve, result)[0], colour, dots))
    return lines


def _languages(curve: Curve) -> list[Line]:
    lines = []
    for number, tag in enumerate(curve.evaluations[-1].languages):
        dots = [Dot(each.rows, each.languages[tag], f"{tag}: {each.languages[tag]:.4f}") for each in curve.evaluations]
        lines.append(Line(tag, COLOURS[number % len(COLOURS)], dots))
    return lines


def _against_own(result: QualityResult, best: Curve) -> Iterable[str]:
    """Each language's loss, beside that of the run's own settings where those were trained to their end."""
    own = result.curve_of(result.own)
    rows = []
    for tag, loss in best.evaluations[-1].languages.items():
        before = own.evaluations[-1].languages.get(tag) if own else None
        compared = ("", "") if before is None else (f"{before:.4f}", f"{loss - before:+.4f}")
        rows.append((tag, f"{loss:.4f}", *compared))
    yield table(("language", "chosen", "the run's own settings", "difference"), rows)
