"""What stands in no log: no word of a question or an answer, and no API key, whatever becomes of the request.

A real endpoint in a process of its own; read are all files that Ray and Serve log to, and what the process prints.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.local import stop_tree
from serving.api.errors import to_api_error
from serving.keys import ApiKey, KeyFile, hash_of, new_key
from tests.serving.harness import MODEL, events, joined
from tests.serving.marked_replica import ANSWERED, ASKED, BUG, LATE_BUG, LATE_ERROR, SLOW

ROOT = Path(__file__).parents[2]
KEY, WRONG_KEY = new_key(), new_key()


@dataclass
class Marked:
    """An endpoint of marked replicas."""

    process: subprocess.Popen[bytes]
    url: str
    logs: Path
    """folder of Ray's session"""
    printed: Path
    """what the process has written on either stream"""

    def client(self, key: str = KEY) -> httpx.Client:
        return httpx.Client(base_url=f"{self.url}/v1", headers={"Authorization": f"Bearer {key}"}, timeout=120)

    def replace(self) -> None:
        """Put another application in place of the one that runs, and wait until it serves."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"again\n")
        self.process.stdin.flush()
        self.read_until(b"replaced")

    def read_until(self, beginning: bytes) -> str:
        """The next printed line that begins so; what comes before it is kept."""
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline()).startswith(beginning):
            assert line, self.printed.read_text()
            self.note(line)
        return line.decode().strip()

    def note(self, printed: bytes) -> None:
        with self.printed.open("ab") as stream:
            stream.write(printed)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Marked]:
    folder = tmp_path_factory.mktemp("endpoint")
    entry = ApiKey(name="ann", sha256=hash_of(KEY), created=datetime.now(UTC))
    KeyFile(keys=(entry,)).write(folder / "keys.json")
    # The path is short because socket paths may have 107 characters.
    session = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    printed = folder / "printed"
    with printed.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.serving.marked_endpoint", str(folder / "keys.json"), session],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
        )
    marked = Marked(process, "", Path(session), printed)
    try:
        marked.url = marked.read_until(b"http")
        yield marked
    finally:
        stop_tree(process)
        shutil.rmtree(session, ignore_errors=True)


def chat(**fields: Any) -> dict[str, Any]:
    """A chat completion request whose every field holds the mark that may."""
    schema = {"type": "object", "description": ASKED, "properties": {ASKED: {"enum": [ASKED], "title": ASKED}}}
    call = {"id": ASKED, "type": "function", "function": {"name": ASKED, "arguments": json.dumps({ASKED: ASKED})}}
    messages = [
        {"role": "system", "content": f"{ASKED} system"},
        {"role": "developer", "content": [{"type": "text", "text": ASKED}]},
        {"role": "user", "content": ASKED},
        {"role": "assistant", "content": ASKED, "reasoning": ASKED, "commentary": ASKED, "tool_calls": [call]},
        {"role": "tool", "content": ASKED, "tool_call_id": ASKED},
    ]
    return {
        "model": MODEL,
        "messages": messages,
        "tools": [{"type": "function", "function": {"name": ASKED, "description": ASKED, "parameters": schema}}],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": ASKED, "description": ASKED, "schema": schema},
        },
        "stop": [ASKED],
        "user": ASKED,
        "metadata": {ASKED: ASKED},
        "safety_identifier": ASKED,
        "prompt_cache_key": ASKED,
        "reasoning_language": "fr",
        **fields,
    }


def response(**fields: Any) -> dict[str, Any]:
    """The same of a request for a response."""
    schema = {"type": "object", "description": ASKED, "properties": {ASKED: {"type": "string"}}}
    return {
        "model": MODEL,
        "instructions": ASKED,
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": ASKED}]},
            {"type": "function_call", "call_id": ASKED, "name": ASKED, "arguments": json.dumps({ASKED: ASKED})},
            {"type": "function_call_output", "call_id": ASKED, "output": ASKED},
        ],
        "tools": [{"type": "function", "name": ASKED, "description": ASKED, "parameters": schema}],
        "text": {"format": {"type": "json_schema", "name": ASKED, "schema": schema}},
        "metadata": {ASKED: ASKED},
        "user": ASKED,
        **fields,
    }


INTERFACES = {"chat/completions": chat, "responses": response}

REFUSED: list[tuple[str, Any, int]] = [
    ("chat/completions", chat(model=ASKED), 404),
    ("chat/completions", chat(**{ASKED: ASKED}), 400),
    ("chat/completions", chat(reasoning_language=ASKED), 400),
    ("chat/completions", chat(temperature=ASKED), 400),
    ("chat/completions", chat(messages=[{"role": ASKED, "content": ASKED}]), 400),
    ("chat/completions", chat(tool_choice={"type": "function", "function": {"name": f"{ASKED}-other"}}), 400),
    ("chat/completions", chat(messages=[{"role": "user", "content": f"{ASKED} " * 200}]), 400),
    ("chat/completions", chat(messages=[{"role": "user", "content": f"{ASKED} " * 2000}]), 413),
    ("chat/completions", f'{{"model": "{ASKED}", '.encode(), 400),
    ("chat/completions", f'{{"model": "{ASKED}'.encode() + b'\xff"}', 400),
    ("chat/completions", chat(on_malformed="fail", on_wrong_language="fail", retries=0), 502),
    ("responses", response(model=ASKED), 404),
    ("responses", response(previous_response_id=ASKED), 400),
    ("responses", response(input=[{"type": ASKED}]), 400),
    (ASKED, chat(), 404),
]


def post(http: httpx.Client, path: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http.post(f"/{path}?question={ASKED}&api_key={KEY}", content=content)


def hang_up(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    """Leave at once where the answer would come whole, else after its first piece."""
    with (
        suppress(httpx.TimeoutException),
        http.stream("POST", f"/{path}", json=body, timeout=httpx.Timeout(30.0, read=1.0)) as reply,
    ):
        next(reply.iter_raw())


@pytest.mark.cluster
def test_a_stream_that_the_graceful_limit_cuts_ends_in_a_typed_event(endpoint: Marked) -> None:
    """Serve tells a replica of its end after its last request or not at all, so the proxy answers for it."""
    with endpoint.client() as http, ThreadPoolExecutor(1) as pool:
        body = chat(seed=SLOW, stream=True, response_format=None, stop=None, max_completion_tokens=400)
        with http.stream("POST", "/chat/completions", json=body) as reply:
            pieces = reply.iter_text()
            first = next(pieces)
            replacing = pool.submit(endpoint.replace)
            said = events(first + "".join(pieces))
        replacing.result()
        assert len(said) > 2
        assert said[-1]["error"]["code"] == "replica_lost"
        assert post(http, "chat/completions", chat()).status_code == 200


@pytest.mark.cluster
def test_neither_content_nor_keys_stand_in_logs(endpoint: Marked) -> None:
    with endpoint.client() as http:
        for path, body in INTERFACES.items():
            whole = post(http, path, body())
            assert whole.status_code == 200, whole.text
            assert ANSWERED in whole.text
            streamed = post(http, path, body(stream=True))
            told = joined(events(streamed.text), "content") if path == "chat/completions" else streamed.text
            assert ANSWERED in told
            for seed, code in ((BUG, "internal_error"), (LATE_BUG, "internal_error"), (LATE_ERROR, "engine_failed")):
                failed = post(http, path, body() | {"seed": seed})
                assert failed.status_code in (500, 503), failed.text
                assert code in failed.text
                assert code in post(http, path, body(stream=True) | {"seed": seed}).text
            for stream in (False, True):
                hang_up(http, path, body(stream=stream) | {"seed": SLOW})
        for path, body, status in REFUSED:
            refused = post(http, path, body)
            assert refused.status_code == status, refused.text
    with endpoint.client(WRONG_KEY) as http:
        assert post(http, "chat/completions", chat()).status_code == 401
    assert endpoint.process.stdin is not None
    endpoint.process.stdin.close()
    assert endpoint.process.stdout is not None
    endpoint.note(endpoint.process.stdout.read())
    assert endpoint.process.wait(120) == 0
    files = [path for path in endpoint.logs.rglob("*") if path.is_file() and "logs" in path.parts]
    logged = {path: path.read_bytes() for path in [*files, endpoint.printed]}
    everything = b"\n".join(logged.values())
    # These are the logs in question, and bugs leave their place and kind there.
    assert everything.count(b"POST /v1/chat/completions 200") >= 2
    assert everything.count(b"KeyError") >= 4
    assert b"marked_replica.py" in everything
    for secret in (ASKED, ANSWERED, KEY, WRONG_KEY, hash_of(KEY)):
        found = sorted(str(path) for path, content in logged.items() if secret.encode() in content)
        assert not found, f"{secret} stands in {found}: {_line_with(logged[Path(found[0])], secret)!r}"


def _line_with(content: bytes, secret: str) -> bytes:
    return next(line for line in content.splitlines() if secret.encode() in line)[:2000]


def test_a_bug_is_logged_by_its_place_and_kind(caplog: pytest.LogCaptureFixture) -> None:
    try:
        try:
            raise KeyError(ASKED)
        except KeyError as error:
            raise ValueError(ASKED) from error
    except ValueError as error:
        told = to_api_error(error)
    assert told.status == 500
    (record,) = caplog.records
    text = logging.Formatter("%(message)s").format(record)
    assert text.index("KeyError") < text.index("ValueError")
    assert text.count("test_a_bug_is_logged_by_its_place_and_kind") == 2
    assert ASKED not in text
