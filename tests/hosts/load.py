"""Questions to an endpoint, several at a time, half of them as streams: `python -m tests.hosts.load LOG STOP URL …`.

Each request's end is a line of JSON in LOG: when it began and ended by the monotonic clock, whom it asked, and its
`end`: `answered`, `error CODE` for an error of OpenAI's form, or what was wrong with it. It asks until the file STOP is
there.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import httpx

CLIENTS = 6
ANSWER_SECONDS = 120.0
"""a request that takes longer hangs"""
PAUSE_SECONDS = 0.1
ANSWERED = "answered"
QUESTION = "What is the capital of Kenya?"


async def main(log: Path, stop: Path, urls: list[str]) -> None:
    """Ask until `stop` is there, and wait for the last answers."""
    with log.open("a", buffering=1) as lines:

        async def client(number: int) -> None:
            turn = number
            while not stop.exists():
                turn += 1
                url, begun = urls[turn % len(urls)], time.monotonic()
                try:
                    # A connection for each: what a balancer in front of the hosts would give.
                    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS, trust_env=False) as http:
                        end = await ask(http, stream=turn // len(urls) % 2 == 0)
                except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
                    end = repr(error)
                told = {"begun": begun, "ended": time.monotonic(), "url": url, "end": end}
                lines.write(json.dumps(told) + "\n")
                await asyncio.sleep(PAUSE_SECONDS)

        await asyncio.gather(*(client(number) for number in range(CLIENTS)))


async def ask(http: httpx.AsyncClient, *, stream: bool) -> str:
    """How one request ends.

    Raises:
        httpx.HTTPError: without an answer.
        ValueError, KeyError, TypeError: what came is neither an answer nor an error of OpenAI's form.
    """
    body = {"model": "raysoner-demo", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    body |= {"max_completion_tokens": 160, "stream": stream}
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            return f"error {code(json.loads(await response.aread()))}"
        if not stream:
            (choice,) = json.loads(await response.aread())["choices"]
            return right(choice["message"]["content"])
        text = ""
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return right(text)
            if data.startswith("{"):
                event = json.loads(data)
                if "error" in event:
                    return f"error {code(event)}"
                text += "".join(choice["delta"].get("content", "") for choice in event["choices"])
    raise ValueError("a stream ended without [DONE] and without an error")


def right(content: str) -> str:
    """`answered`, if it is the answer."""
    if "Nairobi" not in content:
        raise ValueError(f"answered {content!r}")
    return ANSWERED


def code(body: Any) -> str:
    """Of an error in OpenAI's form."""
    error = body["error"]
    if set(error) != {"message", "type", "param", "code"}:
        raise ValueError(f"an error of another form: {sorted(error)}")
    return str(error["code"] or error["message"])


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
