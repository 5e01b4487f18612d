"""The whole line with one command: `python -m training pipeline`.

Fine-tunes, merges, verifies, and asks the base and the fine-tuned model the questions of suites, each by the command
that does it alone, so that whatever stops it, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.artifacts import MANIFEST, publish_file, sha256
from cluster.config import ConfigError, ConfigParser
from cluster.storage import is_uri
from cluster.tables import positive
from training.config import TrainingConfig

STATE = "pipeline.json"
"""in the run's folder: which stages are done, and of what"""
DESCRIPTION = """\
Fine-tunes gpt-oss, merges, verifies, and evaluates before and after: `training run`, `merge` and `verify`, then
`serving evaluate` for each --suite, on the cluster of RAY_ADDRESS or a local one. A stage that is done is passed over;
one that was interrupted goes on. --config and all other flags are those of `training run`."""
EXAMPLES = """\
example, on a machine with a hub and a GPU of 80 GB:
  python -m training pipeline --config training/configs/h100.toml --config training/configs/gpt-oss-20b.toml \\
      --data.train HuggingFaceH4/Multilingual-Thinking --run.storage runs --serving serving/configs/gpt-oss-20b.toml \\
      --suite mgsm --suite attacks --maximum-tokens 2048"""

Call = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Stage:
    """One command of the line."""

    name: str
    words: tuple[str, ...]
    """behind `python -m`"""
    kept: bool
    """whether it is passed over once it is done; the others find out for themselves what is left"""


def main(arguments: list[str]) -> int:
    """Run the stages; returns the exit code of the first that fails, or 0.

    Raises:
        ConfigError: a flag is no good, or the storage is no folder of this machine.
    """
    flags, settings = _parser().parse_known_args(arguments)
    config = ConfigParser(TrainingConfig, prog="python -m training pipeline", description="").load(
        TrainingConfig, settings
    )[0]
    if is_uri(config.run.storage):
        raise ConfigError(
            f"run.storage = '{config.run.storage}' is no folder of this machine, where the pipeline asks: give one, "
            "or run the stages that --dry-run prints by themselves"
        )
    folder = Path(config.run.storage).expanduser().absolute() / config.run.name
    if flags.dry_run:
        for stage in stages(config, config.model.path, settings, flags, folder):
            print(shlex.join(["python", "-m", *stage.words]))
        return 0
    base = local_base(config.model.path)
    done = run_stages(list(stages(config, base, settings, flags, folder)), folder, _call)
    if not done:
        print(f"serve it  python -m serving deploy{_serving(flags)} --model.path {shlex.quote(str(folder / 'merged'))}")
    return done


def stages(
    config: TrainingConfig, base: str, settings: Sequence[str], flags: argparse.Namespace, folder: Path
) -> Iterator[Stage]:
    """The commands, in their order.

    Args:
        config: of the run.
        base: the base model's folder.
        settings: words that say the run's configuration, as the user gave them.
        flags: of the pipeline.
        folder: of the run.
    """
    merged = str(folder / "merged")
    own = [*settings, "--model.path", base]
    yield Stage("train", ("training", "run", *own), kept=False)
    yield Stage(
        "merge",
        ("training", "merge", "--run", str(folder), "--base", base, "--out", merged, "--format", flags.format),
        kept=True,
    )
    held_out = config.data.evaluation
    data = ("--data", held_out) if held_out and Path(held_out).is_file() else ()
    yield Stage("verify", ("training", "verify", merged, *data, "--quiet"), kept=True)
    asked = [word for name in ("languages", "limit", "maximum_tokens") for word in _flag(name, getattr(flags, name))]
    engine = ("--config", flags.serving) if flags.serving else ()
    for suite in flags.suite:
        out = str(folder / f"evaluation-{Path(suite).stem}")
        targets = ("--target", f"base={base}", "--target", f"tuned={merged}")
        words = ("serving", "evaluate", *targets, "--suite", suite, "--out", out, "--card", *asked, *engine)
        yield Stage(f"evaluate {suite}", words, kept=False)


def run_stages(line: Sequence[Stage], folder: Path, call: Call) -> int:
    """Run what is not done yet, one after the other; returns the first exit code that is not 0.

    What is kept counts as done as long as its command and the adapter that it was made of are the same.
    """
    for stage in line:
        made_of = _made_of(stage, folder)
        if stage.kept and _state(folder).get(stage.name) == made_of:
            print(f"\n── {stage.name}: done already", flush=True)
            continue
        print(f"\n── {stage.name} " + "─" * max(0, 70 - len(stage.name)), flush=True)
        print("$ " + shlex.join(["python", "-m", *stage.words]), flush=True)
        began = time.monotonic()
        if code := call(_words(stage, folder)):
            print(f"\n{stage.name} ended with {code}; the same command goes on from there", file=sys.stderr)
            return code
        print(f"{stage.name} took {time.monotonic() - began:.0f} s", flush=True)
        if stage.kept:
            _note(folder, stage.name, made_of)
    return 0


def local_base(path: str) -> str:
    """The base model's folder; of a hub id, that of the hub's cache, filled where it is not.

    Raises:
        ConfigError: the hub does not give it.
    """
    if Path(path).expanduser().is_dir():
        return str(Path(path).expanduser())
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # Weights in transformers' layout: others of the same model would be twice as much.
        return str(snapshot_download(path, ignore_patterns=["original/*", "metal/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model.path = '{path}' is no folder here, and the hub does not give it ({type(error).__name__}): download "
            "it where there is a hub, and give its folder"
        ) from None


def _made_of(stage: Stage, folder: Path) -> dict[str, Any]:
    adapter = folder / "adapter" / MANIFEST
    return {"command": list(stage.words), "adapter": sha256(adapter) if adapter.is_file() else None}


def _words(stage: Stage, folder: Path) -> list[str]:
    """The stage's; a merge of another adapter than before replaces what that one left."""
    stale = stage.name == "merge" and "merge" in _state(folder)
    return [*stage.words, *(["--overwrite"] if stale else [])]


def _state(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found


def _note(folder: Path, name: str, made_of: dict[str, Any]) -> None:
    content = json.dumps(_state(folder) | {name: made_of}, indent=2) + "\n"
    with publish_file(folder / STATE) as scratch:
        scratch.write_text(content, encoding="utf-8")


def _call(words: Sequence[str]) -> int:
    """`python -m WORDS`, its output passed through; Ctrl-C reaches it too, and its end is waited for."""
    with subprocess.Popen([sys.executable, "-m", *words]) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue


def _flag(name: str, value: object) -> list[str]:
    return [] if value is None else [f"--{name.replace('_', '-')}", str(value)]


def _serving(flags: argparse.Namespace) -> str:
    return f" --config {shlex.quote(flags.serving)}" if flags.serving else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training pipeline",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--suite", action="append", default=[], help="of `serving evaluate`: demo, mgsm, a file; repeatable")
    add("--serving", metavar="FILE", help="settings of the engine that answers, as of `serving deploy`")
    add("--format", choices=("bf16", "mxfp4", "adapter"), default="bf16", help="of the merge (default: bf16)")
    add("--languages", metavar="TAGS", help="of the suites' questions, such as fr,ja")
    add("--limit", type=positive, metavar="N", help="questions of each language and task, the first")
    add("--maximum-tokens", type=positive, metavar="N", help="of a thinking and its answer")
    add("--dry-run", action="store_true", help="print the commands, and exit")
    return parser
