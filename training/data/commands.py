"""Command line of data sets: `python -m training data check | show | mix | prepare`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from rich.text import Text

from cluster.artifacts import publish_file
from cluster.harmony import CHANNEL_LABELS, Codec
from training.data.conversations import DataError
from training.data.flags import DEMO_TOKENIZER, Action, make_parser
from training.data.places import absolute
from training.sections import ColumnsConfig, DataConfig

KEPT_FINDINGS = 1000
"""findings of each kind that are kept unless all are asked for"""


def main(arguments: Sequence[str]) -> int:
    """Run one verb; returns the exit code: 0 done, 1 errors in the data, 2 something that the user can mend."""
    actions: dict[str, Action] = {"check": _check, "show": _show, "mix": _mix, "prepare": _prepare}
    flags = make_parser(actions).parse_args(list(arguments))
    run: Action = flags.run
    try:
        return run(flags)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _check(flags: argparse.Namespace) -> int:
    from training.data.check import Options, check
    from training.data.terminal import make_console, print_report

    options = Options(
        sequence_length=flags.sequence_length,
        minimum_thinking=flags.min_thinking,
        keep=None if flags.json else KEPT_FINDINGS,
        limit=flags.limit,
    )
    codec, columns = _codec(flags.tokenizer), _columns(flags.column)
    if flags.html:
        _check_page(Path(flags.html))
    report = check(flags.path, codec, _shown(flags.tokenizer), options, columns)
    if flags.html:
        from training.data.page import render_page

        with publish_file(Path(flags.html)) as scratch:
            scratch.write_text(render_page(report), encoding="utf-8")
    if flags.json:
        print(json.dumps(report.as_json(), ensure_ascii=False))
    else:
        console = make_console()
        print_report(report, console)
        if flags.html:
            console.print(Text(f"page      {flags.html}"))
    return 1 if report.errors else 0


def _show(flags: argparse.Namespace) -> int:
    from training.data.show import pick, print_sample, print_tokens, render_turn
    from training.data.terminal import isolated, make_console

    codec = _codec(flags.tokenizer)
    record = pick(flags.path, flags.index, _columns(flags.column))
    example = render_turn(record, codec, flags.turn)
    console = make_console()
    coloured = console.is_terminal and not flags.no_color and not os.environ.get("NO_COLOR")
    trained = {CHANNEL_LABELS[channel] for channel in flags.train_on}
    console.print(Text(isolated(str(record.source))), soft_wrap=True)
    (print_tokens if flags.tokens else print_sample)(example, codec, trained, console, coloured)
    return 0


def _mix(flags: argparse.Namespace) -> int:
    from cluster.languages import CATALOGUE
    from training.data.mixture import mix
    from training.data.terminal import isolated, make_console, table

    sources, languages = _distinct("--source", flags.source), _distinct("--language", flags.language)
    shares = mix(sources, flags.out, flags.samples, flags.seed, languages or None, flags.repeat, flags.force)
    made = table("Mixture", "source", "language", "#available", "#drawn", "#share")
    for share in shares:
        language = CATALOGUE[share.language].name if share.language else "all"
        part = f"{share.drawn / flags.samples:.1%}"
        made.add_row(isolated(share.source), language, f"{share.available:,}", f"{share.drawn:,}", part)
    console = make_console()
    console.print(made)
    console.print(Text(f"mixed     {flags.out}"))
    return 0


def _prepare(flags: argparse.Namespace) -> int:
    from training.data.prepare import prepare, read_prepared
    from training.driver import connect

    _codec(flags.tokenizer)
    config = DataConfig(
        train=flags.path,
        columns=_columns(flags.column) or ColumnsConfig(),
        sequence_length=flags.sequence_length,
        packing=not flags.no_packing,
        long_documents=flags.long_documents,
    )
    connect()
    storage = str(Path(flags.storage).expanduser().absolute())
    folder = prepare(absolute(flags.path), config, absolute(flags.tokenizer), storage, flags.seed)
    made = read_prepared(folder)
    print(f"prepared  {made.counts['conversations']:,} conversations, {made.counts['tokens']:,} tokens")
    print(f"rows      {made.rows:,} of {made.sequence_length} tokens, {made.efficiency:.1%} full")
    print(f"shards    {folder}")
    return 0


def _codec(folder: str) -> Codec:
    try:
        return Codec.from_folder(folder)
    except FileNotFoundError as error:
        raise DataError(f"{error}; name one in --tokenizer") from None
    except ValueError as error:
        raise DataError(folder, f"{error}; name the checkpoint of a gpt-oss model in --tokenizer") from None


def _shown(folder: str) -> str:
    return "the demo (other models count other tokens)" if Path(folder) == DEMO_TOKENIZER else folder


def _columns(pairs: Sequence[str]) -> ColumnsConfig | None:
    named = dict(pair.partition("=")[::2] for pair in pairs)
    for setting, column in named.items():
        if setting not in ColumnsConfig.model_fields or not column:
            fields = ", ".join(ColumnsConfig.model_fields)
            raise DataError(f"--column {setting}={column}: write FIELD=NAME, where FIELD is one of {fields}")
    try:
        return ColumnsConfig(**named) if named else None
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise DataError(f"--column: {reason}") from None


def _check_page(page: Path) -> None:
    """Say before the work what would stand in the way after it."""
    if page.is_dir():
        raise DataError(page, "this is a folder; name a file in --html")
    if not page.resolve().parent.is_dir():
        raise DataError(page, "the folder of this file does not exist; make it, or name another one in --html")


def _distinct(flag: str, pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{flag} {repeated} is given twice; give it once, with the sum of the weights")
    return found
