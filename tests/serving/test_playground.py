"""The playground as a browser would be given it: headers, references, labels, words and colours."""

from __future__ import annotations

import asyncio
import re
from html.parser import HTMLParser
from importlib import resources
from itertools import product

import httpx
import pytest

from cluster.harmony import Outcome
from cluster.languages import CATALOGUE
from serving import playground
from serving.contract import Verdict
from serving.engines.scripted import ScriptedEngine
from tests.serving.harness import application, http_client

NAMES = sorted(
    file.name for file in resources.files(playground).iterdir() if file.name.endswith((".css", ".html", ".js"))
)
FILES = {"/" if name == "index.html" else f"/playground/{name}": name for name in NAMES}
TEXTS = {name: (resources.files(playground) / name).read_text("utf-8") for name in NAMES}
SCRIPTS = "".join(text for name, text in TEXTS.items() if name.endswith(".js"))
MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


def get(path: str, **headers: str) -> httpx.Response:
    async def call() -> httpx.Response:
        async with http_client(application(ScriptedEngine([]))) as http:
            return await http.get(path, headers=headers)

    return asyncio.run(call())


@pytest.mark.parametrize("path", FILES)
def test_each_file_comes_whole_with_headers_that_keep_everything_else_out(path: str) -> None:
    response = get(path)
    assert response.status_code == 200
    assert response.text == TEXTS[FILES[path]]
    policy = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    own, nothing = "'self'", "'none'"
    assert policy == {
        "default-src": nothing,
        "script-src": own,
        "style-src": own,
        "connect-src": own,
        "base-uri": nothing,
        "form-action": nothing,
        "frame-ancestors": nothing,
        "require-trusted-types-for": "'script'",
        "trusted-types": nothing,
    }
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", FILES)
def test_a_browser_that_has_a_version_is_told_so(path: str) -> None:
    first = get(path)
    media_type = MEDIA_TYPES[FILES[path].rpartition(".")[2]]
    assert first.headers["content-type"] == f"{media_type}; charset=utf-8"
    assert first.headers["cache-control"] == "no-cache"
    again = get(path, **{"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert get(path, **{"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize("name", TEXTS)
def test_no_file_refers_to_another_place(name: str) -> None:
    assert not re.findall(r"https?:|[\"'(=]\s*//\w|@import|\burl\(", TEXTS[name])


@pytest.mark.parametrize(
    "means", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Storage"]
)
def test_the_script_makes_no_markup_of_text_and_keeps_nothing(means: str) -> None:
    assert means not in SCRIPTS


def test_every_language_of_the_catalogue_can_be_chosen() -> None:
    response = get("/v1/languages")
    assert response.headers["cache-control"] == "public, max-age=3600"
    entries = response.json()["data"]
    assert [entry["tag"] for entry in entries] == list(CATALOGUE)
    for entry in entries:
        language = CATALOGUE[entry["tag"]]
        assert entry == {
            "tag": language.tag,
            "name": language.name,
            "autonym": language.autonym,
            "direction": language.direction,
        }
    assert {entry["tag"] for entry in entries if entry["direction"] == "rtl"} == {"ar", "fa", "he", "ur"}


class _Controls(HTMLParser):
    """Ids of form controls and what labels are for; no attribute may be style or a handler."""

    def __init__(self) -> None:
        super().__init__()
        self.controls: list[str | None] = []
        self.labels: list[str | None] = []
        self.ids: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("input", "select", "textarea"):
            self.controls.append(given.get("id"))
        if tag == "label":
            self.labels.append(given.get("for"))
        if given.get("id"):
            self.ids.append(str(given["id"]))
        self.inline += [name for name in given if name == "style" or name.startswith("on")]


def test_every_form_control_has_a_label_and_nothing_is_inline() -> None:
    page = _Controls()
    page.feed(TEXTS["index.html"])
    assert len(page.controls) == 8
    assert sorted(map(str, page.controls)) == sorted(map(str, page.labels))
    assert len(set(page.ids)) == len(page.ids)
    assert page.inline == []
    assert set(re.findall(r'byId\("([\w-]+)"\)', SCRIPTS)) <= set(page.ids)


@pytest.mark.parametrize(("table", "kind"), [("OUTCOMES", Outcome), ("VERDICTS", Verdict)])
def test_every_outcome_and_verdict_has_words(table: str, kind: type[Outcome] | type[Verdict]) -> None:
    (body,) = re.findall(rf"const {table} = {{\n(.*?)\n}};", SCRIPTS, re.DOTALL)
    assert set(re.findall(r"^  (\w+):", body, re.MULTILINE)) == {member.value for member in kind}


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, as WCAG 2.2 defines it."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, as WCAG 2.2 defines it."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


TEXT_PAIRS = [
    *product(("ink", "quiet", "accent"), ("ground", "surface", "thought")),
    *(("good", "good-ground"), ("fault", "fault-ground"), ("on-accent", "accent")),
]
EDGE_PAIRS = list(product(("edge", "accent"), ("ground", "surface")))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_the_contrast_that_wcag_aa_asks_for(scheme: str) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", TEXTS["style.css"], re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light if scheme == "light" else dark))
    assert len(colours) == 13
    low = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in TEXT_PAIRS}
    assert {pair: ratio for pair, ratio in low.items() if ratio < 4.5} == {}
    edges = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in EDGE_PAIRS}
    assert {pair: ratio for pair, ratio in edges.items() if ratio < 3} == {}
