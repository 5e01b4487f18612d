"""The report of `data check` as tables for a terminal, and what makes data safe and readable to print."""

from __future__ import annotations

import re
from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cluster.harmony import CHANNEL_LABELS
from cluster.languages import UNDETERMINED
from training.data.check import Report
from training.data.figures import Agreement, Figures, LanguageFigures, Lengths
from training.data.findings import Finding, Kind, Severity
from training.data.inspection import name

PLACES = 5
"""findings shown of each kind"""
TOOLS = 15
PLAIN_COLUMNS = 120
"""width where there is no terminal"""
COLOURS = {Severity.ERROR: "bold red", Severity.WARNING: "yellow"}

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_RIGHT_TO_LEFT = re.compile(r"[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc]")


def printable(text: str) -> str:
    """Text whose control characters are spelt out: data must not move the cursor, nor turn the line around."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def isolated(text: str) -> str:
    """Printable text; one with right-to-left letters is isolated (UAX #9), so that it does not reorder its line."""
    shown = printable(text)
    return f"\u2068{shown}\u2069" if _RIGHT_TO_LEFT.search(shown) else shown


def make_console(stderr: bool = False) -> Console:
    """A console that is wide enough for tables where output is no terminal."""
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PLAIN_COLUMNS
    return console


def print_report(report: Report, console: Console) -> None:
    """Print figures, then findings, then the verdict."""
    console.print(Text.assemble(("Data   ", "dim"), (isolated(report.path), "bold")))
    console.print(Text.assemble(("Tokens ", "dim"), f"by the tokenizer of {isolated(report.tokenizer)}"))
    console.print()
    for shown in _figure_tables(report.figures):
        console.print(shown)
    console.print()
    for kind, count, kept in report.log.by_kind():
        _print_kind(kind, count, kept, console)
    console.print(verdict(report))


def verdict(report: Report) -> Text:
    """One line: how many errors and warnings."""
    if not report.errors and not report.warnings:
        return Text("No errors, no warnings.", "bold green")
    errors = Text(counted(report.errors, "error"), "bold red" if report.errors else "green")
    warnings = Text(counted(report.warnings, "warning"), "yellow" if report.warnings else "green")
    return Text.assemble(errors, ", ", warnings, ".")


def counted(number: int, what: str) -> str:
    """`1 error`, `2 errors`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _figure_tables(figures: Figures) -> Iterable[Table]:
    yield _overview(figures)
    yield Table.grid()
    if figures.lengths:
        yield _histogram(figures.lengths)
        yield _labels(figures)
    if figures.languages:
        yield _languages(figures.languages)
    if figures.agreement:
        yield _agreement(figures.agreement)
    if figures.tools:
        yield _tools(figures.tools)


def table(title: str, *columns: str) -> Table:
    """An empty table; columns whose header begins with `#` hold numbers."""
    made = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    made.title_justify, made.title_style = "left", "bold"
    for column in columns:
        number = column.startswith("#")
        made.add_column(column.removeprefix("#"), justify="right" if number else "left", overflow="fold")
    return made


def overview_rows(figures: Figures) -> list[tuple[str, str]]:
    """The figures of the whole data set, each with its name."""
    rows = [
        ("conversations", f"{figures.conversations:,} of {figures.records:,} records"),
        ("turns", f"{figures.messages:,}"),
        ("samples", f"{figures.samples:,} (turns of the assistant)"),
        ("tokens", f"{sum(figures.tokens_by_label.values()):,}"),
        ("tokens trained", f"{figures.trained_tokens:,} ({figures.trained_share:.1%})"),
    ]
    if figures.lengths:
        lengths = figures.lengths
        rows.append(
            (
                "tokens per sample",
                f"{lengths.minimum:,} min · {lengths.median:,.0f} median · {lengths.p95:,.0f} p95 · "
                f"{lengths.p99:,.0f} p99 · {lengths.maximum:,} max",
            )
        )
    if figures.packing:
        packing = figures.packing
        about = "about " if packing.estimated else ""
        over = f"; {counted(packing.samples_over, 'longer sample')} left out" if packing.samples_over else ""
        rows.append(
            (
                "packing",
                f"{packing.efficiency:.1%} filled: {about}{counted(packing.sequences, 'sequence')} of "
                f"{packing.sequence_length:,} tokens{over}",
            )
        )
    rows.append(("thinking of undetermined language", f"{figures.undetermined_thinking:,}"))
    return rows


def _overview(figures: Figures) -> Table:
    grid = Table.grid(padding=(0, 2))
    for label, value in overview_rows(figures):
        grid.add_row(Text(label, "dim"), Text(value))
    return grid


def _histogram(lengths: Lengths) -> Table:
    made = table("Tokens per sample", "#tokens", "#samples", "")
    most = max(bar.count for bar in lengths.histogram)
    for bar in lengths.histogram:
        made.add_row(f"{bar.low:,}–{bar.high:,}", f"{bar.count:,}", Text(_bar(bar.count / most, 40), "cyan"))
    return made


def _bar(share: float, width: int) -> str:
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def _labels(figures: Figures) -> Table:
    made = table("Tokens by who wrote them", "label", "#tokens", "#share", "")
    total = sum(figures.tokens_by_label.values())
    for label, tokens in figures.tokens_by_label.items():
        use = Text("trained", "green") if label in CHANNEL_LABELS else "context"
        made.add_row(label, f"{tokens:,}", f"{tokens / total:.1%}", use)
    return made


def _languages(rows: list[LanguageFigures]) -> Table:
    made = table("Languages", "", "", "", "#question", "#declared", "#thinking", "#answer", "#tok./char.")
    for row in rows:
        rate = "" if row.tokens_per_character is None else f"{row.tokens_per_character:.2f}"
        counts = [f"{count:,}" if count else "·" for count in (row.questions, row.declared, row.thinking, row.answers)]
        made.add_row(row.tag, row.name, isolated(row.native_name), *counts, rate)
    return made


def _agreement(pairs: list[Agreement]) -> Table:
    """Declared by detected: a row for each declared language, and what its thinkings read as."""
    columns = ("declared", "#samples", "#as declared", "#undetermined", "reads as")
    made = table("Thinking, declared and as it reads", *columns)
    by_declared: dict[str | None, list[Agreement]] = {}
    for pair in pairs:
        by_declared.setdefault(pair.declared, []).append(pair)
    for declared, found in by_declared.items():
        same = sum(pair.count for pair in found if pair.detected == declared)
        open_ = sum(pair.count for pair in found if pair.detected == UNDETERMINED)
        others = [
            f"{name(pair.detected)} {pair.count:,}" for pair in found if pair.detected not in (declared, UNDETERMINED)
        ]
        made.add_row(
            name(declared) if declared else "(nothing)",
            f"{sum(pair.count for pair in found):,}",
            f"{same:,}" if declared else "·",
            f"{open_:,}" if open_ else "·",
            Text(", ".join(others), "red" if declared else ""),
        )
    return made


def _tools(tools: dict[str, int]) -> Table:
    made = table("Tools called", "tool", "#calls")
    for tool, calls in list(tools.items())[:TOOLS]:
        made.add_row(isolated(tool), f"{calls:,}")
    if len(tools) > TOOLS:
        made.add_row(f"… {len(tools) - TOOLS} more", f"{sum(list(tools.values())[TOOLS:]):,}")
    return made


def _print_kind(kind: Kind, count: int, kept: list[Finding], console: Console) -> None:
    severity = (str(kind.severity), COLOURS[kind.severity])
    console.print(Text.assemble(severity, f"  {kind.title}: ", (f"{count:,}", "bold")))
    for finding in kept[:PLACES]:
        line = Text.assemble((isolated(finding.place), "bold"), f": {isolated(finding.message)}")
        console.print(Padding(line, (0, 0, 0, 2)))
        if finding.excerpt:
            quoted = Text(isolated(finding.excerpt), "dim", no_wrap=True, overflow="ellipsis")
            console.print(Padding(quoted, (0, 0, 0, 6)))
    if count > PLACES:
        console.print(Text(f"  … and {count - PLACES:,} more; --json lists all", "dim"))
    console.print()
