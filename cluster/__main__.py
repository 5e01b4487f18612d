"""Command line of the cluster: `python -m cluster check | plan | submit | render`."""

from __future__ import annotations

import argparse
import importlib
import sys
from functools import partial
from typing import NoReturn

from cluster.config import ConfigError
from cluster.verbs import run_verb

VERBS = {
    "check": ("cluster.checking.command", "what each node of a running Ray cluster has, what is wrong, and the remedy"),
    "plan": ("cluster.planning.command", "strategy, memory, speed and hours of a model and its data on some GPUs"),
    "submit": ("cluster.submission.command", "run a command as a job of a Ray cluster, from this directory"),
    "render": (
        "cluster.deploy.commands",
        "write manifests, files of ray up and scripts from the description of a cluster; dashboards and alerts",
    ),
}
WHOLE = ("render",)
"""verbs whose module has a `main` that takes the words, for each field of a configuration is a flag of theirs"""


class Parser(argparse.ArgumentParser):
    """Raises a `ConfigError` where argparse would exit."""

    def error(self, message: str) -> NoReturn:
        """One sentence, and where more is told."""
        raise ConfigError(f"{message}: --help lists the flags")


def usage() -> str:
    """What the verbs do."""
    verbs = "\n".join(f"  {verb:<7} {what}" for verb, (_, what) in VERBS.items())
    help_line = "`python -m cluster VERB --help` lists the flags of a verb."
    return f"usage: python -m cluster VERB [flags]\n\n{verbs}\n\n{help_line}"


def main(arguments: list[str]) -> int:
    """Run one verb; returns the exit code: 0 done, 1 failed, 2 something that the user can mend."""
    return run_verb(arguments, {verb: partial(_run, verb) for verb in VERBS}, usage(), (ConfigError,))


def _run(verb: str, words: list[str]) -> int:
    module_name, what = VERBS[verb]
    command = importlib.import_module(module_name)
    if verb in WHOLE:
        return int(command.main(words))
    parser = Parser(prog=f"python -m cluster {verb}", description=what[0].upper() + what[1:] + ".", allow_abbrev=False)
    command.add_arguments(parser)
    return int(command.run(parser.parse_args(words)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
