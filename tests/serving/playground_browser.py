"""Chromium, and endpoints over a scripted engine for it: what the playground's browser tests share."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright

from cluster.harmony import Codec
from serving.api.app import create_app
from serving.engines.base import Engine
from tests.serving.harness import CODEC, serving_config

EXECUTABLES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
MISSING = "there is no Chromium; on Debian: apt-get install chromium fonts-noto-core fonts-noto-cjk"
SECONDS = 20
"""until something on the page is given up on; it takes a small part of it, unless the machine is busy"""
ENGINE = {"maximum_output_tokens": 8000, "default_output_tokens": 4000, "maximum_cached_tokens": 16384}


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless browser, or a skipped test where none is installed."""
    executable = next(filter(None, map(shutil.which, EXECUTABLES)), None)
    if executable is None:
        pytest.skip(MISSING)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def served(engine: Engine, codec: Codec = CODEC, **sections: Any) -> Iterator[str]:
    """The address of an endpoint over `engine`, on a free port."""
    app = create_app(serving_config(**{"engine": ENGINE, "limits": {"prompt_tokens": 4000}, **sections}), codec, engine)
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=SECONDS)
        listening.close()


@contextmanager
def opened(browser: Browser, url: str, faults: Sequence[str] | None = None, **options: Any) -> Iterator[Page]:
    """The page, ready. What its console calls an error goes into `faults`, and so does a request to elsewhere."""
    context = browser.new_context(**options)
    try:
        page = context.new_page()
        page.set_default_timeout(SECONDS * 1000)
        if isinstance(faults, list):
            page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("request", lambda one: None if one.url.startswith(url) else faults.append(one.url))
        page.goto(url)
        page.wait_for_selector("body[data-ready]")
        yield page
    finally:
        context.close()


def wait_until(holds: Any, seconds: float = SECONDS) -> None:
    """Waits for something on the server's side."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


CONTRAST = """() => {
  const parts = (colour) => (colour.match(/[\\d.]+/g) ?? []).map(Number);
  const light = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((each) => {
      const part = each / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = parts(getComputedStyle(each).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return light(colour);
    }
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const worded = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    const field = element.matches("input, select, textarea");
    if (!(worded || field) || !element.checkVisibility() || element.closest(".unseen, :disabled")) continue;
    for (const pseudo of field ? [null, "::placeholder"] : [null]) {
      const own = light(parts(getComputedStyle(element, pseudo).color));
      const [low, high] = [own, behind(element)].sort((a, b) => a - b);
      const name = element.tagName + " " + (element.id || element.className || element.textContent);
      found.push([name, (high + 0.05) / (low + 0.05)]);
    }
  }
  return found;
}"""
