"""The load generator: what it sends, when, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from serving.__main__ import main
from serving.bench import page, report
from serving.bench.load import Plan, arrivals
from serving.bench.measurement import Exchange, distribution, over_time, percentile, summarise
from serving.bench.prompts import read_prompts, synthetic
from tests.serving.endpoints import Endpoint, delta, ending, endpoint, refuses, streams, usage
from tests.serving.test_cluster import free_port

PLAN = Plan(rate=50.0, concurrency=None, requests=1000, seconds=None, seed=3)
ANSWER = streams(delta(role="assistant", content=""), delta(reasoning="a"), delta(content="b"), ending(), usage(5))


def bench(found: Endpoint, tmp_path: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    status = main(["bench", "--url", found.url, "--json", str(tmp_path / "report.json"), *flags])
    return status, json.loads((tmp_path / "report.json").read_text())


def exchange(due: float, times: list[float], tokens: int | None = None) -> Exchange:
    found = Exchange(due, sent=due, completion_tokens=tokens)
    for now in times:
        found.receive(now)
    found.end = times[-1]
    return found


def test_arrivals_are_a_poisson_process_that_the_seed_decides() -> None:
    times = list(arrivals(PLAN))
    assert times == list(arrivals(PLAN))
    assert times != list(arrivals(replace(PLAN, seed=4)))
    assert len(times) == 1000
    gaps = [later - earlier for earlier, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.1)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance == pytest.approx(mean**2, rel=0.2), "of an exponential distribution"
    timed = list(arrivals(replace(PLAN, requests=None, seconds=2.0)))
    assert max(timed) < 2.0
    assert len(timed) == sum(time < 2.0 for time in times)


def test_percentiles_are_values_that_were_measured() -> None:
    ordered = [float(value) for value in range(1, 101)]
    assert [percentile(ordered, share) for share in (50, 90, 95, 99)] == [50.0, 90.0, 95.0, 99.0]
    assert percentile([7.0], 99) == 7.0
    assert distribution([]) is None
    figures = distribution([3.0, 1.0, 2.0])
    assert figures == (3, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0)


def test_latencies_count_from_when_a_request_was_due() -> None:
    late = exchange(1.0, [3.0, 3.5, 5.0], tokens=6)
    late.sent = 2.5
    figures = summarise([late]).latencies
    means = {name: found.mean for name, found in figures.items() if found}
    assert means == {
        "time_to_first_token": 2.0,
        "inter_token_latency": 2.0 / 5,
        "inter_chunk_latency": 1.0,
        "end_to_end_latency": 4.0,
        "send_delay": 1.5,
    }


def test_tokens_are_chunks_where_the_server_does_not_count() -> None:
    counted, uncounted = exchange(0.0, [1.0, 2.0], tokens=10), exchange(0.0, [1.0, 2.0])
    assert summarise([counted]).tokens_from == "usage"
    assert summarise([uncounted]).tokens_from == "chunks"
    both = summarise([counted, uncounted])
    assert (both.tokens_from, both.completion_tokens, both.tokens_per_second) == ("usage, else chunks", 12, 6.0)


def test_failures_are_counted_by_kind_and_keep_out_of_the_latencies() -> None:
    whole, cut = exchange(0.0, [1.0, 2.0], tokens=2), exchange(0.0, [1.0])
    cut.fail("stream cut", "it ended", 9.0)
    summary = summarise([whole, cut])
    assert (summary.succeeded, summary.failed, summary.errors) == (1, 1, {"stream cut": 1})
    assert summary.error_messages == {"stream cut": "it ended"}
    total = summary.latencies["end_to_end_latency"]
    assert total is not None
    assert total.max == 2.0


@pytest.mark.parametrize("seconds", [0.4, 3.0, 7.5, 200.0])
def test_stretches_of_time_hold_every_token(seconds: float) -> None:
    load = [exchange(0.0, [seconds * share / 40 for share in range(1, 41)], tokens=80), exchange(0.0, [0.1], tokens=3)]
    windows = over_time(load)
    assert len(windows) <= 60
    assert windows[-1].start + windows[-1].seconds == pytest.approx(seconds)
    assert sum(window.tokens_per_second * window.seconds for window in windows) == pytest.approx(83)


def test_a_page_stands_alone_and_takes_no_markup_from_a_server() -> None:
    failing = exchange(0.0, [0.5], tokens=2)
    failing.fail("http 500", "<script>alert(1)</script>", 4.0)
    load = [exchange(float(number), [number + 1.0, number + 2.0], tokens=4) for number in range(5)]
    html = page.render(report.make("http://h", "<m>", PLAN, "words", 8, [*load, failing], 0.2))
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert html.count("<svg viewBox") == 2 + 5
    assert "http://" not in html.replace("http://h", "")
    assert "Nothing was measured" in page.render(report.make("http://h", "m", PLAN, "words", 8, [], 0.0))


def test_synthetic_prompts_share_no_beginning() -> None:
    texts = {synthetic(40, 1, number)[0]["content"] for number in range(50)}
    assert len({text[:60] for text in texts}) == 50
    assert synthetic(40, 1, 7) == synthetic(40, 1, 7)
    assert all(len(text.split()) == 40 for text in texts)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    turn = {"role": "user", "content": "b"}
    path.write_text(f'{{"prompt": "a"}}\n\n{json.dumps({"messages": [turn]})}\n{json.dumps([turn])}\n')
    assert read_prompts(path) == [[{"role": "user", "content": "a"}], [turn], [turn]]
    path.write_text('{"prompt": "a"}\n{"messages": []}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: no conversation"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rate", "1", "--concurrency", "2"], "not allowed with"),
        (["--requests", "0"], "at least 1"),
        (["--rate", "-1"], "above 0"),
        (["--url", "localhost:8000"], "is no address of an endpoint"),
        (["--url", "http://user:secret@host"], "leave it out"),
        (["--prompts", "/nowhere.jsonl"], "/nowhere.jsonl: cannot be read"),
        (["--json", "/nowhere/report.json"], "its folder must exist"),
        (["--field", "ignore_eos=yes"], "is not JSON"),
    ],
)
def test_wrong_usage_is_told_before_any_request(
    flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *flags])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.cluster
def test_a_closed_loop_keeps_so_many_under_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    most = 0

    async def counting(request: web.Request) -> web.StreamResponse:
        nonlocal most
        most = max(most, found.open)
        return await streams(delta(content="x"), ending(), before=0.05)(request)

    with endpoint(counting) as found:
        status, made = bench(found, tmp_path, "--concurrency", "5", "--requests", "30", "--html", str(tmp_path / "h"))
    summary = made["summary"]
    assert (status, most, summary["succeeded"], summary["failed"]) == (0, 5, 30, 0)
    assert summary["tokens_from"] == "chunks"
    assert "chunks were counted" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "h").read_text()


@pytest.mark.cluster
def test_an_open_loop_charges_the_server_for_those_who_wait(tmp_path: Path) -> None:
    """The server answers one at a time. A load that waited for it would see 0.05 s for each."""
    turn = asyncio.Lock()

    async def one_at_a_time(request: web.Request) -> web.StreamResponse:
        async with turn:
            return await streams(delta(content="x"), ending(), usage(1), before=0.05)(request)

    with endpoint(one_at_a_time) as found:
        status, made = bench(found, tmp_path, "--rate", "500", "--requests", "20")
    latencies = made["summary"]["latencies"]
    assert status == 0
    assert latencies["end_to_end_latency"]["max"] > 20 * 0.05 - 20 / 500 * 3
    assert latencies["time_to_first_token"]["max"] > 20 * 0.05 - 20 / 500 * 3


@pytest.mark.cluster
def test_each_kind_of_failure_has_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(f"data: {json.dumps(delta(content='x'))}\n\n".encode())
        return response

    async def page(request: web.Request) -> web.StreamResponse:
        return web.Response(text="<html>", content_type="text/html")

    async def stuck(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        raise AssertionError

    answers = [
        ANSWER,
        refuses(429, "slow down"),
        streams(delta(content="x"), {"error": {"message": "the engine failed"}}),
        streams("data: {\n\n"),
        streams("data: [1]\n\n"),
        cut,
        page,
        stuck,
    ]

    async def in_turns(request: web.Request) -> web.StreamResponse:
        return await answers[len(found.bodies) - 1](request)

    with endpoint(in_turns) as found:
        flags = ["--concurrency", "1", "--requests", str(len(answers)), "--timeout", "3"]
        status, made = bench(found, tmp_path, *flags)
    assert status == 1
    assert made["summary"]["succeeded"] == 1
    assert made["summary"]["errors"] == {
        "malformed stream": 2,
        "http 429": 1,
        "error in stream": 1,
        "stream cut": 1,
        "no stream": 1,
        "timeout": 1,
    }
    assert "1 × http 429: slow down" in capsys.readouterr().out


@pytest.mark.cluster
def test_what_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    flags = ["--requests", "3", "--concurrency", "1", "--words", "3", "--max-tokens", "9"]
    with endpoint(ANSWER) as found:
        bench(found, tmp_path, *flags)
        bench(found, tmp_path, *flags, "--language", "fr", "--no-usage", "--field", "ignore_eos=true", "--warmup", "2")
    plain, *_, full = found.bodies
    assert len(found.bodies) == 3 + 2 + 3
    assert plain["messages"] == synthetic(3, 0, 0)
    assert {name: value for name, value in plain.items() if name != "messages"} == {
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 9,
    }
    assert (full["reasoning_language"], full["ignore_eos"], "stream_options" in full) == ("fr", True, False)
    assert {headers["Authorization"] for headers in found.headers} == {"Bearer sk-very-secret"}
    printed = capsys.readouterr()
    assert "secret" not in printed.out + printed.err + (tmp_path / "report.json").read_text()


@pytest.mark.cluster
def test_nobody_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["bench", "--url", url]) == 1
    assert f"{url} does not answer" in capsys.readouterr().err
    assert main(["bench", "--url", url, "--model", "m", "--requests", "2"]) == 1
    assert "2 × no connection" in capsys.readouterr().out


@pytest.mark.cluster
def test_ctrl_c_reports_what_there_is(tmp_path: Path) -> None:
    with endpoint(streams(delta(content="x"), ending(), usage(4), before=0.05)) as found:
        command = [sys.executable, "-m", "serving", "bench", "--url", found.url, "--concurrency", "2"]
        command += ["--seconds", "300", "--json", str(tmp_path / "report.json")]
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
        end = time.monotonic() + 60
        while len(found.bodies) < 10 and time.monotonic() < end:
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    made = json.loads((tmp_path / "report.json").read_text())
    assert run.returncode == 130, err
    assert made["summary"]["succeeded"] >= 6
    assert made["interrupted"] in (0, 1, 2)
    assert "Traceback" not in err
    assert "tokens/s" in out
