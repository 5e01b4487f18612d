"""python -m serving deploy | ask | stop"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from cluster.config import ConfigError, ConfigParser
from serving.config import ServingConfig


def main(arguments: Sequence[str]) -> int:
    """Runs one verb; returns the exit status: 0 done, 1 failed, 2 wrong usage."""
    verbs: dict[str, Callable[[Sequence[str]], int]] = {"deploy": _deploy, "ask": _ask, "stop": _stop}
    if not arguments or arguments[0] not in verbs:
        wanted = arguments and arguments[0] in ("-h", "--help")
        print(_USAGE, file=sys.stdout if wanted else sys.stderr)
        return 0 if wanted else 2
    try:
        return verbs[arguments[0]](arguments[1:])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


_USAGE = """usage: python -m serving VERB ...

  deploy --config FILE [--dry-run]   serve a merged checkpoint on Ray
  ask QUESTION [--language fr]       ask an endpoint and print thinking and answer
  stop --config FILE                 take the application off the cluster

Each verb explains its flags with --help."""


def _deploy(arguments: Sequence[str]) -> int:
    parser = ConfigParser(
        ServingConfig,
        prog="python -m serving deploy",
        description="Serves a merged checkpoint: on the Ray cluster that RAY_ADDRESS names, where it goes on running, "
        "or on a local Ray until Ctrl-C.",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")
    config, flags = parser.load(ServingConfig, arguments)
    if flags.dry_run:
        print(config.model_dump_json(indent=2))
        return 0
    from serving import deployment

    return deployment.deploy(config)


def _stop(arguments: Sequence[str]) -> int:
    parser = ConfigParser(
        ServingConfig,
        prog="python -m serving stop",
        description="Deletes the application endpoint.application from the Ray cluster that RAY_ADDRESS names.",
    )
    config, _ = parser.load(ServingConfig, arguments)
    from serving import deployment

    return deployment.stop(config)


def _ask(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m serving ask", description="Asks an endpoint, and prints the thinking and the answer."
    )
    parser.add_argument("question")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the endpoint (default: %(default)s)")
    parser.add_argument("--model", help="model to ask; the endpoint's only one if not given")
    parser.add_argument("--language", help="language of the thinking: a tag such as fr, or a name such as French")
    parser.add_argument("--effort", choices=("low", "medium", "high"), help="how much to think")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--temperature", type=float, help="0 always takes the most likely token")
    parser.add_argument("--maximum-tokens", type=int, help="budget of thinking and answer together")
    flags = parser.parse_args(list(arguments))
    from serving import client

    return client.ask(flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
