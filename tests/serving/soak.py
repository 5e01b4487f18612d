"""An endpoint under mixed load whose replicas are killed, whose application is replaced, and whose clients leave.

python -m tests.serving.soak --seconds 600

Every request must end in a right answer or in an error of OpenAI's form, and none may hang. A greedy question must be
answered as it was before anything was disturbed. Memory and open files of the processes that live through it all are
reported as a slope.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from cluster.local import LocalRay, free_ports, local_ray
from tests.benchmarks.record import RESULTS, keep

CONFIG = "serving/configs/demo.toml"
MODEL = "raysoner-demo"
QUESTIONS = (
    "What is the capital of Kenya?",
    "What is the capital of Peru?",
    "Which is larger: 9.9 or 9.11?",
    "How many times does the letter s occur in the word mississippi?",
)
ANSWER_SECONDS = 180.0
"""a request that takes longer hangs"""
REPLICA = "ServeReplica"
LASTING = {"proxy": "ProxyActor", "controller": "ServeController"}
"""processes that nothing kills, by a word of their command line"""


@dataclass
class Report:
    """What happened."""

    ends: Counter[str] = field(default_factory=Counter)
    """how requests ended: answered, left (by the client), refused (4xx), error CODE"""
    wrong: list[str] = field(default_factory=list)
    untyped: list[str] = field(default_factory=list)
    """ends that are no answer and no error of OpenAI's form, hanging ones among them"""
    kills: int = 0
    updates: int = 0
    samples: dict[str, list[tuple[float, float, int]]] = field(default_factory=dict)
    """of each lasting process: seconds, resident MiB, open files"""

    def slopes(self) -> dict[str, float]:
        """MiB and files a minute that lasting processes grew by, over the second half of the time."""
        found = {}
        for name, samples in self.samples.items():
            late = samples[len(samples) // 2 :]
            if len(late) > 2:
                found[f"{name}_mib_per_minute"] = 60 * _slope([(at, mib) for at, mib, _ in late])
                found[f"{name}_files_per_minute"] = 60 * _slope([(at, float(files)) for at, _, files in late])
        return {name: round(slope, 2) for name, slope in found.items()}


class Soak:
    """Load on an endpoint, and what disturbs it.

    Args:
        ray: where the endpoint runs; nothing else may run there.
        model: folder of the checkpoint.
        clients: requests in flight at a time.
        kill_seconds: mean time between two kills of a replica.
    """

    def __init__(self, ray: LocalRay, model: Path, *, clients: int = 6, kill_seconds: float = 20.0) -> None:
        self.report = Report()
        self._ray = ray
        self._model = model
        self._clients = clients
        self._kill_seconds = kill_seconds
        self._url = f"http://127.0.0.1:{free_ports(1)[0]}"
        self._expected: dict[str, Any] = {}
        self._chance = random.Random(0)

    def run(self, seconds: float) -> Report:
        """Deploy, disturb for so long, let everything settle, and take the application off."""
        self._deploy(messages=16)
        try:
            asyncio.run(self._run(seconds))
        finally:
            self._command("stop")
        return self.report

    async def _run(self, seconds: float) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=ANSWER_SECONDS) as http:
            for question in QUESTIONS:
                response = await http.post("/v1/chat/completions", json=_body(question))
                response.raise_for_status()
                self._expected[question] = response.json()["choices"][0]["message"]["content"]
            end = time.monotonic() + seconds
            disturbing = [self._kill_now_and_then(end), self._update(end, seconds), self._sample(end)]
            asking = [self._client(http, end, number) for number in range(self._clients)]
            await asyncio.gather(*disturbing, *asking)

    async def _client(self, http: httpx.AsyncClient, end: float, number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < end:
            question = chance.choice(QUESTIONS)
            kind = chance.choice((self._whole, self._stream, self._leave, self._refused))
            try:
                await kind(http, question, chance)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                self.report.untyped.append(f"{kind.__name__}: {error!r}")

    async def _whole(self, http: httpx.AsyncClient, question: str, chance: random.Random) -> None:
        response = await http.post("/v1/chat/completions", json=_body(question, n=chance.choice((1, 2))))
        if response.status_code != 200:
            self.report.ends[f"error {response.json()['error']['code']}"] += 1
            return
        for choice in response.json()["choices"]:
            self._hold(question, choice["message"]["content"])

    async def _stream(self, http: httpx.AsyncClient, question: str, chance: random.Random) -> None:
        text, done = "", False
        async with http.stream("POST", "/v1/chat/completions", json=_body(question, stream=True)) as response:
            if response.status_code != 200:
                self.report.ends[f"error {json.loads(await response.aread())['error']['code']}"] += 1
                return
            async for line in response.aiter_lines():
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    done = True
                elif data.startswith("{"):
                    event = json.loads(data)
                    if "error" in event:
                        self.report.ends[f"error {event['error']['code']}"] += 1
                        return
                    text += "".join(choice["delta"].get("content", "") for choice in event["choices"])
        if not done:
            raise ValueError("a stream ended without [DONE] and without an error")
        self._hold(question, text)

    async def _leave(self, http: httpx.AsyncClient, question: str, chance: random.Random) -> None:
        body = _body(question, stream=chance.random() < 0.5, max_completion_tokens=1000, temperature=1.0, n=4)
        try:
            async with asyncio.timeout(chance.uniform(0.05, 1.0)):
                await http.post("/v1/chat/completions", json=body)
        except TimeoutError:
            pass
        self.report.ends["left"] += 1

    async def _refused(self, http: httpx.AsyncClient, question: str, chance: random.Random) -> None:
        response = await http.post("/v1/chat/completions", json=_body(question, colour="red"))
        code = response.json()["error"]["code"]
        self.report.ends["refused" if response.status_code == 400 else f"error {code}"] += 1

    def _hold(self, question: str, content: str) -> None:
        self.report.ends["answered"] += 1
        if content != self._expected[question]:
            self.report.wrong.append(f"{question}: {content!r} instead of {self._expected[question]!r}")

    async def _kill_now_and_then(self, end: float) -> None:
        await asyncio.sleep(self._kill_seconds / 2)
        while time.monotonic() < end:
            replicas = self._processes((REPLICA,))
            if len(replicas) > 1:
                self._chance.choice(replicas).kill()
                self.report.kills += 1
            await asyncio.sleep(self._kill_seconds * self._chance.uniform(0.5, 1.5))

    async def _update(self, end: float, seconds: float) -> None:
        await asyncio.sleep(seconds / 3)
        if time.monotonic() < end:
            await asyncio.to_thread(self._deploy, messages=17)
            self.report.updates += 1

    async def _sample(self, end: float) -> None:
        began = time.monotonic()
        while time.monotonic() < end:
            for name, word in LASTING.items():
                for process in self._processes((word,))[:1]:
                    mib, files = process.memory_info().rss / 2**20, process.num_fds()
                    self.report.samples.setdefault(name, []).append((time.monotonic() - began, mib, files))
            await asyncio.sleep(1.0)

    def _deploy(self, *, messages: int) -> None:
        self._command("deploy", "--replicas.minimum", 2, "--replicas.maximum", 2, "--limits.messages", messages)

    def _command(self, verb: str, *flags: object) -> None:
        words: Iterable[object] = (
            *("-m", "serving", verb, "--config", CONFIG, "--model.path", self._model),
            *("--endpoint.port", self._url.rsplit(":", 1)[1], *flags),
        )
        subprocess.run([sys.executable, *map(str, words)], env=self._ray.environment, check=True)

    def _processes(self, words: tuple[str, ...]) -> list[psutil.Process]:
        """Processes of this Ray whose command line holds one of the words."""
        found = []
        token = self._ray.environment["RAY_AUTH_TOKEN"]
        for process in psutil.process_iter():
            try:
                wanted = any(word in " ".join(process.cmdline()) for word in words)
                if wanted and process.environ().get("RAY_AUTH_TOKEN") == token:
                    found.append(process)
            except psutil.Error:
                continue
        return found


def _body(question: str, **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": question}
    return {"model": MODEL, "messages": [message], "temperature": 0, "max_completion_tokens": 160, **fields}


def _slope(points: list[tuple[float, float]]) -> float:
    """Of the least-squares line."""
    middle_x = sum(x for x, _ in points) / len(points)
    middle_y = sum(y for _, y in points) / len(points)
    spread = sum((x - middle_x) ** 2 for x, _ in points)
    return sum((x - middle_x) * (y - middle_y) for x, y in points) / spread if spread else 0.0


def main() -> int:
    """Run, print what happened as JSON, and keep it where asked."""
    parser = argparse.ArgumentParser(prog="python -m tests.serving.soak")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--model", type=Path, default=Path("training/demo/model").absolute())
    parser.add_argument("--keep", action="store_true", help="keep the result in tests/benchmarks/results")
    options = parser.parse_args()
    with local_ray(3) as ray:
        report = Soak(ray, options.model, clients=options.clients).run(options.seconds)
    row = {
        "name": "mixed load",
        "seconds": options.seconds,
        "ends": dict(report.ends.most_common()),
        "wrong": len(report.wrong),
        "untyped": len(report.untyped),
        "kills": report.kills,
        "updates": report.updates,
        **report.slopes(),
    }
    print(json.dumps(row, indent=2))
    for line in (*report.wrong[:10], *report.untyped[:10]):
        print(line, file=sys.stderr)
    if options.keep:
        print(keep("soak", MODEL, f"cpu{os.cpu_count()}", "make soak", [row], RESULTS))
    return 1 if report.wrong or report.untyped else 0


if __name__ == "__main__":
    sys.exit(main())
