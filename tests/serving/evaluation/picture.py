"""python -m tests.serving.evaluation.picture REPORT.html PICTURE.png: the picture of docs/evaluation.md, made again.

Shows parts of a report of `python -m serving evaluate`, with Debian's Chromium: the first two charts, the language that
was asked for and the one found in the thinking, and an example of each language named.
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import ViewportSize

from tests.serving.playground_browser import chromium

WIDTH = 1200
EXAMPLES = ("ar", "ja")
KEEP = """(languages) => {
  const kept = (found) => [...document.querySelectorAll(found)];
  const wanted = new Set([
    document.querySelector("h1"), document.querySelector("h1 + .quiet"),
    ...kept("h2").filter((head) => /^Before and after|^The language asked/.test(head.textContent)),
    document.querySelector(".charts"), document.querySelector(".charts").previousElementSibling,
    document.querySelector(".confusions"),
    ...languages.map((tag) => kept(".example").find((one) => one.querySelector(".question").lang === tag)),
  ]);
  for (const part of [...document.body.children]) if (!wanted.has(part)) part.remove();
  kept(".charts > div").slice(2).forEach((part) => part.remove());
  kept(".confusions > div").slice(2).forEach((part) => part.remove());
}"""


def main(report: Path, picture: Path) -> None:
    """Takes the picture."""
    with chromium() as browser:
        page = browser.new_page(viewport=ViewportSize(width=WIDTH, height=800), color_scheme="light")
        page.goto(report.absolute().as_uri())
        page.evaluate(KEEP, list(EXAMPLES))
        page.screenshot(path=picture, full_page=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
