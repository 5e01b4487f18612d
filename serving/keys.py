"""API keys: a file of names and hashes, who a request comes from, and how much each may ask for.

A key is 256 random bits, so its plain SHA-256 is enough: nobody can try them out, and no table holds them. What makes
passwords need a slow, salted hash is that people choose them. The key itself is shown once and stored nowhere.

Rates are counted in each replica by itself: with N replicas a key gets up to N times its rates.
"""

from __future__ import annotations

import hmac
import json
import logging
import math
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, Field, PositiveInt, ValidationError, model_validator

from cluster.config import Config, ConfigError

ANONYMOUS = "anonymous"
"""name that requests run under where no keys are asked for"""
RELOAD_SECONDS = 1.0
"""a change of the file is noticed after at most so long"""
_PREFIX = "rs-"

_logger = logging.getLogger(__name__)

KeyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]


class InvalidKeyError(Exception):
    """The request brings no key, or one that is not valid; OpenAI's 401 with code `invalid_api_key`."""


class RateLimitError(Exception):
    """The key has used what it may for now; OpenAI's 429 with code `rate_limit_exceeded`."""

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ApiKey(Config):
    """What is known of one key: never the key itself."""

    name: KeyName
    """who uses it; stands in metrics and logs"""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the key, hexadecimal"""
    created: AwareDatetime
    """when it was made"""
    expires: AwareDatetime | None = None
    """when it ceases to be valid"""
    requests_per_minute: PositiveInt | None = None
    """requests in a minute, in one replica"""
    tokens_per_minute: PositiveInt | None = None
    """tokens of prompts and answers in a minute, in one replica"""


class KeyFile(Config):
    """The file of keys, as JSON."""

    version: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()

    @model_validator(mode="after")
    def _names_differ(self) -> KeyFile:
        if len({key.name for key in self.keys}) < len(self.keys):
            raise ValueError("two keys have the same name")
        return self

    @classmethod
    def read(cls, path: str | Path) -> KeyFile:
        """The keys of a file.

        Raises:
            ConfigError: it cannot be read or holds something else; the message quotes nothing of it.
        """
        try:
            data = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(f"API keys {path}: the file cannot be read ({error.strerror})") from None
        except ValueError:
            raise ConfigError(f"API keys {path}: the file is not JSON; restore it or make the keys anew") from None
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            # A name that is no field's may be anything, so it is left out.
            known = {*cls.model_fields, *ApiKey.model_fields}
            place = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in known)
            reason = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"API keys {path}: {place or 'the file'}: {reason[:1].lower()}{reason[1:]}") from None

    def write(self, path: str | Path) -> None:
        """Replace the file in one step; only its owner may read it.

        Raises:
            ConfigError: it cannot be written.
        """
        path = Path(path)
        text = self.model_dump_json(indent=2) + "\n"
        try:
            # mkstemp makes the file with mode 0600.
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise
        except OSError as error:
            raise ConfigError(f"API keys {path}: the file cannot be written ({error.strerror})") from None


def new_key() -> str:
    """A fresh key with 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def hash_of(key: str) -> str:
    """What is stored of a key: its SHA-256, hexadecimal."""
    return sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class Caller:
    """Who a request comes from, and what it may still ask for in this replica."""

    def __init__(self, name: str, requests: _Bucket | None = None, tokens: _Bucket | None = None) -> None:
        self.name = name
        self._requests = requests
        self._tokens = tokens

    def count_request(self) -> None:
        """One more request.

        Raises:
            RateLimitError: there were too many in the last minute.
        """
        if self._requests is not None:
            _take(self._requests, 1, "requests")

    def reserve_tokens(self, tokens: int) -> Reservation:
        """Count the tokens that a request may come to take, prompt and budgets of all choices.

        Raises:
            RateLimitError: there were too many in the last minute.
        """
        if self._tokens is not None:
            _take(self._tokens, tokens, "tokens")
        return Reservation(self._tokens, tokens)


class Reservation:
    """Tokens that a request may take, until it is known how many it took."""

    def __init__(self, bucket: _Bucket | None, tokens: int) -> None:
        self._bucket = bucket
        self._tokens = tokens

    def settle(self, used: int) -> None:
        """Give back what was not used, or count what was used beyond; a second call does nothing."""
        bucket, self._bucket = self._bucket, None
        if bucket is not None:
            bucket.give(self._tokens - used)


class Keys:
    """The keys that are valid now.

    Args:
        path: file of keys; None lets everybody in, as `ANONYMOUS` and without limits.
        clock: seconds that only grow, for rates and for how often the file is looked at.
        now: the time of day, for expiry.

    Raises:
        ConfigError: the file cannot be read. Later on, a file that cannot leaves the keys as they were.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._path = None if path is None else Path(path)
        self._clock = clock
        self._now = now
        self._entries: list[tuple[bytes, ApiKey, Caller]] = []
        self._signature: tuple[int, ...] = ()
        self._looked = clock()
        if self._path is not None:
            self._signature = _signature(self._path)
            self._take_over(KeyFile.read(self._path))

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def required(self) -> bool:
        """Whether a request needs a key."""
        return self._path is not None

    def authenticate(self, authorization: str | None) -> Caller:
        """Who sends a request with this `Authorization` header.

        Every stored hash is compared, each in constant time, so that the time taken says nothing about any of them.

        Raises:
            InvalidKeyError: there is no key in it, or none that is valid now.
        """
        if self._path is None:
            return Caller(ANONYMOUS)
        self._reload()
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            raise InvalidKeyError("an API key is needed; send it in the header Authorization: Bearer KEY")
        digest = hash_of(key).encode()
        found: tuple[ApiKey, Caller] | None = None
        for stored, entry, caller in self._entries:
            if hmac.compare_digest(stored, digest):
                found = entry, caller
        if found is None:
            raise InvalidKeyError("the API key is not valid here")
        if found[0].expires is not None and found[0].expires <= self._now():
            raise InvalidKeyError(f"the API key {found[0].name} has expired")
        return found[1]

    def _reload(self) -> None:
        """Look whether the file has changed, at most once in `RELOAD_SECONDS`."""
        assert self._path is not None
        if self._clock() - self._looked < RELOAD_SECONDS:
            return
        self._looked = self._clock()
        signature = _signature(self._path)
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self._take_over(KeyFile.read(self._path))
        except ConfigError as error:
            _logger.error("the API keys stay as they were: %s", error)

    def _take_over(self, file: KeyFile) -> None:
        """A key whose limits did not change keeps what it has used of them."""
        known = {entry: caller for _, entry, caller in self._entries}
        entries = []
        for entry in file.keys:
            caller = known.get(entry)
            if caller is None:
                requests, tokens = entry.requests_per_minute, entry.tokens_per_minute
                caller = Caller(entry.name, _bucket(requests, self._clock), _bucket(tokens, self._clock))
            entries.append((entry.sha256.encode(), entry, caller))
        self._entries = entries


class _Bucket:
    """Tokens that come back at an even rate, a minute's worth at most. It may be overdrawn."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._filled = clock()

    def take(self, amount: int) -> float:
        """Take `amount`, or nothing; returns the seconds until it could be taken, 0 if it was.

        More than a minute's worth is given when the bucket is full, and makes a debt.
        """
        self._fill()
        missing = min(amount, self.per_minute) - self._level
        # A rounding error must not keep a request waiting for ever.
        if missing > 1e-9 * self.per_minute:
            return missing * 60.0 / self.per_minute
        self._level -= amount
        return 0.0

    def give(self, amount: int) -> None:
        self._fill()
        self._level = min(float(self.per_minute), self._level + amount)

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(float(self.per_minute), self._level + (now - self._filled) * self.per_minute / 60.0)
        self._filled = now


def _bucket(per_minute: int | None, clock: Callable[[], float]) -> _Bucket | None:
    return None if per_minute is None else _Bucket(per_minute, clock)


def _take(bucket: _Bucket, amount: int, what: str) -> None:
    if seconds := bucket.take(amount):
        message = f"this API key may use {bucket.per_minute} {what} per minute, and has used them"
        raise RateLimitError(message, max(1, math.ceil(seconds)))


def _signature(path: Path) -> tuple[int, ...]:
    """Changes whenever the file does; empty when it is not there."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino
