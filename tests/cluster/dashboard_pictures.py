"""python -m tests.cluster.dashboard_pictures FOLDER: the pictures of docs/monitoring.md, made again.

Starts a Ray of its own with the demo's endpoint on it, submits a training run as a user does, and takes pictures of
Ray's dashboard while both work, with Debian's Chromium. Takes two minutes, and four CPU cores if they are there.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from playwright.sync_api import Browser, Page, ViewportSize

from cluster.local import LocalRay, free_ports, local_ray
from tests.cluster.demo_work import ask, command, endpoint
from tests.conftest import DEMO
from tests.serving.playground_browser import chromium

WIDTH = 1360
STEPS = 60
SECONDS = 300
"""until the run is given up on"""
PAGE_SECONDS = 60
"""until a page is given up on"""
SETTLED_MS = 5000
"""after which a page, which asks for its figures every few seconds, has them"""


class Picture(NamedTuple):
    """A page of the dashboard.

    Args:
        path: of the page.
        text: that it shows when it is there, a pattern.
        height: of the picture, in pixels.
        prepare: what is done on the page first.
    """

    path: str
    text: str
    height: int
    prepare: Callable[[Page], None] | None = None


def main(folder: Path) -> None:
    """Makes the pictures in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    [port] = free_ports(1)
    with (
        local_ray(4) as ray,
        tempfile.TemporaryDirectory(prefix="runs-") as storage,
        chromium() as browser,
        endpoint(ray, port, "raysoner") as url,
        submitted(ray, Path(storage)) as log,
    ):
        job = wait_for(log, r"raysubmit_\w+")
        wait_for(log, r"step [5-9]/")
        ask(url)
        with dashboard(browser, ray.environment["RAY_AUTH_TOKEN"]) as page:
            for name, picture in pictures(job).items():
                take(page, ray.dashboard, picture, folder / f"{name}.png")


def take(page: Page, url: str, picture: Picture, path: Path) -> None:
    """Takes a picture."""
    page.set_viewport_size(ViewportSize(width=WIDTH, height=picture.height))
    page.goto(f"{url}/#{picture.path}")
    if picture.prepare is not None:
        picture.prepare(page)
    page.get_by_text(re.compile(picture.text)).first.wait_for()
    page.wait_for_timeout(SETTLED_MS)
    page.screenshot(path=path)


def pictures(job: str) -> dict[str, Picture]:
    """By the name of their file."""
    return {
        "jobs": Picture("/jobs", "RUNNING", 540, lambda page: fill(page, "Submission ID", job)),
        "job": Picture(f"/jobs/{job}", "Running:", 1080, newest_first),
        "cluster": Picture("/cluster", "RayTrainWorker", 780, processes),
        "actors": Picture("/actors", "RayTrainWorker", 510, lambda page: fill(page, "Class", "RayTrainWorker")),
        "serve": Picture("/serve", "raysoner", 590),
        "logs": Picture("/logs", r"worker-.*\.out", 470, logs),
    }


def newest_first(page: Page) -> None:
    """Turns the log round."""
    page.get_by_text("Reverse:").first.wait_for()
    page.get_by_role("checkbox").last.click()


def processes(page: Page) -> None:
    """Moves down to those of the run."""
    page.get_by_text("RayTrainWorker").last.scroll_into_view_if_needed()


def logs(page: Page) -> None:
    """Of the one node, those of workers, whose names have the number of a job."""
    page.get_by_text("Node ID:").first.click()
    fill(page, "File Name", "000-")


def fill(page: Page, label: str, text: str) -> None:
    """Filter a table."""
    field = page.get_by_label(label).first
    field.fill(text)
    field.press("Enter")


@contextmanager
def submitted(ray: LocalRay, storage: Path) -> Iterator[Path]:
    """A training run, handed in as a user does; where its log goes."""
    log = storage / "submit.log"
    run = ["python", "-m", "training", "run", "--config", DEMO, "--run.maximum_steps", str(STEPS)]
    run += ["--run.logging_steps", "1", "--run.storage", str(storage)]
    with command(ray, log, "-m", "cluster", "submit", "--address", ray.dashboard, "--", *run):
        yield log


def wait_for(log: Path, pattern: str) -> str:
    """What matches, once the log has it."""
    end = time.monotonic() + SECONDS
    while not (found := re.search(pattern, text := log.read_text(errors="replace"))):
        assert time.monotonic() < end, text
        time.sleep(0.5)
    return found[0]


@contextmanager
def dashboard(browser: Browser, token: str) -> Iterator[Page]:
    """A page that brings the token which Ray's dashboard asks a person for."""
    context = browser.new_context(extra_http_headers={"Authorization": f"Bearer {token}"})
    try:
        page = context.new_page()
        page.set_default_timeout(PAGE_SECONDS * 1000)
        yield page
    finally:
        context.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
