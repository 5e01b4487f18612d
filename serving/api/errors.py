"""Errors in OpenAI's form.

Reference: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping

from serving.admission import DeadlineError, OverloadedError
from serving.engines.base import EngineError
from serving.generation import GenerationError
from serving.keys import InvalidKeyError, RateLimitError

_logger = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}


class ToldError(Exception):
    """Ends a stream of events of which the last has told the client, in its interface's own form, what failed."""

    def __init__(self, told: ApiError) -> None:
        super().__init__(str(told))
        self.told = told


TOLD = (ApiError, EngineError, GenerationError, OverloadedError, DeadlineError, InvalidKeyError, RateLimitError)
"""exceptions that are answers; any other is a bug"""


def to_api_error(error: Exception) -> ApiError:
    """What a client is told of an exception; a bug is logged, and told apart by nothing but its status."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ToldError):
        return error.told
    if isinstance(error, InvalidKeyError):
        headers = {"WWW-Authenticate": "Bearer"}
        return ApiError(401, str(error), type="authentication_error", code="invalid_api_key", headers=headers)
    if isinstance(error, RateLimitError | OverloadedError):
        code = "rate_limit_exceeded" if isinstance(error, RateLimitError) else "overloaded"
        headers = {"Retry-After": str(error.retry_after_seconds)}
        return ApiError(429, str(error), type="rate_limit_error", code=code, headers=headers)
    if isinstance(error, DeadlineError):
        return ApiError(504, str(error), type="server_error", code="deadline_exceeded")
    if isinstance(error, GenerationError):
        return ApiError(502, str(error), type="server_error", code=error.code)
    if isinstance(error, EngineError):
        return ApiError(503, f"the engine failed: {error}", type="server_error", code="engine_failed")
    _logger.error(f"a request failed:\n{_origin(error)}")
    return ApiError(500, "the server failed; its log says why", type="server_error", code="internal_error")


def _origin(error: BaseException) -> str:
    """Where a bug arose and of what kind it is, its causes first.

    Its message is left out, which may hold what a user or the model wrote: that of a KeyError is the key.
    """
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    before = f"{_origin(cause)}and from it:\n" if cause is not None else ""
    return f"{before}{''.join(traceback.format_tb(error.__traceback__))}{type(error).__qualname__}\n"
