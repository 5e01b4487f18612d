"""The verb as a whole: against endpoints over HTTP, and over an engine in this process."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from cluster.artifacts import write_manifest
from serving.__main__ import main
from serving.engines.scripted import ScriptedEngine
from serving.evaluation import targets
from serving.evaluation.command import _command
from serving.evaluation.report import Report
from tests.serving.endpoints import endpoint, refuses
from tests.serving.evaluation.made import ANSWERS, THOUGHTS, completion, knowing, suite
from tests.serving.harness import CODEC, answer
from tests.serving.playground_browser import wait_until


def suite_file(folder: Path, *tags: str, each: int = 4) -> Path:
    path = folder / "sums.jsonl"
    lines = [one.model_dump_json(by_alias=True, exclude_none=True) for one in suite(*tags, each=each).items]
    path.write_text("\n".join(lines) + "\n")
    return path


def evaluate(*words: object) -> int:
    return main(["evaluate", "--quiet", *map(str, words)])


def report_of(folder: Path) -> Report:
    return Report.model_validate_json((folder / "report.json").read_text())


def thinks_english(tag: str) -> Any:
    """An endpoint that thinks in English, and is wrong in one language."""

    async def handler(request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.text())
        asked, _, rest = body["messages"][-1]["content"].partition(" ")
        value = int(rest.partition(":")[0]) + 1 + (asked == tag)
        return web.json_response(completion(ANSWERS[asked].format(value), THOUGHTS["en"]))

    return handler


@pytest.mark.cluster
def test_two_endpoints_are_asked_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = suite_file(tmp_path, "en", "fr", "ar", each=8), tmp_path / "out"
    with endpoint(knowing()) as good, endpoint(thinks_english("ar")) as worse:
        words = ("--target", f"one={good.url}", "--target", f"two={worse.url}", "--suite", file, "--out", out)
        assert evaluate(*words, "--ask-by", "field") == 0
        printed = capsys.readouterr().out
        assert evaluate(*words, "--ask-by", "field", "--fail-on-regression", "--json") == 1
    assert (len(good.bodies), len(worse.bodies)) == (24, 24)
    found = report_of(out)
    assert json.loads(capsys.readouterr().out) == json.loads((out / "report.json").read_text())
    regressions = {(each.metric, each.group) for each in found.comparisons[0].regressions}
    by_language = {("thinks as asked", group) for group in ("all", "fr", "ar")}
    assert regressions == {("right", "all"), ("right", "ar"), *by_language}
    assert "sums: 24 items, 3 languages" in printed
    assert "Arabic" in printed
    assert "regression" in printed
    scores = [json.loads(line) for line in (out / "scores-two.jsonl").read_text().splitlines()]
    assert len(scores) == 24
    assert {score["mark"] for score in scores if score["id"].startswith("ar")} == {"wrong"}
    assert "<h1>Evaluation: sums</h1>" in (out / "report.html").read_text()
    assert str(tmp_path) not in found.command


@pytest.mark.cluster
def test_a_partial_report_says_so_and_the_same_command_completes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = suite_file(tmp_path, "en", "fr"), tmp_path / "out"
    left = [None] * 5

    async def dying(request: web.Request) -> web.StreamResponse:
        if left:
            left.pop()
            answered: web.StreamResponse = await knowing()(request)
            return answered
        return await refuses(500, "out of memory")(request)

    words = ("--suite", file, "--out", out, "--retries", 0, "--concurrency", 1, "--ask-by", "field")
    with endpoint(dying) as found:
        target = ("--target", f"one={found.url}")
        assert evaluate(*target, *words) == 1
        printed = " ".join(capsys.readouterr().out.split())
        assert "PARTIAL: one answered 5 of 8" in printed
        assert not report_of(out).complete
        left += [None] * 3
        assert evaluate(*target, *words) == 0
    assert report_of(out).complete
    assert "PARTIAL" not in capsys.readouterr().out


@pytest.mark.cluster
def test_ctrl_c_leaves_a_partial_report_and_the_next_run_goes_on(tmp_path: Path) -> None:
    file, out = suite_file(tmp_path, "en", each=12), tmp_path / "out"
    slow = [True]

    async def then() -> None:
        await asyncio.sleep(0.3 if slow else 0)

    with endpoint(knowing(then=then)) as found:
        words = ["--target", f"one={found.url}", "--suite", str(file), "--out", str(out), "--ask-by", "field"]
        command = [sys.executable, "-m", "serving", "evaluate", *words, "--concurrency", "1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_until(lambda: len(found.bodies) > 3, seconds=120)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 130, printed
        assert "stopped; the same command goes on" in printed
        assert "PARTIAL" in printed
        asked = len(found.bodies)
        slow.clear()
        assert evaluate(*words) == 0
    assert asked < 12
    assert len(found.bodies) <= 12 + 1, "only what was under way was asked again"
    assert report_of(out).complete


def test_a_checkpoint_is_asked_over_an_engine_without_a_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = suite_file(tmp_path, "fr", each=3), tmp_path / "out"
    engine = ScriptedEngine([answer(THOUGHTS["fr"], "1"), answer(THOUGHTS["en"], "9"), answer(THOUGHTS["fr"], "3")])
    monkeypatch.setattr("serving.replica.load_checkpoint", lambda _: (engine, CODEC))
    words = (
        "--target",
        f"tuned={tmp_path}",
        "--suite",
        file,
        "--out",
        out,
        "--concurrency",
        1,
        "--maximum-tokens",
        300,
    )
    assert evaluate(*words, "--limits.prompt_tokens", 600) == 0
    (target,) = report_of(out).targets
    assert (target.asked_by, target.model, target.answered) == ("field", "tuned", 3)
    assert target.figures is not None
    assert target.figures.all.correct is not None
    assert target.figures.all.correct.value == pytest.approx(2 / 3)
    assert target.figures.thinking_confusion == {"fr": {"fr": 2, "en": 1}}
    assert target.figures.all.outcomes == {"complete": 3}
    prompts = [CODEC.tokenizer.decode(prompt) for prompt, _ in engine.requests]
    assert all("reasoning language: French" in prompt for prompt in prompts)
    assert len({sampling.seed for _, sampling in engine.requests}) == 3
    assert not engine.healthy(), "the engine is stopped in the end"


def test_another_model_in_the_same_folder_is_asked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out, folder = suite_file(tmp_path, "fr", each=2), tmp_path / "out", tmp_path / "merged"
    folder.mkdir()
    words = ("--target", f"tuned={folder}", "--suite", file, "--out", out, "--maximum-tokens", 300)
    asked = []
    for weights, answers in (("one", ("1", "2")), ("one", ()), ("two", ("8", "9"))):
        engine = ScriptedEngine([answer(THOUGHTS["fr"], text) for text in answers])
        monkeypatch.setattr("serving.replica.load_checkpoint", lambda _, engine=engine: (engine, CODEC))
        (folder / "model.safetensors").write_text(weights)
        write_manifest(folder, "checkpoint", "base", {})
        assert evaluate(*words, "--concurrency", 1, "--limits.prompt_tokens", 600) == 0
        figures = report_of(out).targets[0].figures
        assert figures is not None
        assert figures.all.correct is not None
        asked.append((len(engine.requests), figures.all.correct.value))
    assert asked == [(2, 1.0), (0, 1.0), (2, 0.0)]
    assert "its answers are kept as answers-tuned.1.jsonl, and all questions are asked anew" in capsys.readouterr().err


def test_a_card_that_takes_no_figures_is_told_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluate("--target", tmp_path, "--suite", suite_file(tmp_path, "en"), "--out", out, "--card") == 2
    assert "is no checkpoint that python -m training merge made" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--samples", "2", "--temperature", "0"], "would draw the same answer every time"),
        (["--temperature", "3"], "between 0 and 2"),
        (["--top-p", "0"], "above 0"),
        (["--engine.maximum_concurrent", "3"], "no target is a checkpoint"),
        (["--suite", "nowhere"], "no such file"),
    ],
)
def test_wrong_usage_is_one_sentence(
    tmp_path: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluate("--target", "http://127.0.0.1:9", "--suite", suite_file(tmp_path, "en"), "--out", out, *words) == 2
    assert sentence in capsys.readouterr().err
    assert not out.exists()


def test_a_checkpoints_settings_are_checked_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--target", tmp_path, "--suite", suite_file(tmp_path, "en"), "--out", tmp_path / "out")
    assert evaluate(*words, "--engine.maximum_concurent", 3) == 2
    assert "engine.maximum_concurrent" in capsys.readouterr().err
    assert targets.target_names([str(tmp_path)])[0].name == tmp_path.name.strip("-")


def test_a_command_is_kept_without_the_machines_folders() -> None:
    kept = _command(["--target", "a=/home/me/models/x", "--target", "http://h:1", "--out", "/tmp/y/z", "--limit", "3"])
    assert kept == "python -m serving evaluate --target a=x --target http://h:1 --out z --limit 3"
