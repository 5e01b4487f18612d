"""Command line of data sets: `python -m training data check | show | mix | prepare`."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.text import Text

from cluster.harmony import CHANNELS, Codec, Label
from training.config import ColumnsConfig, DataConfig
from training.data.conversations import DataError
from training.data.places import absolute
from training.data.samples import language_tag

DEMO_TOKENIZER = Path(__file__).parents[1] / "demo" / "model"
SEQUENCE_LENGTH: int = DataConfig.model_fields["sequence_length"].default
KEPT_FINDINGS = 1000
"""findings of each kind that are kept unless all are asked for"""

CHECK_EXAMPLE = """example:
  python -m training data check train.jsonl --tokenizer ./gpt-oss-20b --sequence-length 4096 --html report.html

exit code: 0 without errors (there may be warnings), 1 with errors, 2 when the command itself is wrong"""

SHOW_EXAMPLE = """example:
  python -m training data show train.jsonl --index 3
  python -m training data show train.jsonl --index 3 --turn 0 --tokens"""

MIX_EXAMPLE = """example:
  python -m training data mix --source own.jsonl=2 --source HuggingFaceH4/Multilingual-Thinking=1 \\
      --language ja=2 --language fr=1 --samples 3000 --seed 7 --out mixed.jsonl

Twice as many records come from the first source as from the second, and of each source twice as many think in
Japanese as in French; other languages are left out. Without --language all records of a source are alike."""


PREPARE_EXAMPLE = """example:
  python -m training data prepare train.jsonl --tokenizer ./gpt-oss-20b --sequence-length 4096 --storage /mnt/runs

A run does this by itself; beforehand it can be done on machines without GPUs. The run finds the shards when its data,
tokenizer, data.columns, sequence_length, packing, long_documents and run.seed are the same. Works on the cluster of
RAY_ADDRESS, or on this machine; an interrupted job goes on where it was."""


def main(arguments: Sequence[str]) -> int:
    """Run one verb; returns the exit code: 0 done, 1 errors in the data, 2 something that the user can mend."""
    flags = make_parser().parse_args(list(arguments))
    run: Callable[[argparse.Namespace], int] = flags.run
    try:
        return run(flags)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(prog="python -m training data", description="Look at data sets, and mix them.")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_check(_verb(verbs, "check", "validate a data set and describe it", CHECK_EXAMPLE))
    _add_show(_verb(verbs, "show", "show one sample as the model sees it, with its labels", SHOW_EXAMPLE))
    _add_mix(_verb(verbs, "mix", "draw a weighted mixture of data sets into one file", MIX_EXAMPLE))
    _add_prepare(
        _verb(verbs, "prepare", "render and pack a data set into the shards that a run reads", PREPARE_EXAMPLE)
    )
    return parser


def _verb(verbs: Any, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="JSONL or Parquet file, folder, storage URI or hub id")
    parser.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        default=str(DEMO_TOKENIZER),
        help="checkpoint folder whose tokenizer.json counts the tokens (default: the demo's; name your model's own)",
    )
    parser.add_argument(
        "--column",
        metavar="FIELD=NAME",
        action="append",
        default=[],
        help=f"name of a record's field where it is not the usual one ({', '.join(ColumnsConfig.model_fields)}), "
        "as in data.columns",
    )


def _add_check(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    parser.add_argument(
        "--sequence-length",
        metavar="N",
        type=_positive,
        default=SEQUENCE_LENGTH,
        help="warn about longer samples, and measure packing at this length in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--min-thinking",
        metavar="N",
        type=_natural,
        default=20,
        help="warn about thinking with fewer letters; ideographs count double (default: %(default)s)",
    )
    parser.add_argument("--limit", metavar="N", type=_positive, help="look at the first N records only")
    parser.add_argument("--json", action="store_true", help="print one JSON object with all figures and all findings")
    parser.add_argument("--html", metavar="FILE", help="also write the report as one self-contained page")
    parser.set_defaults(run=_check)


def _add_show(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    parser.add_argument("--index", metavar="N", type=_natural, required=True, help="number of the record, from 0")
    parser.add_argument(
        "--turn", metavar="K", type=_natural, help="which turn of the assistant is trained, from 0 (default: the last)"
    )
    parser.add_argument(
        "--train-on",
        nargs="+",
        choices=CHANNELS,
        default=list(CHANNELS),
        help="channels that carry loss, as in data.train_on (default: all)",
    )
    parser.add_argument("--tokens", action="store_true", help="print a line for each token: its id and its text")
    parser.add_argument("--no-color", action="store_true", help="plain text, as where NO_COLOR is set")
    parser.set_defaults(run=_show)


def _add_mix(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source",
        metavar="PATH=WEIGHT",
        type=_weighted,
        action="append",
        required=True,
        help="a source and its weight (default 1); repeat the flag for each source",
    )
    parser.add_argument(
        "--language",
        metavar="TAG=WEIGHT",
        type=_weighted_language,
        action="append",
        default=[],
        help="a language of thinking and its weight; repeat the flag, languages that are not named are left out",
    )
    parser.add_argument("--samples", metavar="N", type=_positive, required=True, help="records to draw")
    parser.add_argument("--seed", metavar="S", type=_natural, default=0, help="same seed, same mixture (default: 0)")
    parser.add_argument("--out", metavar="FILE", required=True, help="JSONL file to write")
    parser.add_argument("--repeat", action="store_true", help="draw records again where a source has too few")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    parser.set_defaults(run=_mix)


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    _add_data(parser)
    parser.add_argument("--storage", metavar="FOLDER", required=True, help="as run.storage: every node must reach it")
    parser.add_argument(
        "--sequence-length",
        metavar="N",
        type=_positive,
        default=SEQUENCE_LENGTH,
        help="tokens in a row (default: %(default)s)",
    )
    parser.add_argument("--no-packing", action="store_true", help="give each conversation a row of its own")
    parser.add_argument(
        "--long-documents",
        choices=("error", "split", "drop"),
        default="error",
        help="what becomes of conversations longer than a row (default: error)",
    )
    parser.add_argument("--seed", metavar="S", type=_natural, default=0, help="as run.seed (default: 0)")
    parser.set_defaults(run=_prepare)


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

        _write(Path(flags.html), render_page(report))
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
    trained = {Label[channel.upper()] for channel in flags.train_on}
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


def _write(target: Path, text: str) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _distinct(flag: str, pairs: Sequence[tuple[str, float]]) -> dict[str, float]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{flag} {repeated} is given twice; give it once, with the sum of the weights")
    return found


def _positive(text: str) -> int:
    number = _natural(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 on")
    return int(text)


def _weighted(text: str) -> tuple[str, float]:
    name, _, weight = text.rpartition("=")
    try:
        value = float(weight)
    except ValueError:
        return text, 1.0  # a path such as language=fr/data.jsonl
    if not name or not (0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=WEIGHT with a weight above 0")
    return name, value


def _weighted_language(text: str) -> tuple[str, float]:
    name, weight = _weighted(text)
    tag = language_tag(name)
    if tag is None:
        raise argparse.ArgumentTypeError(f"{name!r} is no language of the catalogue; give a tag or name, such as ja=2")
    return tag, weight
