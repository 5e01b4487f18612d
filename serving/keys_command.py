"""python -m serving keys create | list | revoke: the file of API keys that `security.keys` names."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from cluster.config import ConfigError
from serving.keys import ApiKey, KeyFile, KeyName, hash_of, new_key


def main(arguments: Sequence[str]) -> int:
    """Runs one verb; returns the exit status.

    Raises:
        ConfigError: the file cannot be read or written, or the name or the date does not fit.
    """
    parser = argparse.ArgumentParser(
        prog="python -m serving keys",
        description="Makes, lists and revokes API keys. Replicas that run notice a change of the file within a second.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="create | list | revoke")
    create = verbs.add_parser("create", help="make a key, and print it this once")
    create.add_argument("name", help="who will use it: letters, digits and ._@-")
    create.add_argument("--requests-per-minute", type=_positive, metavar="N", help="most requests, in each replica")
    create.add_argument("--tokens-per-minute", type=_positive, metavar="N", help="most tokens, in each replica")
    create.add_argument("--expires", metavar="DATE", help="last day of its validity in UTC, such as 2030-12-31")
    listing = verbs.add_parser("list", help="print names, limits and expiry")
    revoke = verbs.add_parser("revoke", help="take a key out of the file")
    revoke.add_argument("name", help="the name it was made with")
    for verb in (create, listing, revoke):
        verb.add_argument("--file", required=True, type=Path, help="the file that security.keys names")
    flags = parser.parse_args(list(arguments))
    if flags.verb == "create":
        return _create(flags)
    return _list(flags.file) if flags.verb == "list" else _revoke(flags.file, flags.name)


def _create(flags: argparse.Namespace) -> int:
    """Prints the key alone on standard output, so that a script can take it."""
    try:
        TypeAdapter(KeyName).validate_python(flags.name)
    except ValidationError:
        raise ConfigError(
            f"name {flags.name!r}: give 1 to 64 letters, digits and . _ @ -, a letter or digit first"
        ) from None
    file = KeyFile.read(flags.file) if flags.file.exists() else KeyFile()
    if any(key.name == flags.name for key in file.keys):
        raise ConfigError(f"{flags.file}: a key named {flags.name} exists; revoke it first, or choose another name")
    key = new_key()
    entry = ApiKey(
        name=flags.name,
        sha256=hash_of(key),
        created=datetime.now(UTC).replace(microsecond=0),
        expires=None if flags.expires is None else _end_of_day(flags.expires),
        requests_per_minute=flags.requests_per_minute,
        tokens_per_minute=flags.tokens_per_minute,
    )
    KeyFile(keys=(*file.keys, entry)).write(flags.file)
    print(key)
    return 0


def _list(path: Path) -> int:
    for key in KeyFile.read(path).keys:
        limits = [
            f"{limit} {what} per minute"
            for limit, what in ((key.requests_per_minute, "requests"), (key.tokens_per_minute, "tokens"))
            if limit is not None
        ]
        validity = "does not expire" if key.expires is None else f"expires {key.expires:%Y-%m-%d %H:%M} UTC"
        print(f"{key.name}: made {key.created:%Y-%m-%d}, {validity}, {' and '.join(limits) or 'no limits'}")
    return 0


def _revoke(path: Path, name: str) -> int:
    file = KeyFile.read(path)
    remaining = tuple(key for key in file.keys if key.name != name)
    if len(remaining) == len(file.keys):
        raise ConfigError(f"{path}: no key is named {name}; python -m serving keys list --file {path} prints the names")
    KeyFile(keys=remaining).write(path)
    print(f"{name} is revoked")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _end_of_day(text: str) -> datetime:
    """The moment at which a day is over in UTC."""
    try:
        day = datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise ConfigError(f"--expires {text}: give a date such as 2030-12-31") from None
    end = day + timedelta(days=1)
    if end <= datetime.now(UTC):
        raise ConfigError(f"--expires {text}: that day is over")
    return end
