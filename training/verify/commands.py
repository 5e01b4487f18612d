"""`python -m training verify`: parses, calls, and prints the verdict."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from cluster.artifacts import ArtifactError
from training.data.places import DataError
from training.verify.settings import ROWS, Request

if TYPE_CHECKING:
    from cluster.verdict import Verdict

DESCRIPTION = """\
Hold a merged checkpoint against the base and the adapter that it was made of: hashes, settings, weights, and logits on
real text. Writes verification.json into the checkpoint's folder, which serving refuses if it says failed.

Exit code 0: passed; 1: failed; 2: it could not be verified."""
EXAMPLES = """\
examples:
  python -m training verify ~/raysoner-runs/demo/merged
  python -m training verify merged --base models/gpt-oss-20b --adapter run/adapter --data heldout.jsonl"""


def main(arguments: list[str]) -> int:
    """Verify; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m training verify",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", help="checkpoint folder on this machine")
    parser.add_argument("--base", help="folder of the base (default: the one in the checkpoint's manifest)")
    parser.add_argument("--adapter", help="folder of the adapter (default: in or beside the checkpoint, or in its run)")
    parser.add_argument("--data", nargs="+", default=[], metavar="FILE", help="held-out conversations, for losses")
    parser.add_argument("--prompts", metavar="FILE", help="JSONL with messages or text, on which logits are compared")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--limit", type=_positive, default=ROWS, help="rows of each, at most (default: %(default)s)")
    parser.add_argument("--maximum-kl", type=float, help="mean divergence in nats (default: by format)")
    parser.add_argument("--minimum-agreement", type=float, help="share of equal greedy tokens (default: by format)")
    parser.add_argument("--minimum-effect", type=float, help="share of the adapter's effect kept (default: by format)")
    parser.add_argument("--quiet", action="store_true", help="print checks that failed, and the last line")
    flags = parser.parse_args(arguments)
    try:
        from transformers.utils.logging import disable_progress_bar

        from training.verify.verification import verify

        disable_progress_bar()
        verdict = verify(_request(flags))
    except (ArtifactError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_verdict(verdict, flags.folder, quiet=flags.quiet)
    return 0 if verdict.passed else 1


def print_verdict(verdict: Verdict, folder: str, *, quiet: bool) -> None:
    """A line for each check, or where `quiet` for each that failed, and one for all."""
    width = max(len(check.name) for check in verdict.checks)
    for check in verdict.failed if quiet else verdict.checks:
        print(f"{check.name:<{width}}  {'passed' if check.passed else 'FAILED'}  {check.message}")
        if check.name == "held_out_loss":
            _print_losses(check.figures)
    done = "passed" if verdict.passed else f"FAILED {', '.join(check.name for check in verdict.failed)}"
    print(f"verified  {folder} ({verdict.format}): {done}")


def _print_losses(figures: dict[str, dict[str, float | None]]) -> None:
    print(f"  {'language':<9}{'tokens':>8}{'base':>10}{'adapter':>10}{'merged':>10}")
    for tag, found in figures.items():
        losses = (found[name] for name in ("base", "with_adapter", "merged"))
        shown = "".join(f"{'infinite' if loss is None else f'{loss:.4f}':>10}" for loss in losses)
        print(f"  {tag:<9}{found['tokens']:>8}{shown}")


def _request(flags: argparse.Namespace) -> Request:
    names = ("maximum_kl", "minimum_agreement", "minimum_effect")
    return Request(
        folder=flags.folder,
        base=flags.base,
        adapter=flags.adapter,
        data=tuple(flags.data),
        prompts=flags.prompts,
        device=flags.device,
        limit=flags.limit,
        overrides={name: value for name in names if (value := getattr(flags, name)) is not None},
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
