"""Flags of `python -m training data`: what each verb takes, with help that helps."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.harmony import CHANNELS
from training.data.samples import language_tag
from training.sections import ColumnsConfig, DataConfig

DEMO_TOKENIZER = Path(__file__).parents[1] / "demo" / "model"
SEQUENCE_LENGTH: int = DataConfig.model_fields["sequence_length"].default

Action = Callable[[argparse.Namespace], int]
"""runs a verb and returns the exit code"""

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


def make_parser(actions: Mapping[str, Action]) -> argparse.ArgumentParser:
    """The parser of all verbs; `flags.run` is the action of the verb that was given."""
    parser = argparse.ArgumentParser(prog="python -m training data", description="Look at data sets, and mix them.")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_check(_verb(verbs, actions, "check", "validate a data set and describe it", CHECK_EXAMPLE))
    _add_show(_verb(verbs, actions, "show", "show one sample as the model sees it, with its labels", SHOW_EXAMPLE))
    _add_mix(_verb(verbs, actions, "mix", "draw a weighted mixture of data sets into one file", MIX_EXAMPLE))
    _add_prepare(
        _verb(verbs, actions, "prepare", "render and pack a data set into the shards that a run reads", PREPARE_EXAMPLE)
    )
    return parser


def _verb(verbs: Any, actions: Mapping[str, Action], name: str, summary: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=actions[name])
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
