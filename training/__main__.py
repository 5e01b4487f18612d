"""Command line of training: `python -m training run | merge | verify | pipeline | push | data`."""

from __future__ import annotations

import json
import sys

from cluster.artifacts import ArtifactError
from cluster.config import ConfigError, ConfigParser
from cluster.verbs import run_verb, tell_error
from training.config import TrainingConfig
from training.data.conversations import DataError

USAGE = """usage: python -m training VERB [flags]

  run       fine-tune gpt-oss with LoRA on a Ray cluster, or resume a run
  merge     fold an adapter into its base and write a checkpoint
  verify    hold a merged checkpoint against its base and adapter
  pipeline  run, merge, verify, and evaluate before and after, with one command
  push      upload a checkpoint to a hub
  data      check, show, mix and prepare data sets: `python -m training data --help`

`python -m training VERB --help` lists the flags of a verb."""


def main(arguments: list[str]) -> int:
    """Run one verb; returns the exit code: 0 done, 1 failed, 2 something that the user can mend."""
    verbs = {"run": _run, "merge": _merge, "verify": _verify, "pipeline": _pipeline, "push": _push, "data": _data}
    return run_verb(arguments, verbs, USAGE, (ConfigError, DataError, ArtifactError))


def _run(arguments: list[str]) -> int:
    config, flags = _run_parser().load(TrainingConfig, arguments)
    if flags.profile != "none":
        config = _with_profile(config, flags.profile, arguments)

    from training.plan import make_plan

    plan = make_plan(config)
    if flags.dry_run:
        print(json.dumps(config.model_dump(mode="json"), indent=2))
        print(plan)
        return 0
    print(plan, flush=True)

    from ray.train import TrainingFailedError

    from training.driver import RunFailed, run

    try:
        outcome = run(config)
    except RunFailed as error:
        tell_error(str(error))
        return 2
    except TrainingFailedError as error:
        tell_error(f"training failed: {error}")
        return 1
    if outcome.adapter is None:
        print(f"stopped   at step {outcome.step}, which is saved; the same command goes on from there")
        return outcome.exit_code
    print(f"adapter   {outcome.adapter}")
    return 0


def _run_parser() -> ConfigParser:
    parser = ConfigParser(
        TrainingConfig, prog="python -m training run", description="Fine-tune gpt-oss with LoRA through Ray Train."
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and the plan, and exit"
    )
    parser.add_argument(
        "--profile",
        default="none",
        metavar="auto|PATH|none",
        help="batch settings that python -m tuning search found, on top of the files and below the flags: auto takes "
        "those for the GPU and model at hand (default: none)",
    )
    return parser


def _with_profile(config: TrainingConfig, wanted: str, arguments: list[str]) -> TrainingConfig:
    """The configuration with the profile that suits it, as the last of its files, or as it is where none does."""
    from training.profile import choose_profile, detected_gpus

    gpus = detected_gpus(config) if wanted == "auto" and config.workers.gpus else []
    taken = choose_profile(config, wanted, gpus)
    print(f"profile   {taken.why}", flush=True)
    if taken.path is None:
        return config
    return _run_parser().load(TrainingConfig, [*arguments, "--config", str(taken.path)])[0]


def _merge(arguments: list[str]) -> int:
    from training.merge.commands import main

    return main(arguments)


def _verify(arguments: list[str]) -> int:
    from training.verify.commands import main

    return main(arguments)


def _pipeline(arguments: list[str]) -> int:
    from training.pipeline import main

    return main(arguments)


def _push(arguments: list[str]) -> int:
    from training.push import main

    return main(arguments)


def _data(arguments: list[str]) -> int:
    from training.data.commands import main

    return main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
