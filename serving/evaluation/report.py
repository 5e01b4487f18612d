"""What an evaluation found, as JSON and as tables in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from serving.evaluation.answers import Sampling
from serving.evaluation.comparison import Comparison
from serving.evaluation.figures import Figures, TargetFigures
from serving.evaluation.statistics import Interval
from serving.evaluation.suites import language_name


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class SuiteReport(_Frozen):
    """What was asked."""

    name: str
    sha256: str
    items: int
    languages: list[str]
    validated: dict[str, bool]
    """languages of which it is known whether speakers have checked the questions"""


class TargetReport(_Frozen):
    """What came of one target."""

    name: str
    where: str
    model: str
    asked_by: str
    wanted: int
    answered: int
    failures: dict[str, int]
    """answers that did not come, by reason, in the run that wrote the report"""
    gave_up: str
    """why that run ended before everything was asked; empty where it did not"""
    answers_per_second: float | None
    """of that run; None where it had nothing to ask"""
    tokens_per_second: float | None
    figures: TargetFigures | None

    @property
    def complete(self) -> bool:
        """Whether every answer is there."""
        return self.answered == self.wanted


class Report(_Frozen):
    """An evaluation."""

    created: str
    command: str
    suite: SuiteReport
    sampling: Sampling
    targets: list[TargetReport]
    comparisons: list[Comparison]
    notes: list[str] = []
    """what a reader must know of the figures"""

    @property
    def complete(self) -> bool:
        """Whether every answer of every target is there."""
        return all(target.complete for target in self.targets)


def notes(suite: SuiteReport, targets: Sequence[TargetReport]) -> list[str]:
    """What a reader must know of the figures."""
    found = [
        f"PARTIAL: {target.name} answered {target.answered:,} of {target.wanted:,}"
        + (f"; it was given up ({target.gave_up})" if target.gave_up else "")
        + "; the same command asks for the rest"
        for target in targets
        if not target.complete
    ]
    unchecked = [language_name(tag) for tag, checked in suite.validated.items() if not checked]
    if unchecked:
        found.append(f"Questions in {', '.join(unchecked)} were not checked by speakers of the language.")
    errors = sum(sum(target.figures.all.scorer_errors.values()) for target in targets if target.figures)
    if errors:
        found.append(f"The scorer raised on {errors:,} answers; they are in no share of right answers.")
    return found


def show(report: Report, console: Console) -> None:
    """Tables: figures by language of each target, what each took, and what changed."""
    suite = report.suite
    console.print(f"{suite.name}: {suite.items:,} items, {len(suite.languages)} languages")
    for note in report.notes:
        console.print(note, style="bold red" if note.startswith("PARTIAL") else "yellow", highlight=False)
    for target in report.targets:
        if target.figures:
            console.print(_by_language(target, suite))
            console.print(_totals(target.figures.all), highlight=False)
    for comparison in report.comparisons:
        console.print(_changes(comparison))


def markdown(report: Report) -> str:
    """Shares of all targets by language as a Markdown table, for a README or a model card."""
    told = [(target.name, target.figures) for target in report.targets if target.figures]
    columns = [(name, metric) for metric in ("thinks as asked", "right") for name, _ in told]
    lines = [f"{report.suite.name}, {report.suite.items:,} questions; made by `{report.command}`", ""]
    lines += [f"**{note}**\n" for note in report.notes]
    lines.append("| thinking asked in | questions |" + "".join(f" {metric}: {name} |" for name, metric in columns))
    lines.append("|---|---|" + "---|" * len(columns))
    rows = {name_with_mark(tag, report.suite): tag for tag in report.suite.languages} | {"all": ""}
    for name, tag in rows.items():
        found = {target: figures.by_language.get(tag) if tag else figures.all for target, figures in told}
        cells = []
        for target, metric in columns:
            each = found[target]
            share = None if each is None else each.correct if metric == "right" else each.thinking.adherence
            cells.append(f" {percent(share)} |")
        items = max((each.items for each in found.values() if each), default=0)
        lines.append(f"| {name} | {items:,} |{''.join(cells)}")
    return "\n".join(lines) + "\n"


def _by_language(target: TargetReport, suite: SuiteReport) -> Table:
    assert target.figures is not None
    table = Table(title=f"{target.name} ({target.model})", title_justify="left")
    heads = ("answers", "thinks as asked", "undetermined", "mixed", "answers as asked", "right", "channels valid")
    table.add_column("reasoning in")
    for head in (*heads, "thinking tokens"):
        table.add_column(head, justify="right")
    rows = {name_with_mark(tag, suite): found for tag, found in target.figures.by_language.items()}
    if target.figures.outside_english:
        rows["all but English"] = target.figures.outside_english
    rows["all"] = target.figures.all
    for name, found in rows.items():
        table.add_row(
            name,
            f"{found.answers:,}",
            percent(found.thinking.adherence),
            percent(found.thinking.undetermined, interval=False),
            percent(found.thinking.switched, interval=False),
            percent(found.answer.adherence),
            percent(found.correct),
            percent(found.valid, interval=False),
            number(found.thinking_tokens),
        )
    return table


def name_with_mark(tag: str, suite: SuiteReport) -> str:
    """A language's name, with a mark where it is known whether the questions were checked."""
    checked = suite.validated.get(tag)
    return language_name(tag) + ("" if checked is None else " ✓" if checked else " (not checked)")


def _totals(found: Figures) -> str:
    outcomes = ", ".join(
        f"{count:,} {name}" for name, count in sorted(found.outcomes.items(), key=lambda each: -each[1])
    )
    parts = [f"outcomes: {outcomes}", f"seconds an answer: {number(found.seconds)}"]
    if found.completion_tokens:
        parts.append(f"tokens an answer: {number(found.completion_tokens)}")
    parts += [f"pass@{k}: {percent(value)}" for k, value in found.pass_at.items()]
    if found.majority:
        parts.append(f"majority: {percent(found.majority)}")
    if found.scorer_errors:
        parts.append("scorer errors: " + ", ".join(f"{count} {name}" for name, count in found.scorer_errors.items()))
    return "\n".join(parts)


def _changes(comparison: Comparison) -> Table:
    table = Table(title=f"{comparison.before} → {comparison.after}", title_justify="left")
    for head in ("figure", "group"):
        table.add_column(head)
    for head in ("items", "before", "after", "difference", "95 %", "p"):
        table.add_column(head, justify="right")
    table.add_column("")
    for change in comparison.changes:
        share = change.metric not in ("thinking tokens", "tokens", "seconds")
        if change.group != "all" and not change.flag:
            continue

        def shown(value: float, share: bool = share) -> str:
            return f"{value:.1%}" if share else f"{value:,.3g}"

        colour = {"regression": "bold red", "improvement": "green"}.get(change.flag, "")
        group = change.group if change.group == "all" else language_name(change.group)
        between = f"{shown(change.low)} to {shown(change.high)}"
        cells = (change.metric, group, f"{change.items:,}", shown(change.before), shown(change.after))
        table.add_row(
            *cells, shown(change.difference), between, p_value(change.p_adjusted), change.flag, style=colour or None
        )
    table.caption = "languages are listed where a difference is no chance (p adjusted for their number)"
    table.caption_justify = "left"
    return table


def percent(value: Interval | None, *, interval: bool = True) -> str:
    """A share in hundredths, with its interval."""
    if value is None:
        return "–"
    return f"{value.value:.1%}" + (f" ({value.low:.0%}–{value.high:.0%})" if interval else "")


def number(value: Interval | None) -> str:
    """A mean, with its interval."""
    if value is None:
        return "–"
    return f"{_digits(value.value)} ({_digits(value.low)}–{_digits(value.high)})"


def p_value(p: float) -> str:
    """As it is read: small ones by their bound."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
