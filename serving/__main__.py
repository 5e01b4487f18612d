"""python -m serving deploy | status | ask | chat | bench | batch | evaluate | keys | stop"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from cluster.config import ConfigError, ConfigParser
from serving.config import ServingConfig


def main(arguments: Sequence[str]) -> int:
    """Runs one verb; returns the exit status: 0 done, 1 failed, 2 wrong usage."""
    verbs: dict[str, Callable[[Sequence[str]], int]] = {
        "deploy": _deploy,
        "status": _status,
        "ask": _ask,
        "chat": _chat,
        "bench": _bench,
        "batch": _batch,
        "evaluate": _evaluate,
        "keys": _keys,
        "stop": _stop,
    }
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
  status [--url URL]                 health, models, replicas and queue of an endpoint
  ask QUESTION [--language fr]       ask an endpoint and print thinking and answer
  chat [--url URL]                   hold a conversation with an endpoint
  bench --url URL [--rate R]         put load on an endpoint and report latencies and throughput
  batch IN OUT --config FILE         answer a file of prompts without an endpoint
  evaluate --target WHERE --suite S  measure languages, answers and channels, and compare targets
  keys ...                           make, list and revoke API keys
  stop --config FILE                 take the application off the cluster

Each verb explains its flags with --help. OPENAI_API_KEY holds the API key for status, ask, chat, bench and
evaluate."""


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


def _status(arguments: Sequence[str]) -> int:
    from serving import status

    return status.main(arguments)


def _ask(arguments: Sequence[str]) -> int:
    from serving.client import ask

    return ask.main(arguments)


def _chat(arguments: Sequence[str]) -> int:
    from serving.client import chat

    return chat.main(arguments)


def _bench(arguments: Sequence[str]) -> int:
    from serving.bench import command

    return command.main(arguments)


def _batch(arguments: Sequence[str]) -> int:
    from serving.batch import command

    return command.main(arguments)


def _evaluate(arguments: Sequence[str]) -> int:
    from serving.evaluation import command

    return command.main(arguments)


def _keys(arguments: Sequence[str]) -> int:
    from serving import keys_command

    return keys_command.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
