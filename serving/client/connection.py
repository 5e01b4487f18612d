"""A connection to an OpenAI-compatible endpoint: its address, the API key, its errors in one sentence, its streams."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from typing import Any
from urllib.parse import urlsplit

import httpx

KEY_VARIABLE = "OPENAI_API_KEY"
"""environment variable of the API key; a flag would show it in the list of processes"""
DEFAULT_URL = "http://127.0.0.1:8000"

_TIMEOUT = httpx.Timeout(10.0, read=None)


class RefusedError(Exception):
    """The endpoint answered with an error, or not as its interface promises; the message is one sentence."""


def base_url(url: str) -> str:
    """`url` without a final slash or `/v1`.

    Raises:
        ValueError: it is not an http:// or https:// address.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address of an endpoint; give one such as {DEFAULT_URL}")
    if parts.username or parts.password:
        raise ValueError(f"the address holds a password; leave it out, and set {KEY_VARIABLE} where a key is needed")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def authorization() -> dict[str, str]:
    """The header that carries the API key of `OPENAI_API_KEY`; none where that is not set.

    Raises:
        ValueError: the key has characters that a header cannot carry. The message leaves the key out.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{KEY_VARIABLE} holds characters that no API key has; set it again")
    return {"Authorization": f"Bearer {key}"}


def connect(url: str) -> httpx.Client:
    """A client for `url`, with the API key of the environment.

    Raises:
        ValueError: as `base_url` and `authorization`.
    """
    return httpx.Client(base_url=base_url(url), headers=authorization(), timeout=_TIMEOUT)


def silence(url: str, error: httpx.TransportError) -> str:
    """The sentence for an endpoint that does not answer."""
    return f"{url} does not answer ({error}); is the endpoint running there?"


def only_model(http: httpx.Client) -> str:
    """The model to ask where none was named: the only one.

    Raises:
        RefusedError: the endpoint serves none or several, or refuses to say.
    """
    names = models(http)
    if names is None:
        raise RefusedError("the endpoint does not list its models; name one with --model")
    if len(names) != 1:
        raise RefusedError(f"the endpoint serves {', '.join(names) or 'no model'}; choose one with --model")
    return names[0]


def models(http: httpx.Client, **options: Any) -> list[str] | None:
    """Names of the models that the endpoint serves; None where its answer is no list of them.

    Args:
        options: of httpx's `get`.

    Raises:
        RefusedError: it refuses to say.
    """
    response = http.get("/v1/models", **options)
    raise_for_error(response)
    try:
        return [str(model["id"]) for model in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return None


def chunks(http: httpx.Client, request: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    """Chunks of a streamed chat completion, as they come. Closing the iterator closes the connection.

    Raises:
        RefusedError: the endpoint answers with an error, before the first chunk or in the stream, or the stream ends
            before the answer does.
    """
    with http.stream("POST", "/v1/chat/completions", json=request) as response:
        if response.is_error:
            response.read()
        raise_for_error(response)
        for line in response.iter_lines():
            data = line.removeprefix("data:").strip()
            if data == line.strip():
                continue
            if data == "[DONE]":
                return
            try:
                chunk = json.loads(data)
            except ValueError:
                raise RefusedError("the endpoint sent an event that is not JSON") from None
            if "error" in chunk:
                raise RefusedError(error_message(chunk) or "the endpoint broke the answer off")
            yield chunk
    raise RefusedError("the answer broke off: the endpoint closed the stream before its end")


def raise_for_error(response: httpx.Response) -> None:
    """Raises RefusedError with the endpoint's own reason if `response`, which has been read, is an error."""
    if response.is_error:
        try:
            reason = error_message(response.json())
        except ValueError:
            reason = None
        reason = reason or response.text.strip()[:500] or response.reason_phrase
        hint = f"; set {KEY_VARIABLE} to an API key of this endpoint" if response.status_code == 401 else ""
        raise RefusedError(f"the endpoint answered {response.status_code}: {reason}{hint}")


def error_message(body: Any) -> str | None:
    """The message of an error in OpenAI's form; None of anything else."""
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])
    return error if isinstance(error, str) else None
