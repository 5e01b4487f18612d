"""`python -m tuning report`: what searches found, as tables in the terminal and as one HTML page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from cluster.config import ConfigError
from training.profile import FOLDER
from tuning.page import render
from tuning.quality.result import QualityResult
from tuning.quality.result import table as quality_table
from tuning.result import Result, read_result
from tuning.rows import HEADERS, cells, gains, ordered, point_text


def main(arguments: Sequence[str]) -> int:
    """Parse and report; returns the exit code.

    Raises:
        ConfigError: there is no result, or a file is none.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tuning report",
        description="What searches found: a table for each GPU type, and with --html one page that needs nothing else, "
        "with throughput over micro-batch, the memory wall, the frontier, and why a point was chosen.",
    )
    parser.add_argument(
        "results",
        nargs="*",
        type=Path,
        help="JSON files that `tuning search` wrote beside its profiles, or folders of them (default: tuning/profiles)",
    )
    parser.add_argument("--html", type=Path, help="file for the page")
    flags = parser.parse_args(list(arguments))
    results = [read_any(path) for path in _files(flags.results or [FOLDER])]
    for result in results:
        print(table(result) if isinstance(result, Result) else quality_table(result), end="\n\n")
    if flags.html:
        flags.html.parent.mkdir(parents=True, exist_ok=True)
        flags.html.write_text(render(results), encoding="utf-8")
        print(f"written   {flags.html}")
    return 0


def read_any(path: Path) -> Result | QualityResult:
    """A result of either objective.

    Raises:
        ConfigError: the file is none, or of another format.
    """
    try:
        return QualityResult.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return read_result(path)


def table(result: Result) -> str:
    """A result for the terminal: what was chosen and why, and every trial, the fastest first."""
    where = f"{result.device or result.gpu}, {result.model}, rows of {result.conditions.sequence_length} tokens"
    lines = [f"{result.gpu}: {where} ({result.kind}, {result.date}, commit {result.commit})"]
    if result.source:
        lines.append(f"  {result.source}")
    if result.chosen is None:
        lines.append(f"  nothing chosen: {result.why}")
    else:
        best = result.trial_of(result.chosen)
        speed = f", {best.tokens_per_second:,.0f} tokens/s" if best and best.tokens_per_second else ""
        lines.append(f"  chosen: {point_text(result.chosen)}{speed}: {result.why}")
    lines += [f"  {line}" for line in gains(result)]
    rows = [HEADERS, *(cells(trial) for trial in ordered(result))]
    if len(rows) > 1:
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADERS))]
        for row in rows:
            first, *rest, last = (
                cell.ljust(width) if index in (0, len(row) - 1) else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            lines.append(f"  {'  '.join((first, *rest, last))}".rstrip())
    if result.dropped:
        lines.append(f"  {len(result.dropped)} points were ruled out by memory and not tried")
    return "\n".join(lines)


def _files(given: Sequence[Path]) -> list[Path]:
    files = [file for path in given for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise ConfigError(
            f"{', '.join(map(str, given))} holds no results: python -m tuning search writes them, by default to "
            "tuning/profiles"
        )
    return files
