"""Asks the held-out questions of an endpoint over HTTP, many at a time, and grades the replies."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tqdm import tqdm

from cluster.languages import detect_language
from training.demo.grading import adheres, is_right

CONCURRENT = 16
MAXIMUM_TOKENS = 160
SECONDS = 120.0


@dataclass(frozen=True)
class Graded:
    """One question with its reply: `language` is that of the thinking, as found in its text."""

    record: dict[str, Any]
    thinking: str
    answer: str
    language: str
    adheres: bool
    right: bool

    @property
    def question(self) -> str:
        """The user's words."""
        return str(self.record["messages"][-1]["content"])


def read_questions(path: Path, per_task: int) -> list[dict[str, Any]]:
    """The first `per_task` questions of each language and task of a held-out file, in the file's order."""
    taken: dict[tuple[str, str], int] = {}
    chosen = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        key = (record["language"], record["task"])
        taken[key] = taken.get(key, 0) + 1
        if taken[key] <= per_task:
            chosen.append(record)
    return chosen


def ask_all(url: str, model: str, records: list[dict[str, Any]]) -> list[Graded]:
    """Greedy replies to all records, graded, in their order.

    Raises:
        httpx.HTTPStatusError: the endpoint answered a question with an error.
    """
    local = threading.local()

    def ask(record: dict[str, Any]) -> Graded:
        if not hasattr(local, "client"):
            local.client = httpx.Client(timeout=SECONDS)
        request = {
            "model": model,
            "messages": [message for message in record["messages"] if message["role"] == "user"],
            "reasoning_language": record["reasoning_language"],
            "reasoning_effort": "medium",
            "temperature": 0,
            "max_completion_tokens": MAXIMUM_TOKENS,
        }
        response = local.client.post(f"{url}/v1/chat/completions", json=request)
        response.raise_for_status()
        return grade(record, response.json()["choices"][0]["message"])

    with ThreadPoolExecutor(CONCURRENT) as pool:
        return list(tqdm(pool.map(ask, records), desc="asking", total=len(records), unit="question", mininterval=2.0))


def grade(record: dict[str, Any], message: dict[str, Any]) -> Graded:
    """Hold an OpenAI-shaped `message` with `reasoning` and `content` against its record."""
    thinking, answer = message.get("reasoning") or "", message.get("content") or ""
    return Graded(
        record, thinking, answer, detect_language(thinking), adheres(record, thinking), is_right(record, answer)
    )


def shares(graded: list[Graded]) -> tuple[float, float]:
    """Adherence outside English, and accuracy over all, as shares of 1."""
    foreign = [reply.adheres for reply in graded if reply.record["reasoning_language"] != "en"]
    right = [reply.right for reply in graded]
    return round(sum(foreign) / len(foreign), 4), round(sum(right) / len(right), 4)
