"""The playground in a real browser, over a scripted engine: what a reader sees, hears and can do."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from cluster.harmony import CALL, CHANNEL, CONSTRAIN, MESSAGE, START
from serving.engines.scripted import ScriptedEngine
from serving.keys import ApiKey, KeyFile, hash_of, new_key
from tests.serving.harness import CODEC, answer, channel, events, joined, spell
from tests.serving.playground_browser import CONTRAST, chromium, opened, served, wait_until

pytestmark = pytest.mark.cluster

THINKING = "The question is simple, I think that two plus two is four."
ARABIC = answer(
    "السؤال بسيط جدا، وأظن أن مجموع اثنين واثنين هو أربعة.", "Python يحسب المجموع أيضا، والجواب هو أربعة.\nprint(2 + 2)"
)
LAST = ".turn:last-child"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


def ask(page: Page, question: str = "What is two plus two?", language: str = "") -> None:
    """Ask, and wait for the end."""
    page.fill("#language", language)
    page.fill("#question", question)
    page.click("#send")
    expect(page.locator(f"{LAST}:not(.running)")).to_be_visible()


def text_of(page: Page, part: str) -> str:
    return page.locator(f"{LAST} [data-part={part}]").inner_text()


def badges(page: Page) -> list[str]:
    return page.locator(f"{LAST} .badges li").all_inner_texts()


def prompts(engine: ScriptedEngine) -> list[str]:
    return ["".join(CODEC.token_bytes(token).decode("utf-8", "replace") for token in prompt)
            for prompt, _ in engine.requests]  # fmt: skip


def test_thinking_and_answer_stream_into_their_places_and_nothing_moves(browser: Browser) -> None:
    faults: list[str] = []
    engine = ScriptedEngine([answer(THINKING, "Four ✓\n\nIndeed.")], pause=0.005)
    with served(engine) as url, opened(browser, url, faults) as page:
        page.evaluate("""() => {
            window.shifted = 0;
            const add = (list) => list.getEntries().forEach((entry) => { window.shifted += entry.value; });
            new PerformanceObserver(add).observe({ type: "layout-shift" });
        }""")
        ask(page, language="French")
        assert text_of(page, "reasoning") == THINKING
        assert page.locator(f"{LAST} [data-part=content] p").all_inner_texts() == ["Four ✓", "", "Indeed."]
        assert page.locator(f"{LAST} h2").inner_text() == "What is two plus two?"
        complete, verdict = badges(page)[:2]
        assert complete == "complete"
        assert re.fullmatch(r"thought in English, asked for French \(\d+ % sure\)", verdict)
        figures = page.locator(f"{LAST} .figures").inner_text()
        pattern = r"\d+ tokens, \d+ of them thinking · [\d.]+ tokens/s · first token after [\d.]+ s · [\d.]+ s in all"
        assert re.fullmatch(pattern, figures)
        for part in ("commentary", "calls", "unparsed"):
            expect(page.locator(f"{LAST} [data-part={part}]")).to_be_hidden()
        assert page.locator(f"{LAST} [aria-live=polite]").get_attribute("data-part") == "content"
        assert page.evaluate("window.shifted") < 0.01
    assert faults == []


def test_commentary_calls_and_text_outside_any_channel_have_places_of_their_own(browser: Browser) -> None:
    completion = [
        *channel("commentary", "I look it up."),
        *spell(START, "assistant"),
        *channel("musings", "an aside"),
        *spell(START, "assistant to=functions.get_weather", CHANNEL, "commentary ", CONSTRAIN, "json", MESSAGE),
        *spell('{"city":"Tōkyō"}', CALL),
    ]
    with served(ScriptedEngine([completion])) as url, opened(browser, url) as page:
        ask(page)
        assert text_of(page, "commentary") == "I look it up."
        assert text_of(page, "calls").split() == ["get_weather", '{"city":"Tōkyō"}']
        assert "an aside" in text_of(page, "unparsed")
        assert badges(page)[0] == "unknown channel"
        assert "left out of what is sent next" in badges(page)


def test_arabic_runs_from_right_to_left_and_code_within_it_does_not(browser: Browser) -> None:
    with served(ScriptedEngine([ARABIC])) as url, opened(browser, url) as page:
        ask(page, "كم مجموع اثنين واثنين؟", "العربية")
        directions = "nodes => nodes.map(node => getComputedStyle(node).direction)"
        assert page.locator(f"{LAST} [data-part=reasoning] p").evaluate_all(directions) == ["rtl"]
        # The first line begins with a Latin word and is Arabic, the second has no Arabic letter.
        assert page.locator(f"{LAST} [data-part=content] p").evaluate_all(directions) == ["rtl", "ltr"]
        assert page.locator(f"{LAST} h2").evaluate_all(directions) == ["rtl"]
        for part in ("reasoning", "content"):
            assert page.locator(f"{LAST} [data-part={part}]").get_attribute("lang") == "ar"
        assert badges(page)[1].startswith("thought in Arabic, as asked")


def test_stop_ends_the_generation_on_the_server(browser: Browser) -> None:
    engine = ScriptedEngine([answer(THINKING, "two " * 900), answer(THINKING, "Four")], pause=0.02)
    with served(engine) as url, opened(browser, url) as page:
        expect(page.locator("#stop")).to_be_disabled()
        page.fill("#question", "What?")
        page.click("#send")
        expect(page.locator(f"{LAST} [data-part=content]")).to_contain_text("two two")
        expect(page.locator("#send")).to_be_disabled()
        page.click("#stop")
        wait_until(lambda: engine.cancelled == 1 and engine.stats().running == 0)
        expect(page.locator(f"{LAST}:not(.running)")).to_be_visible()
        assert badges(page) == ["stopped"]
        assert text_of(page, "content").startswith("two two")
        # What was said until then is kept, and the next question can be asked.
        ask(page, "And now?")
        assert text_of(page, "content") == "Four"


@pytest.mark.parametrize("text", ["<img src=x onerror=alert(1)>", "<script>alert(1)</script>&amp;<b>bold</b>"])
def test_markup_stays_text(browser: Browser, text: str) -> None:
    faults: list[str] = []
    with served(ScriptedEngine([answer(text, text)])) as url, opened(browser, url, faults) as page:
        page.on("dialog", lambda _: faults.append("a dialog opened"))
        ask(page, text)
        for place in ("h2", "[data-part=reasoning]", "[data-part=content]"):
            assert page.locator(f"{LAST} {place}").inner_text() == text
        assert page.locator(".turn :is(img, script, b)").count() == 0
    assert faults == []


def test_the_page_cannot_load_from_elsewhere_even_if_it_tried(browser: Browser) -> None:
    faults: list[str] = []
    with served(ScriptedEngine([])) as url, opened(browser, url, faults) as page:
        page.evaluate("""() => {
            const image = document.createElement("img");
            image.src = "/health";
            document.body.append(image);
        }""")
        wait_until(
            lambda: page.evaluate("1") == 1 and any("img-src" in fault or "default-src" in fault for fault in faults)
        )


def test_an_error_is_shown_as_its_sentence_and_the_question_is_kept(browser: Browser) -> None:
    engine = ScriptedEngine([answer(THINKING, "Four")])
    with served(engine) as url, opened(browser, url) as page:
        ask(page, language="Frensh")
        sentence = page.locator(f"{LAST} .error").inner_text()
        assert sentence.startswith(
            "reasoning_language: reasoning language 'Frensh' is unknown; did you mean fr (French)?"
        )
        assert page.locator(f"{LAST} .error").get_attribute("role") == "alert"
        assert badges(page) == ["failed", "left out of what is sent next"]
        assert page.input_value("#question") == "What is two plus two?"
        ask(page, language="fr")
        expect(page.locator(f"{LAST} .error")).to_be_hidden()
    # The turn that failed is on the page and not in the prompt.
    assert prompts(engine)[0].count("What is two plus two?") == 1


def test_an_error_within_the_stream_leaves_what_came_before_it(browser: Browser) -> None:
    engine = ScriptedEngine([answer(THINKING, "Four")], fail_after=12)
    with served(engine) as url, opened(browser, url) as page:
        ask(page)
        assert page.locator(f"{LAST} .error").inner_text() == "the engine failed: the scripted engine is dead"
        assert text_of(page, "reasoning")
        assert THINKING.startswith(text_of(page, "reasoning"))


@pytest.mark.parametrize(
    ("stream", "sentence"),
    [
        ('data: {"choices":[{"delta":{"content":"Half"}}]}\n\n', "The connection ended before the answer did."),
        ('data: {"choices":[{"delta":{"content":"Half"}}]}\n\ndata: {"error":{"message":"lost"}}\n\n', "lost"),
    ],
)
def test_a_stream_that_breaks_off_says_so_and_keeps_what_came(browser: Browser, stream: str, sentence: str) -> None:
    with served(ScriptedEngine([])) as url, opened(browser, url) as page:
        page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
        ask(page)
        assert page.locator(f"{LAST} .error").inner_text() == sentence
        assert text_of(page, "content") == "Half"


@pytest.mark.parametrize("language", [None, {}, {"detected": "en", "verdict": "novel"}])
def test_fields_that_are_missing_or_new_do_no_harm(browser: Browser, language: dict[str, str] | None) -> None:
    ending = {"delta": {}, "finish_reason": "stop"} | ({} if language is None else {"reasoning_language": language})
    chunks = [
        {"choices": [{"delta": {"reasoning": "Hm.", "novel": [1]}}], "novel": {}},
        {"choices": [{"delta": {"content": "Four"}}]},
        {"choices": [ending]},
        {"usage": {"completion_tokens": 9}},
    ]
    stream = "".join(f": a comment\r\ndata: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks) + "data: [DONE]\r\n\r\n"
    faults: list[str] = []
    with served(ScriptedEngine([])) as url, opened(browser, url, faults) as page:
        page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
        ask(page)
        assert (text_of(page, "reasoning"), text_of(page, "content")) == ("Hm.", "Four")
        assert badges(page)[0] == "stop"
        assert page.locator(f"{LAST} .figures").inner_text().startswith("9 tokens · ")
        expect(page.locator(f"{LAST} .error")).to_be_hidden()
        expect(page.locator("#send")).to_be_enabled()
    assert faults == []


def test_the_browser_refuses_to_make_markup_of_text(browser: Browser) -> None:
    with served(ScriptedEngine([])) as url, opened(browser, url) as page:
        tried = """() => {
            try { document.querySelector("h1").innerHTML = "<b>bold</b>"; } catch (error) { return error.name; }
        }"""
        assert page.evaluate(tried) == "TypeError"
        assert page.locator("h1").inner_text() == "Raysoner"


def test_a_long_question_leaves_room_for_what_came_of_it(browser: Browser) -> None:
    with served(ScriptedEngine([])) as url, opened(browser, url) as page:
        ask(page, "two " * 5000)
        expect(page.locator(f"{LAST} .error")).to_contain_text("the prompt takes")
        box = page.locator(f"{LAST} h2").bounding_box()
        assert box is not None
        assert box["height"] < 250


def test_a_key_with_a_character_that_cannot_be_sent_is_told_apart_from_a_lost_server(browser: Browser) -> None:
    with served(ScriptedEngine([])) as url, opened(browser, url) as page:
        page.click("#key-fold summary")
        page.fill("#key", "rs-“quoted”")
        page.press("#key", "Tab")
        expect(page.locator("#notice")).to_contain_text("The API key holds a character")


def test_the_keyboard_is_enough(browser: Browser) -> None:
    engine = ScriptedEngine([answer(THINKING, "two " * 900), answer(THINKING, "Four")], pause=0.01)
    with served(engine) as url, opened(browser, url) as page:
        reached = {}
        for _ in range(20):
            page.keyboard.press("Tab")
            ring = "() => [document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]"
            name, outline = page.evaluate(ring)
            reached[name] = outline
            if name == "question":
                break
        assert set(reached) >= {"new", "model", "language", "effort", "temperature", "maximum-tokens", "question"}
        assert set(reached.values()) <= {"solid", "auto"}
        page.keyboard.type("One")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        assert page.input_value("#question") == "One\ntwo"
        # An input method's Enter chooses a word and sends nothing.
        page.dispatch_event("#question", "keydown", {"key": "Enter", "isComposing": True, "bubbles": True})
        assert page.locator(".turn").count() == 0
        page.keyboard.press("Enter")
        expect(page.locator(f"{LAST} [data-part=content]")).to_contain_text("two two")
        assert page.evaluate("document.activeElement.id") == "question"
        page.keyboard.press("Escape")
        wait_until(lambda: engine.cancelled == 1)
        expect(page.locator(f"{LAST}:not(.running)")).to_be_visible()
        page.keyboard.type("Again")
        page.keyboard.press("Enter")
        expect(page.locator(f"{LAST} [data-part=content]")).to_have_text("Four")


def test_turns_are_sent_on_without_their_thinking_until_a_new_conversation(browser: Browser) -> None:
    completions = [answer(THINKING, "Four"), answer("Hm.", "Eight"), answer("Hm.", "Nine")]
    engine = ScriptedEngine(completions)
    with served(engine) as url, opened(browser, url) as page:
        page.click("#system-fold summary")
        page.fill("#system", "Be brief.")
        ask(page, "First?")
        ask(page, "Second?")
        assert page.locator(".turn").count() == 2
        assert THINKING in page.locator(".turn").first.inner_text()
        page.click("#new")
        assert page.locator(".turn").count() == 0
        ask(page, "Third?")
    first, second, third = prompts(engine)
    assert "Be brief." in first
    assert all(piece in second for piece in ("Be brief.", "First?", "Four", "Second?"))
    assert THINKING not in second
    assert "First?" not in third


def test_the_settings_are_what_the_engine_gets_and_the_curl_command_says_the_same(browser: Browser) -> None:
    engine = ScriptedEngine([answer(THINKING, "Four")] * 2)
    with served(engine) as url, opened(browser, url) as page:
        page.select_option("#effort", "high")
        page.fill("#temperature", "0.5")
        page.fill("#maximum-tokens", "123")
        ask(page, "Isn't it $HOME?", "ja")
        page.click(f"{LAST} .as-curl")
        command = shlex.split(page.locator(f"{LAST} .curl").inner_text().replace("\\\n", " "))
        assert command[:3] == ["curl", "-N", f"{url}/v1/chat/completions"]
        body = json.loads(command[command.index("-d") + 1])
        assert body["messages"] == [{"role": "user", "content": "Isn't it $HOME?"}]
        again = httpx.post(command[2], json=body, timeout=30)
        assert joined(events(again.text), "content") == "Four"
    (prompt, sampling), repeated = engine.requests
    assert (sampling.temperature, sampling.maximum_tokens) == (0.5, 123)
    assert "Reasoning: high" in prompts(engine)[0]
    assert "Japanese" in prompts(engine)[0]
    assert repeated == (prompt, sampling)


def test_a_key_is_asked_for_sent_and_kept_nowhere(browser: Browser, tmp_path: Path) -> None:
    key = new_key()
    entry = ApiKey.model_validate({"name": "ann", "sha256": hash_of(key), "created": "2026-01-01T00:00:00Z"})
    KeyFile(keys=(entry,)).write(tmp_path / "keys.json")
    engine = ScriptedEngine([answer(THINKING, "Four")])
    security = {"keys": str(tmp_path / "keys.json")}
    with served(engine, security=security) as url, opened(browser, url) as page:
        expect(page.locator("#notice")).to_contain_text("key")
        page.fill("#key", key)
        page.press("#key", "Tab")
        expect(page.locator("#notice")).to_be_hidden()
        ask(page)
        assert text_of(page, "content") == "Four"
        page.click(f"{LAST} .as-curl")
        assert key not in page.content()
        assert "$OPENAI_API_KEY" in page.locator(f"{LAST} .curl").inner_text()
        kept = "() => localStorage.length + sessionStorage.length + document.cookie.length"
        assert page.evaluate(kept) == 0


def test_on_a_phone_the_panes_stand_below_each_other_and_nothing_is_wider_than_the_screen(browser: Browser) -> None:
    completion = answer(THINKING, "f" * 400)
    with (
        served(ScriptedEngine([completion])) as url,
        opened(browser, url, viewport={"width": 360, "height": 740}, reduced_motion="reduce") as page,
    ):
        ask(page)
        thinking, final = (page.locator(f"{LAST} .{pane}").bounding_box() for pane in ("thinking", "answer"))
        assert thinking is not None
        assert final is not None
        assert thinking["y"] + thinking["height"] <= final["y"]
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.set_viewport_size({"width": 1280, "height": 740})
        thinking, final = (page.locator(f"{LAST} .{pane}").bounding_box() for pane in ("thinking", "answer"))
        assert thinking is not None
        assert final is not None
        assert thinking["y"] == final["y"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_on_the_page_has_the_contrast_that_wcag_aa_asks_for(
    browser: Browser, scheme: Literal["light", "dark"]
) -> None:
    completion = [*spell("an aside"), *answer(THINKING, "Four")]
    engine = ScriptedEngine([answer(THINKING, "Four")] * 2 + [completion])
    with served(engine) as url, opened(browser, url, color_scheme=scheme) as page:
        for summary in page.locator("summary").all():
            summary.click()
        for language in ("English", "French", "", "Frensh"):
            ask(page, language=language)
        page.locator(".as-curl").first.click()
        measured = page.evaluate(CONTRAST)
        assert len(measured) > 60
        assert [(name, ratio) for name, ratio in measured if ratio < 4.5] == []
        bright = "() => getComputedStyle(document.body).backgroundColor"
        assert (page.evaluate(bright) == "rgb(247, 246, 243)") == (scheme == "light")
