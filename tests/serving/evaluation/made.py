"""Items and answers made for tests, and an endpoint that knows the answers to a suite."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import web

from serving.evaluation.answers import Answer, Asking
from serving.evaluation.items import Item, parse_item
from serving.evaluation.scoring import Scored, score
from serving.evaluation.suites import Suite

THOUGHTS = {
    "en": "I add the two numbers and look at the result.",
    "fr": "J'additionne les deux nombres et je regarde le résultat.",
    "ar": "أجمع العددين معًا ثم أنظر إلى النتيجة.",
    "ja": "二つの数を足して、結果を確認します。",
}
ANSWERS = {"en": "The result is {}.", "fr": "Le résultat est {}.", "ar": "النتيجة هي {}.", "ja": "結果は{}です。"}


def item(**fields: Any) -> Item:
    return parse_item({"id": "a", "language": "en", "prompt": "What?", **fields}, "made")


def answer(text: str = "", key: str = "a||0", **fields: Any) -> Answer:
    return Answer(key=key, answer=text, **{"outcome": "complete", **fields})


def suite(*languages: str, each: int = 3) -> Suite:
    """Sums in some languages: question `tag-N` asks for N + 1."""
    made = [
        item(
            id=f"{tag}-{number}",
            language=tag,
            prompt=f"{tag} {number}: {number} + 1 = ?",
            answer=number + 1,
            task="sum",
        )
        for tag in languages
        for number in range(each)
    ]
    return Suite("sums", tuple(made))


def scored(asked: Suite, right: Callable[[Item], bool], thinks: Callable[[Item], str], **fields: Any) -> list[Scored]:
    """Answers to all items: right or not, thinking in the language that `thinks` says."""
    wanted = [Asking(each, None, 0) for each in asked.items]
    answers = {}
    for asking in wanted:
        value = int(asking.item.answer[0]) + (not right(asking.item))
        answers[asking.key] = answer(
            ANSWERS[asking.item.language].format(value),
            asking.key,
            thinking=THOUGHTS[thinks(asking.item)],
            seconds=0.5,
            completion_tokens=20,
            reasoning_tokens=12,
            **fields,
        )
    return score(wanted, answers, frozenset(ANSWERS))


def completion(text: str, thinking: str = "", **choice: Any) -> dict[str, Any]:
    """A chat completion as Raysoner's endpoint sends it."""
    message = {"role": "assistant", "content": text, "reasoning": thinking}
    usage = {"prompt_tokens": 9, "completion_tokens": 20, "completion_tokens_details": {"reasoning_tokens": 12}}
    return {
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "outcome": "complete", **choice}],
        "usage": usage,
    }


def knowing(faults: Sequence[web.Response | None] = (), then: Callable[[], Any] | None = None) -> Any:
    """A handler that answers sums; first it gives the `faults` in turns, None being no fault."""
    left = list(faults)

    async def handler(request: web.Request) -> web.StreamResponse:
        if left and (fault := left.pop(0)) is not None:
            return fault
        if then is not None:
            await then()
        body = json.loads(await request.text())
        tag, _, rest = body["messages"][-1]["content"].partition(" ")
        value = int(rest.partition(":")[0]) + 1
        return web.json_response(completion(ANSWERS[tag].format(value), THOUGHTS[tag]))

    return handler
