"""Joining a running Ray cluster: whether anything answers, and one sentence where Ray does not let a process in."""

from __future__ import annotations

import os
import re
import socket
from typing import Any

from cluster.config import ConfigError

CONNECT_SECONDS = 5.0


def join(address: str, said: str, **options: Any) -> None:
    """Make this process a driver of the cluster at `address`.

    Args:
        address: of the head, `HOST:PORT`, `auto` or `ray://HOST:PORT`.
        said: where the address is from, as `--address`.
        options: of `ray.init`.

    Raises:
        ConfigError: nothing answers there, the token is another or missing, or the cluster runs another Ray or Python.
    """
    import ray

    require_answer(address, said)
    try:
        ray.init(address, **options)
    except Exception as error:  # Ray's errors of joining have no class in common
        raise ConfigError(f"the Ray cluster at {address} does not let this process in: {refusal(error)}") from None


def require_answer(address: str, said: str) -> None:
    """See that something listens at `address`: Ray waits long for an address that nothing listens on.

    Raises:
        ConfigError: nothing does, or it is no address.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"{said} {address}: HOST:PORT of a cluster's head is needed, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"nothing answers at {address} ({reason}): is it the head's address, and Ray up?") from None


def refusal(error: BaseException) -> str:
    """Ray's error of joining, on one line, with what to do about it where that is known."""
    text = " ".join(str(error).split()) or type(error).__name__
    if versions := re.search(r"Version mismatch.* Ray: (\S+) Python: (\S+) .* Ray: (\S+) Python: (\S+)", text):
        theirs, own = ("Ray {} and Python {}".format(*versions.groups()[at : at + 2]) for at in (0, 2))
        return f"it runs {theirs}, and this process {own}: install the same here, or start the command on a node of it"
    have = "RAY_AUTH_TOKEN here is another" if os.environ.get("RAY_AUTH_TOKEN") else "there is none here"
    token = f"it asks for its token, and {have}: export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as on its nodes"
    if any(word in text.lower() for word in ("unauthenticated", "authentication", "token")):
        return token
    if "Failed to connect to Ray" in text:  # all that Ray raises of a refused token; the port has answered
        return f"{token}; or what listens there is no Ray"
    return text[:300]
