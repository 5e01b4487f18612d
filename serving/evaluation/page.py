"""An evaluation as one HTML page that needs nothing beside itself: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files

from serving.evaluation import charts
from serving.evaluation.comparison import Change
from serving.evaluation.examples import examples
from serving.evaluation.figures import Figures, Length, TargetFigures
from serving.evaluation.report import Report, TargetReport, name_with_mark, number, p_value
from serving.evaluation.scoring import Scored
from serving.evaluation.statistics import Interval
from serving.evaluation.suites import language_name

_SHARES: dict[str, Callable[[Figures], Interval | None]] = {
    "Thinks as asked": lambda found: found.thinking.adherence,
    "Right": lambda found: found.correct,
    "Answers as asked": lambda found: found.answer.adherence,
    "Channels valid": lambda found: found.valid,
}
_LOWER: dict[str, Callable[[Figures], Interval | None]] = {
    "Thinking undetermined": lambda found: found.thinking.undetermined,
    "Thinking mixes languages": lambda found: found.thinking.switched,
}
_MEANS: dict[str, Callable[[Figures], Interval | None]] = {
    "Thinking tokens": lambda found: found.thinking_tokens,
    "Tokens an answer": lambda found: found.completion_tokens,
    "Seconds an answer": lambda found: found.seconds,
}


def render(report: Report, scored: Mapping[str, Sequence[Scored]]) -> str:
    """The page."""
    style = files("serving.evaluation").joinpath("style.css").read_text(encoding="utf-8")
    title = f"Evaluation: {report.suite.name}"
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{escape(title)}</title><style>{style}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *_sections(report, scored),
            "</body></html>",
        ]
    )


def _sections(report: Report, scored: Mapping[str, Sequence[Scored]]) -> Iterator[str]:
    yield _facts(report)
    yield from (f'<p class="note">{escape(note)}</p>' for note in report.notes)
    told = [(target, target.figures) for target in report.targets if target.figures]
    if not told:
        yield "<p>Nothing was answered.</p>"
        return
    targets, figures = [target for target, _ in told], [found for _, found in told]
    yield _glance(targets, figures)
    yield f"<h2>{'Before and after, by' if len(told) > 1 else 'By'} language</h2>"
    yield charts.key([target.name for target in targets])
    yield f'<div class="charts">{"".join(_charts(report, figures))}</div>'
    yield '<p class="quiet">Dots are shares of questions, lines their 95 % intervals.</p>'
    for comparison in report.comparisons:
        yield f"<h2>What changed: {escape(comparison.before)} → {escape(comparison.after)}</h2>"
        yield _changes(comparison.changes)
    yield "<h2>The language asked for, and the one found</h2>"
    yield '<div class="confusions">'
    for target, found in told:
        if found.thinking_confusion:
            yield charts.confusion(f"Thinking of {target.name}", found.thinking_confusion)
    for target, found in told:
        if found.answer_confusion:
            yield charts.confusion(f"Answers of {target.name}", found.answer_confusion)
    yield "</div>"
    yield "<h2>How completions ended</h2>"
    for target, found in told:
        yield f"<h3>{escape(target.name)}</h3>{charts.bar(found.all.outcomes)}"
    yield "<h2>Length of the thinking</h2>"
    yield _lengths(targets, figures)
    if any(found.by_task for found in figures):
        yield "<h2>By kind of question</h2>"
        yield _tasks(targets, figures)
    yield "<h2>Examples</h2>"
    yield '<p class="quiet">Of each language the questions that tell most: targets differ in right and wrong, or in '
    yield "language. Sentences in another language than the one asked for are marked.</p>"
    yield examples(scored)


def _facts(report: Report) -> str:
    suite, drawn = report.suite, report.sampling
    how = [
        f"{suite.items:,} questions in {len(suite.languages)} language{'s' if len(suite.languages) > 1 else ''}",
        f"{drawn.samples} answer{'s' if drawn.samples > 1 else ''} to each",
        f"temperature {drawn.temperature:g}, seed {drawn.seed}",
    ]
    return (
        f'<p class="quiet">{escape(", ".join(how))}; {escape(report.created)}</p>'
        f"<p><code>{escape(report.command)}</code></p>"
    )


def _glance(targets: Sequence[TargetReport], figures: Sequence[TargetFigures]) -> str:
    rows: list[tuple[str, list[str]]] = [
        ("Answers", [f"{found.all.answers:,}" for found in figures]),
        ("Asked by", [target.asked_by for target in targets]),
    ]
    for name, of in (_SHARES | _LOWER).items():
        rows.append((name, [_share(of(found.all)) for found in figures]))
        if name == "Thinks as asked" and any(found.outside_english for found in figures):
            outside = [_share(of(found.outside_english) if found.outside_english else None) for found in figures]
            rows.append((f"{name}, outside English", outside))
    rows += [(name, [escape(number(of(found.all))) for found in figures]) for name, of in _MEANS.items()]
    passes = sorted({k for found in figures for k in found.all.pass_at})
    rows += [(f"pass@{k}", [_share(found.all.pass_at.get(k)) for found in figures]) for k in passes]
    if any(found.all.majority for found in figures):
        rows.append(("Majority vote right", [_share(found.all.majority) for found in figures]))
    speeds = [target.answers_per_second for target in targets]
    if any(speeds):
        rows.append(("Answers a second of the run", [f"{speed:.1f}" if speed else "–" for speed in speeds]))
    return "<h2>At a glance</h2>" + _table(["", *(target.name for target in targets)], rows)


def _charts(report: Report, figures: Sequence[TargetFigures]) -> Iterator[str]:
    for name, of in _SHARES.items():
        rows = {}
        for tag in report.suite.languages:
            found = [by.by_language.get(tag) for by in figures]
            shares = [of(each) if each else None for each in found]
            if any(shares):
                rows[name_with_mark(tag, report.suite)] = shares
        if rows:
            yield charts.by_language(name, rows)


def _changes(changes: Sequence[Change]) -> str:
    """Rows of all answers, and of the languages where a difference is no chance."""
    rows = []
    for change in changes:
        if change.group != "all" and not change.flag:
            continue
        share = change.metric not in ("thinking tokens", "tokens", "seconds")

        def shown(value: float, share: bool = share) -> str:
            return f"{value:.1%}" if share else f"{value:,.3g}"

        kind = {"regression": "bad", "improvement": "good"}.get(change.flag, "")
        group = "all" if change.group == "all" else language_name(change.group)
        cells = [
            escape(group),
            f"{change.items:,}",
            shown(change.before),
            shown(change.after),
            f'{shown(change.difference)} <span class="range">{shown(change.low)} to {shown(change.high)}</span>',
            f"{change.lost} / {change.won}",
            escape(p_value(change.p_adjusted)),
            f'<span class="{kind}">{change.flag}</span>',
        ]
        rows.append((change.metric, cells))
    head = ["figure", "group", "questions", "before", "after", "difference", "worse / better", "p", ""]
    told = (
        "McNemar’s exact test where each question has one yes or no, else a paired bootstrap; p of languages is "
        "adjusted for their number (Holm)."
    )
    return _table(head, rows, "changes") + f'<p class="quiet">{told}</p>'


def _lengths(targets: Sequence[TargetReport], figures: Sequence[TargetFigures]) -> str:
    efforts = list(dict.fromkeys(length.effort for found in figures for length in found.lengths))
    languages = list(dict.fromkeys(length.language for found in figures for length in found.lengths))
    known = [{(length.effort, length.language): length for length in found.lengths} for found in figures]
    head = ["", *(f"{target.name}, {effort}" for target in targets for effort in efforts)]
    rows = []
    for tag in languages:
        found = [by.get((effort, tag)) for by in known for effort in efforts]
        cells = [_length(each) for each in found]
        rows.append((language_name(tag), cells))
    return _table(head, rows)


def _tasks(targets: Sequence[TargetReport], figures: Sequence[TargetFigures]) -> str:
    tasks = list(dict.fromkeys(task for found in figures for task in found.by_task))
    head = ["", *(f"{target.name}: {name.lower()}" for name in ("Right", "Thinks as asked") for target in targets)]
    rows = []
    for task in tasks:
        of = [found.by_task.get(task) for found in figures]
        cells = [_share(_SHARES[name](each) if each else None) for name in ("Right", "Thinks as asked") for each in of]
        rows.append((task or "without a name", cells))
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], kind: str = "") -> str:
    """Cells of `rows` are HTML, names and heads are text."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for name, cells in rows
    )
    return f'<div class="scroll"><table class="{kind}"><tr>{top}</tr>{body}</table></div>'


def _share(value: Interval | None) -> str:
    if value is None:
        return "–"
    return f'{value.value:.1%} <span class="range">{value.low:.0%} to {value.high:.0%}</span>'


def _length(length: Length | None) -> str:
    """In tokens where the endpoint told them."""
    if length is None:
        return "–"
    return escape(f"{number(length.tokens)} tokens" if length.tokens else f"{number(length.characters)} characters")
