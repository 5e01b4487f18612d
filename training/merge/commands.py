"""Command line of the merge: `python -m training merge`."""

from __future__ import annotations

import argparse
import math
import sys

from cluster.artifacts import ArtifactError
from cluster.storage import StorageError, below, without_secrets
from training.merge.options import KEEP_AT_LEAST, SHARD_BYTES

DESCRIPTION = """\
Folds a LoRA adapter into its base, or puts the two side by side: a checkpoint that needs no Raysoner to load.

formats:
  bf16     one ordinary checkpoint in bf16, which transformers and vLLM load (default)
  adapter  the base's files untouched and the adapter beside them: small, and nothing is rounded
  mxfp4    adapted experts rounded to MXFP4 again: small, but most of a small adapter is lost, so it is measured

An interrupted merge goes on where it was when the same command is given again."""

EXAMPLES = """\
examples:
  python -m training merge --run runs/my-run --out runs/my-run/merged
  python -m training merge --adapter runs/my-run/adapter --base /models/gpt-oss-20b --format adapter --out /models/mine
  python -m training merge --run s3://bucket/runs/one --base /models/gpt-oss-120b --out s3://bucket/one --parallel 8"""


def main(arguments: list[str]) -> int:
    """Merge; returns the exit code: 0 done, 2 something that the user can mend, 130 interrupted."""
    flags = _parser().parse_args(arguments)

    from training.merge.job import run_merge
    from training.merge.options import Options
    from training.merge.report import table

    options = Options(
        adapter=flags.adapter or below(flags.run, "adapter"),
        out=flags.out,
        base=flags.base,
        format=flags.format,
        device=flags.device,
        parallel=flags.parallel,
        overwrite=flags.overwrite,
        keep_at_least=flags.keep_at_least,
        shard_bytes=round(flags.shard_gib * 2**30),
    )
    try:
        manifest = run_merge(options)
    except (ArtifactError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped   the same command goes on with the files that are missing", file=sys.stderr)
        return 130
    made = manifest.details["merge"]
    if "report" in made:
        print(table(made["report"]))
    print(f"merged    {without_secrets(flags.out)} ({flags.format}, {made['seconds']:.0f} s on {made['device']})")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training merge",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="folder or storage URI of a finished run, whose adapter is taken")
    source.add_argument("--adapter", help="folder or storage URI of a finished adapter, e.g. RUN/adapter")
    parser.add_argument("--base", help="checkpoint of the base (default: the one that the adapter was trained on)")
    parser.add_argument("--out", required=True, help="folder or storage URI of the merged checkpoint")
    parser.add_argument("--format", choices=("bf16", "mxfp4", "adapter"), default="bf16", help="see above")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the arithmetic")
    parser.add_argument(
        "--parallel",
        type=_count,
        default=0,
        metavar="N",
        help="make N files at once as Ray tasks, on the cluster of RAY_ADDRESS or a local one; base, adapter and out "
        "must be reachable from its nodes (default: 0, in this process)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what stands in --out")
    parser.add_argument(
        "--keep-at-least",
        type=_share,
        default=KEEP_AT_LEAST,
        metavar="SHARE",
        help="refuse an mxfp4 merge of which a weight keeps less of the adapter's effect (default: %(default)s; 0 "
        "refuses nothing)",
    )
    parser.add_argument(
        "--shard-gib",
        type=_size,
        default=SHARD_BYTES / 2**30,
        metavar="GIB",
        help="size of a file in the format bf16 (default: %(default)g)",
    )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tasks")
    return int(text)


def _size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no size in GiB")
    return size


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share between 0 and 1")
    return share
