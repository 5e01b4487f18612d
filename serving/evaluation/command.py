"""python -m serving evaluate: flags, the runs, and their report."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from cluster.config import ConfigError
from cluster.harmony import Effort as ThinkingEffort
from cluster.languages import find_language
from cluster.tables import positive, positive_number
from serving.evaluation import page
from serving.evaluation.answers import Answer, Journal, JournalHead, Sampling, askings
from serving.evaluation.card import add_to_card, read_card
from serving.evaluation.comparison import compare
from serving.evaluation.figures import target_figures
from serving.evaluation.report import Report, SuiteReport, TargetReport, markdown, notes, show
from serving.evaluation.runner import Effort, Run, run
from serving.evaluation.scoring import Scored, candidates_of, require_scorers, score
from serving.evaluation.suites import Suite, open_suite
from serving.evaluation.targets import AskedBy, Target, TargetName, opened, target_names

EFFORTS: tuple[ThinkingEffort, ...] = get_args(ThinkingEffort)
CONCURRENCY = 16
"""answers under way at a time at an endpoint that says nothing of how many it takes"""
DESCRIPTION = """Asks one or more targets the questions of a suite, and reports by language whether they think and
answer in the language asked for, are right, and keep to their channels. A target is the address of an OpenAI-compatible
endpoint, or a checkpoint folder, whose engine is then loaded here; NAME=WHERE names it, URL#MODEL chooses a model. The
first is what the others are compared with. The same command again asks only for what is missing. Settings of a
checkpoint's engine are those of `serving deploy`: --config FILE and dotted flags. Exit status: 0 when every answer is
there, 1 when some are missing, or with --fail-on-regression when something got worse."""


def parser() -> argparse.ArgumentParser:
    """The flags of the verb."""
    found = argparse.ArgumentParser(prog="python -m serving evaluate", description=DESCRIPTION, allow_abbrev=False)
    add = found.add_argument
    add("--target", action="append", required=True, metavar="[NAME=]WHERE", help="endpoint or checkpoint; repeatable")
    add("--suite", required=True, help="demo, attacks, multilingual-gsm-symbolic, mgsm, a hub id, or a JSONL file")
    add("--languages", type=_languages, metavar="TAGS", help="languages of the thinking to ask in, such as fr,ja")
    add("--limit", type=positive, metavar="N", help="questions of each language and task, the first")
    add("--samples", type=positive, default=1, metavar="N", help="answers to each question (default: 1)")
    add("--effort", action="append", choices=EFFORTS, help="reasoning effort; given twice, each is asked")
    add("--temperature", type=float, help="default: 0, the most likely tokens, and 1 with --samples above 1")
    add("--top-p", type=float, help="share of the probability that tokens are drawn from; the endpoint's if not given")
    add("--maximum-tokens", type=positive, metavar="N", help="of thinking and answer; the endpoint's if not given")
    add("--seed", type=int, default=0, help="each answer draws with one that follows from it (default: 0)")
    add(
        "--ask-by",
        choices=get_args(AskedBy),
        help="how the language is asked for: in the field reasoning_language, by an instruction in a system message, "
        "or not (default: the field where the endpoint is Raysoner's)",
    )
    add(
        "--concurrency",
        type=positive,
        metavar="N",
        help=f"answers under way at a time (default: {CONCURRENCY}, of a checkpoint twice what its engine batches)",
    )
    add("--retries", type=_retries, default=6, metavar="N", help="further tries after a failure (default: 6)")
    add("--timeout", type=positive_number, default=300.0, metavar="S", help="of one try, in seconds (default: 300)")
    add(
        "--detect-among",
        choices=("suite", "catalogue"),
        default="suite",
        help="languages told apart: the suite's and the measured nine, or all 52 (default: suite)",
    )
    add("--out", type=Path, metavar="FOLDER", help="of journals and reports (default: runs/evaluate-SUITE)")
    add(
        "--card",
        action="store_true",
        help="put the figures into the model card of each checkpoint but the first target",
    )
    add("--json", action="store_true", help="print the report as JSON instead of tables")
    add("--quiet", action="store_true", help="no line of progress")
    add("--fail-on-regression", action="store_true", help="exit status 1 when a target is worse than the first")
    add("--config", action="append", default=[], metavar="FILE", help="settings of checkpoints' engines; repeatable")
    return found


def main(arguments: Sequence[str]) -> int:
    """Runs the verb; returns its exit status.

    Raises:
        ConfigError: a flag, a target or the suite is no good.
    """
    flags, settings = parser().parse_known_args(list(arguments))
    targets = target_names(flags.target)
    settings = [*(word for path in flags.config for word in ("--config", path)), *settings]
    if settings and all(target.is_endpoint for target in targets):
        raise ConfigError(f"{settings[0]} configures a checkpoint's engine, and no target is a checkpoint")
    checkpoints = [target for target in targets[1:] or targets if not target.is_endpoint]
    if flags.card and not checkpoints:
        raise ConfigError("--card: no target is a checkpoint whose model card could hold figures")
    if flags.card:
        for target in checkpoints:
            read_card(Path(target.where))
    sampling = _sampling(flags)
    suite = open_suite(flags.suite, languages=flags.languages, limit=flags.limit)
    require_scorers(suite.items)
    folder = flags.out or Path("runs") / f"evaluate-{suite.name.replace('/', '-')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: no folder can be made there ({error.strerror})") from None
    work = _Evaluation(flags, suite, sampling, folder, settings)
    status = 0
    try:
        for target in targets:
            asyncio.run(work.ask(target))
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the answers that are missing", file=sys.stderr)
        status = 130
    found = work.report(_command(arguments))
    work.write(found)
    if flags.card:
        for target in checkpoints:
            add_to_card(Path(target.where), found)
    if flags.json:
        print(found.model_dump_json(indent=2))
    else:
        show(found, Console(width=None if sys.stdout.isatty() else 160))
        print(f"{folder}/report.html, report.md, report.json, and a journal and scores of each target")
    worse = flags.fail_on_regression and any(each.regressions for each in found.comparisons)
    return status or int(worse or not found.complete)


class _Evaluation:
    """Targets asked one after the other, and what came of them."""

    def __init__(
        self, flags: argparse.Namespace, suite: Suite, sampling: Sampling, folder: Path, settings: Sequence[str]
    ) -> None:
        self.flags = flags
        self.suite = suite
        self.sampling = sampling
        self.folder = folder
        self.settings = settings
        self.wanted = askings(suite, sampling)
        self._asked: list[tuple[Target, Run, dict[str, Answer]]] = []
        self._scored: dict[str, list[Scored]] = {}

    async def ask(self, name: TargetName) -> None:
        """Ask one target what its journal lacks."""
        flags = self.flags
        async with opened(name, asked_by=flags.ask_by, timeout_seconds=flags.timeout, settings=self.settings) as target:
            head = JournalHead(
                target=target.where,
                model=target.model,
                suite=self.suite.name,
                sha256=self.suite.sha256,
                asked_by=target.asked_by,
                sampling=self.sampling,
                content=target.content,
            )
            journal = Journal(self.folder / f"answers-{target.name}.jsonl", head)
            if journal.set_aside:
                print(
                    f"{journal.path} was not begun with the model that is in {target.where} now: its answers are kept "
                    f"as {journal.set_aside.name}, and all questions are asked anew",
                    file=sys.stderr,
                )
            found = Run(len(self.wanted))
            self._asked.append((target, found, journal.answers))
            concurrency = flags.concurrency or target.concurrency or CONCURRENCY
            effort = Effort(
                concurrency=concurrency,
                retries=flags.retries,
                patience=max(4, concurrency),
                timeout_seconds=flags.timeout,
            )
            try:
                await run(target, self.wanted, self.sampling, journal, effort, found=found, quiet=flags.quiet)
            finally:
                journal.close()

    def report(self, command: str) -> Report:
        """Everything found, of complete runs and of others."""
        suite = SuiteReport(
            name=self.suite.name,
            sha256=self.suite.sha256,
            items=len(self.suite.items),
            languages=list(self.suite.languages),
            validated=self.suite.validated,
        )
        among = candidates_of(self.suite) if self.flags.detect_among == "suite" else None
        targets = []
        for target, found, answers in self._asked:
            self._scored[target.name] = score(self.wanted, answers, among)
            targets.append(_target_report(target, found, self._scored[target.name]))
        first, *others = self._scored.items() if self._scored else [("", [])]
        return Report(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=command,
            suite=suite,
            sampling=self.sampling,
            targets=targets,
            comparisons=[compare(*first, *other) for other in others],
            notes=notes(suite, targets),
        )

    def write(self, found: Report) -> None:
        """The report as JSON and as a page, and each target's scores.

        Raises:
            ConfigError: a file cannot be written.
        """
        files = {
            "report.json": found.model_dump_json(indent=2) + "\n",
            "report.html": page.render(found, self._scored),
            "report.md": markdown(found),
        }
        for name, scored in self._scored.items():
            lines = (json.dumps(one.record(), ensure_ascii=False) + "\n" for one in scored)
            files[f"scores-{name}.jsonl"] = "".join(lines)
        try:
            for name, text in files.items():
                (self.folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ConfigError(f"--out {self.folder}: the report cannot be written ({error.strerror})") from None


def _target_report(target: Target, found: Run, scored: Sequence[Scored]) -> TargetReport:
    asked = found.answered - found.answered_before
    return TargetReport(
        name=target.name,
        where=target.where,
        model=target.model,
        asked_by=target.asked_by,
        wanted=found.wanted,
        answered=found.answered,
        failures=dict(found.failures),
        gave_up=found.gave_up,
        answers_per_second=asked / found.seconds if asked and found.seconds else None,
        tokens_per_second=found.tokens / found.seconds if found.tokens and found.seconds else None,
        figures=target_figures(scored),
    )


def _sampling(flags: argparse.Namespace) -> Sampling:
    """Raises ConfigError for what every request would be refused for."""
    temperature = flags.temperature if flags.temperature is not None else float(flags.samples > 1)
    if not 0 <= temperature <= 2:
        raise ConfigError(f"--temperature must be between 0 and 2, got {temperature:g}")
    if flags.samples > 1 and temperature == 0:
        raise ConfigError(f"--samples {flags.samples} with --temperature 0 would draw the same answer every time")
    if flags.top_p is not None and not (math.isfinite(flags.top_p) and 0 < flags.top_p <= 1):
        raise ConfigError(f"--top-p must be above 0 and at most 1, got {flags.top_p:g}")
    return Sampling(
        samples=flags.samples,
        efforts=tuple(dict.fromkeys(flags.effort or ())),
        temperature=temperature,
        top_p=flags.top_p,
        maximum_tokens=flags.maximum_tokens,
        seed=flags.seed,
    )


def _command(arguments: Sequence[str]) -> str:
    """The command as it is kept: of a path on this machine the last part alone."""
    words = list(arguments)
    for place, word in enumerate(words):
        name, mark, where = word.rpartition("=")
        if Path(where).is_absolute():
            words[place] = f"{name}{mark}{Path(where).name}"
    return " ".join(["python -m serving evaluate", *words])


def _languages(text: str) -> list[str]:
    try:
        return list(dict.fromkeys(find_language(wish).tag for wish in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _retries(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"must be between 0 and 100, got {text}")
    return value
