"""Figures, comparisons and the page, of answers whose figures are known."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from serving.evaluation import page, report
from serving.evaluation.answers import Answer, Asking, Sampling
from serving.evaluation.comparison import compare
from serving.evaluation.figures import target_figures
from serving.evaluation.items import Item
from serving.evaluation.report import Report, SuiteReport, TargetReport
from serving.evaluation.scoring import Scored, score
from serving.evaluation.statistics import wilson
from serving.evaluation.suites import Suite
from tests.serving.evaluation.made import ANSWERS, THOUGHTS, answer, item, scored, suite
from tests.serving.playground_browser import chromium

SUMS = suite("en", "fr", "ar", each=12)


def always(_: Item) -> bool:
    return True


def english(_: Item) -> str:
    return "en"


def own(asked: Item) -> str:
    return asked.language


def number_of(asked: Item) -> int:
    return int(asked.id.rpartition("-")[2])


def made(asked: Suite, sides: dict[str, list[Scored]], answered: int | None = None) -> Report:
    about = SuiteReport(
        name=asked.name,
        sha256=asked.sha256,
        items=len(asked.items),
        languages=list(asked.languages),
        validated={"fr": False},
    )
    targets = [
        TargetReport(
            name=name,
            where="http://x",
            model="m",
            asked_by="field",
            wanted=len(asked.items),
            answered=len(ones) if answered is None else answered,
            failures={},
            gave_up="" if answered is None else "gone",
            answers_per_second=3.0,
            tokens_per_second=60.0,
            figures=target_figures(ones),
        )
        for name, ones in sides.items()
    ]
    first, *others = sides.items()
    return Report(
        created="2026-01-01T00:00:00+00:00",
        command="python -m serving evaluate --suite <sums>",
        suite=about,
        sampling=Sampling(),
        targets=targets,
        comparisons=[compare(*first, *other) for other in others],
        notes=report.notes(about, targets),
    )


# Figures


def test_figures_by_language() -> None:
    found = target_figures(scored(SUMS, lambda asked: number_of(asked) < 9, english))
    assert found is not None
    assert found.all.correct == wilson(27, 36)
    assert found.all.thinking.adherence == wilson(12, 36)
    assert found.outside_english is not None
    assert found.outside_english.thinking.adherence == wilson(0, 24)
    assert {tag: by.thinking.adherence.value for tag, by in found.by_language.items() if by.thinking.adherence} == {
        "en": 1.0, "fr": 0.0, "ar": 0.0}  # fmt: skip
    assert found.all.answer.adherence == wilson(36, 36)
    assert found.thinking_confusion == {tag: {"en": 12} for tag in ("en", "fr", "ar")}
    assert found.all.outcomes == {"complete": 36}
    assert found.all.wrong_for == {"another number": 9}
    assert found.all.thinking_tokens is not None
    assert found.all.thinking_tokens.value == 12
    assert found.all.pass_at == {}
    assert target_figures([]) is None


def test_a_scorers_errors_are_in_no_share() -> None:
    name = "tests.serving.evaluation.test_scorers:raising"
    broken = Suite("sums", tuple(each.model_copy(update={"scorer": name}) for each in SUMS.items[:2]))
    found = target_figures(scored(broken, always, english))
    assert found is not None
    assert found.all.correct is None
    assert found.all.scorer_errors == {"LookupError": 2}
    assert found.all.wrong_for == {}


def test_undetermined_thinking_does_not_follow_and_stands_apart() -> None:
    asking = Asking(item(language="fr", answer="4", prompt="2 + 2 ?"), None, 0)
    texts = ["", "2 + 2 = 4", THOUGHTS["fr"], THOUGHTS["en"]]
    wanted = [Asking(asking.item.model_copy(update={"id": str(place)}), None, 0) for place in range(4)]
    answers = {one.key: answer("4", one.key, thinking=text) for one, text in zip(wanted, texts, strict=True)}
    found = target_figures(score(wanted, answers))
    assert found is not None
    assert found.all.thinking.adherence == wilson(1, 4)
    assert found.all.thinking.undetermined == wilson(2, 4)
    assert found.all.thinking.detected == {"und": 2, "fr": 1, "en": 1}


def test_samples_give_pass_at_k_and_a_majority_by_effort() -> None:
    asked = item(answer="4")
    wanted = [Asking(asked, effort, sample) for effort in ("low", "high") for sample in range(4)]  # type: ignore[arg-type]
    given = iter(["4", "4", "5", "6", "5", "5", "5", "4"])
    answers = {one.key: answer(f"So {next(given)}", one.key, thinking=THOUGHTS["en"] * 2) for one in wanted}
    found = target_figures(score(wanted, answers))
    assert found is not None
    passes = {k: value.value for k, value in found.all.pass_at.items()}
    assert passes == {1: pytest.approx((2 / 4 + 1 / 4) / 2), 2: pytest.approx((5 / 6 + 1 / 2) / 2), 4: 1.0}
    assert found.all.majority is not None
    assert found.all.majority.value == 0.5
    assert {(length.effort, length.answers) for length in found.lengths} == {("low", 4), ("high", 4)}


# Comparisons


def test_a_regression_in_one_language_is_flagged_there() -> None:
    before = scored(SUMS, always, english)
    after = scored(SUMS, lambda asked: asked.language != "ar" or number_of(asked) < 2, own)
    found = compare("base", before, "tuned", after)
    flags = {(change.metric, change.group): change.flag for change in found.changes}
    assert flags["right", "ar"] == flags["right", "all"] == "regression"
    assert flags["right", "fr"] == ""
    assert flags["thinks as asked", "fr"] == flags["thinks as asked", "all"] == "improvement"
    assert flags["thinks as asked", "en"] == ""
    (change,) = [each for each in found.changes if (each.metric, each.group) == ("right", "ar")]
    assert (change.test, change.lost, change.won, change.items) == ("McNemar, exact", 10, 0, 12)
    assert change.p == pytest.approx(2 / 2**10)
    assert change.p_adjusted == pytest.approx(3 * change.p)
    assert {each.metric for each in found.regressions} == {"right"}


def test_equal_targets_and_targets_without_a_common_item() -> None:
    one = scored(SUMS, always, own)
    assert not any(change.flag for change in compare("a", one, "b", one).changes)
    assert compare("a", one, "b", []).changes == []
    half = compare("a", one, "b", one[:6])
    assert {change.items for change in half.changes if change.group == "all"} == {6}


# The report


def test_a_partial_report_says_so() -> None:
    ones = scored(SUMS, always, own)
    found = made(SUMS, {"base": ones[:30]}, answered=30)
    assert not found.complete
    assert found.notes[0].startswith("PARTIAL: base answered 30 of 36; it was given up (gone)")
    assert "PARTIAL: base answered 30 of 36" in page.render(found, {"base": ones[:30]})
    assert "Questions in French were not checked" in found.notes[1]
    nothing = made(SUMS, {"base": []}, answered=0)
    assert "Nothing was answered" in page.render(nothing, {"base": []})


def test_the_report_comes_back_from_json() -> None:
    found = made(SUMS, {"base": scored(SUMS, always, english), "tuned": scored(SUMS, always, own)})
    assert Report.model_validate_json(found.model_dump_json()) == found
    figures = json.loads(found.model_dump_json())["targets"][1]["figures"]["all"]["thinking"]["adherence"]
    assert (figures["value"], figures["count"]) == (1.0, 36)


def test_shares_as_a_markdown_table() -> None:
    found = made(SUMS, {"base": scored(SUMS, always, english), "tuned": scored(SUMS, always, own)})
    lines = report.markdown(found).splitlines()
    head, _, *rows = lines[lines.index(next(line for line in lines if line.startswith("|"))) :]
    assert head.count("|") == 7
    assert [row.split("|")[1].strip() for row in rows] == ["English", "French (not checked)", "Arabic", "all"]
    assert [cell.strip() for cell in rows[1].split("|")[2:5]] == ["12", "0.0% (0%–24%)", "100.0% (76%–100%)"]
    assert all(row.count("|") == 7 for row in rows)


class _Tags(HTMLParser):
    """Elements that are open at the end, and what would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[Any] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.loaded += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        self.scripts += tag == "script"
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Nothing stays open."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def rendered(hostile: str = "") -> str:
    def thought(asked: Item) -> str:
        return "fr" if asked.language != "fr" or number_of(asked) % 2 else "en"

    before, after = scored(SUMS, always, english), scored(SUMS, lambda asked: number_of(asked) > 1, thought)
    if hostile:
        last = after[-1]
        answers = {last.asking.key: Answer(key=last.asking.key, thinking=hostile, answer=hostile, unparsed=hostile)}
        after[-1] = score([last.asking], answers)[0]
    return page.render(
        made(SUMS, {"base": before, hostile or "tuned": after}), {"base": before, hostile or "tuned": after}
    )


def test_the_page_needs_nothing_beside_itself_and_shows_no_text_as_markup() -> None:
    tags = _Tags()
    text = rendered("</div><script>alert(1)</script><img src=x onerror=alert(1)>")
    tags.feed(text)
    assert (tags.open, tags.loaded, tags.scripts) == ([], [], 0)
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert "&lt;sums&gt;" in text


def test_examples_have_direction_language_and_marked_sentences() -> None:
    text = rendered()
    assert f'lang="ar" dir="rtl">{ANSWERS["ar"].format(1)}' in text
    assert re.search(r'<div class="channel analysis"><b>thinking</b><div class="text" lang="en" dir="ltr">', text)
    assert f'<mark title="English">{THOUGHTS["en"]}</mark>' in text
    assert f'<mark title="French">{THOUGHTS["fr"].replace(chr(39), "&#x27;")}</mark>' in text


@pytest.mark.cluster
def test_a_browser_shows_the_page_without_an_error_and_arabic_from_the_right() -> None:
    with chromium() as browser:
        shown = browser.new_page(viewport={"width": 1200, "height": 900})
        faults: list[str] = []
        shown.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        shown.on("request", lambda request: faults.append(request.url) if request.url.startswith("http") else None)
        shown.set_content(rendered())
        assert faults == []
        assert shown.locator(".confusion").count() == 4
        assert shown.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        sides = shown.evaluate(
            """() => [...document.querySelectorAll('.final .text:lang(ar)')].map(element => {
                const range = document.createRange();
                range.selectNodeContents(element);
                const text = range.getBoundingClientRect(), box = element.getBoundingClientRect();
                return [getComputedStyle(element).direction, box.right - text.right < text.left - box.left];
            })"""
        )
        assert sides
        assert all(side == ["rtl", True] for side in sides)
        shown.set_viewport_size({"width": 420, "height": 900})
        assert shown.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
