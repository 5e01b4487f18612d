"""What Raysoner tells of a choice beside the answer, in every interface under the same names."""

from __future__ import annotations

import random
from typing import Any

from serving.generation import Generation


def new_id() -> str:
    """Of an answer: 128 random bits in hexadecimal, which are no secret.

    The system's own source of them would give other threads Python's lock at each call, for milliseconds under load.
    """
    return f"{random.getrandbits(128):032x}"


def findings(generation: Generation) -> dict[str, Any]:
    """How a choice ended, text outside any channel, what is wrong with calls and answer, and what was done about it.

    Fields that would tell of nothing are left out; `outcome` and `reasoning_language` always stand.
    """
    reply = generation.reply
    found: dict[str, Any] = {"outcome": reply.outcome.value}
    if reply.unparsed:
        found["unparsed"] = reply.unparsed
    faults = generation.faults
    if faults.calls:
        found["tool_errors"] = faults.calls
    if faults.formed:
        found["response_format"] = {"valid": faults.answer is None, "error": faults.answer}
    if generation.rescued:
        found["rescued"] = True
    if generation.forced:
        found["forced"] = True
    if generation.attempts > 1:
        found |= {"attempts": generation.attempts, "prefilled": generation.prefilled}
    return {**found, "reasoning_language": generation.language.model_dump(mode="json")}
