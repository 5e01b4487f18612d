"""The verbs of a command line: `python -m FOLDER VERB`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

Verb = Callable[[list[str]], int]


def run_verb(arguments: list[str], verbs: Mapping[str, Verb], usage: str, mendable: tuple[type[Exception], ...]) -> int:
    """Run the verb that `arguments` begin with; returns its exit code, and 2 for what the user can mend.

    Args:
        arguments: the words behind the folder's name.
        verbs: what each does with the words behind it.
        usage: printed without a verb, or for --help.
        mendable: exceptions whose message is all that the user needs.
    """
    if not arguments or arguments[0] not in verbs:
        asked = arguments[:1] in (["-h"], ["--help"])
        print(usage, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        return verbs[arguments[0]](arguments[1:])
    except mendable as error:
        tell_error(str(error))
        return 2


def tell_error(text: str) -> None:
    """Print `error: TEXT` as the last line: Ray is left first, which prints what workers still have to say."""
    if (ray := sys.modules.get("ray")) and ray.is_initialized():
        ray.shutdown()
    print(f"error: {text}", file=sys.stderr, flush=True)
