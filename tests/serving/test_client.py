"""ask and chat, against endpoints in this process."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from aiohttp import web

from serving.__main__ import main
from serving.client.connection import base_url
from tests.serving.endpoints import Endpoint, delta, ending, endpoint, refuses, streams, usage

FRENCH = {"requested": "fr", "detected": "fr", "verdict": "followed"}
ANSWER = streams(
    delta(role="assistant", content=""),
    delta(reasoning="Je ", reasoning_content="Je "),
    delta(reasoning="pense.", reasoning_content="pense."),
    delta(content="Four."),
    ending(outcome="complete", reasoning_language=FRENCH),
    usage(9, reasoning=6),
)


def chat(found: Endpoint, lines: str, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", "--url", found.url, *flags])


def test_an_address_is_taken_with_and_without_its_version() -> None:
    assert {base_url(url) for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/")} == {"http://h:1"}
    with pytest.raises(ValueError, match="is no address"):
        base_url("ftp://h")


def test_a_key_with_a_line_break_is_refused_unseen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a\nb")
    with pytest.raises(SystemExit):
        main(["ask", "x"])
    printed = capsys.readouterr().err
    assert "OPENAI_API_KEY holds characters" in printed
    assert "sk-a" not in printed


@pytest.mark.cluster
def test_ask_prints_both_parts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with endpoint(ANSWER) as found:
        assert main(["ask", "What?", "--url", found.url + "/v1/", "--language", "fr", "--system", "Be brief."]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "thinking:\nJe pense.\n\nanswer:\nFour.\n\n[complete; thinking in fr (followed); 9 tokens"
    )
    assert "\033" not in printed
    (body,) = found.bodies
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    assert body["reasoning_language"] == "fr"
    assert found.headers[0]["Authorization"] == "Bearer sk-secret"


@pytest.mark.cluster
def test_ask_takes_other_servers_streams(capsys: pytest.CaptureFixture[str]) -> None:
    with endpoint(streams(delta(reasoning_content="Hm."), delta(content="Yes.", tool_calls=None), ending())) as found:
        assert main(["ask", "x", "--url", found.url]) == 0
    assert capsys.readouterr().out == "thinking:\nHm.\n\nanswer:\nYes.\n\n[stop]\n"


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("handler", "sentence"),
    [
        (refuses(401, "no such key"), "answered 401: no such key; set OPENAI_API_KEY"),
        (streams(delta(content="x"), {"error": {"message": "the engine failed"}}), "the engine failed"),
        (streams("data: {\n\n"), "an event that is not JSON"),
    ],
)
def test_ask_ends_in_one_sentence(handler: object, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with endpoint(handler) as found:  # type: ignore[arg-type]
        assert main(["ask", "x", "--url", found.url]) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.cluster
def test_chat_keeps_what_was_said_and_not_what_was_thought(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    saved = tmp_path / "talk.jsonl"
    lines = f"/language fr\n/effort high\nOne?\nTwo?\n/save {saved}\n/reset\nThree?\n/quit\nFour?\n"
    with endpoint(ANSWER) as found:
        assert chat(found, lines, monkeypatch, "--system", "Be brief.") == 0
    system, four = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Four."}
    one, two, three = ({"role": "user", "content": text} for text in ("One?", "Two?", "Three?"))
    assert [body["messages"] for body in found.bodies] == [[system, one], [system, one, four, two], [system, three]]
    assert {(body["reasoning_language"], body["reasoning_effort"]) for body in found.bodies} == {("fr", "high")}
    record = json.loads(saved.read_text())
    thought = four | {"thinking": "Je pense."}
    assert record == {
        "messages": [system, one, thought, two, thought],
        "reasoning_language": "fr",
        "reasoning_effort": "high",
    }
    assert "\033" not in capsys.readouterr().out


@pytest.mark.cluster
def test_chat_forgets_a_turn_that_failed_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.write_text("kept")

    async def second_fails(request: web.Request) -> web.StreamResponse:
        return await (refuses(503, "the engine has died") if len(found.bodies) == 2 else ANSWER)(request)

    lines = f"One?\nTwo?\nThree?\n/effort enormous\n/fly\n/save {there}\n/help\n"
    with endpoint(second_fails) as found:
        assert chat(found, lines, monkeypatch) == 1
    contents = [[turn["content"] for turn in body["messages"]] for body in found.bodies]
    assert contents == [["One?"], ["One?", "Four.", "Two?"], ["One?", "Four.", "Three?"]]
    printed = capsys.readouterr()
    for sentence in ("503: the engine has died", "low, medium, high", "/fly is no command", "is there already"):
        assert sentence in printed.err
    assert "/language LANGUAGE" in printed.out
    assert there.read_text() == "kept"


@pytest.mark.cluster
def test_ctrl_c_stops_the_answer_and_a_second_one_leaves() -> None:
    """On a terminal of its own. What came of the stopped answer stays in the conversation."""
    slow = streams(delta(content="begun"), *[delta(content=".")] * 600, ending(), pause=0.1)

    async def first_is_slow(request: web.Request) -> web.StreamResponse:
        return await (slow if len(found.bodies) == 1 else ANSWER)(request)

    with endpoint(first_is_slow) as found:
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "serving", "chat", "--url", found.url]
        run = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        seen = b""

        def wait_for(text: bytes) -> None:
            nonlocal seen
            end = time.monotonic() + 60
            while text not in seen:
                assert time.monotonic() < end, seen
                seen += os.read(ours, 4096)
            seen = seen[seen.index(text) + len(text) :]

        try:
            wait_for(b"> ")
            os.write(ours, b"One?\n")
            wait_for(b"begun")
            run.send_signal(signal.SIGINT)
            wait_for(b"[stopped]")
            wait_for(b"> ")
            os.write(ours, b"Two?\n")
            wait_for(b"\033[2;36m")
            wait_for(b"followed")
            wait_for(b"> ")
            # Python notices a signal only once it waits for a key, shortly after the prompt is there.
            for _ in range(12):
                time.sleep(1)
                run.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    run.wait(5)
                    break
            assert run.returncode == 0
        finally:
            run.kill()
            run.wait()
            os.close(ours)
    said = [turn["content"] for turn in found.bodies[1]["messages"]]
    assert said[0] == "One?"
    assert said[1].startswith("begun")
    assert said[2] == "Two?"
