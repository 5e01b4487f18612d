"""An evaluation's figures in the model card of a checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

from cluster.artifacts import CARD, MANIFEST, publish_file
from cluster.config import ConfigError
from serving.evaluation.report import Report, markdown

USAGE = "\n## How to use it\n"
"""the heading before which figures stand, in the cards of `training.card`"""


def add_to_card(folder: Path, report: Report) -> None:
    """Put the report's table into the README.md of a checkpoint, in place of an earlier one of the same suite.

    No manifest lists that file, so that a verdict on the checkpoint stays.

    Raises:
        ConfigError: as of `read_card`.
    """
    text = read_card(folder)
    with publish_file(folder / CARD) as scratch:
        scratch.write_text(with_section(text, report), encoding="utf-8")


def read_card(folder: Path) -> str:
    """The model card of a checkpoint, if figures may be added to it: before hours of questions, too.

    Raises:
        ConfigError: there is no card, or the checkpoint was merged when manifests listed it.
    """
    card = folder / CARD
    try:
        text = card.read_text(encoding="utf-8")
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--card: {folder} is no checkpoint that python -m training merge made ({error})") from None
    if CARD in manifest.get("files", {}):
        raise ConfigError(
            f"--card: the manifest of {folder} holds {CARD} to its hash; merge it again, and then evaluate"
        )
    return text


def with_section(text: str, report: Report) -> str:
    """The card with the report's section, which begins and ends with a comment that names the suite."""
    name = re.sub(r"[^\w./-]+", "-", report.suite.name)
    begin, end = f"<!-- evaluation on {name} -->", f"<!-- end of evaluation on {name} -->"
    section = f"{begin}\n## Evaluated on {name}\n\n{markdown(report)}{end}\n"
    if begin in text and end in text:
        before, _, rest = text.partition(begin)
        return before + section.rstrip("\n") + rest.partition(end)[2]
    before, usage, rest = text.partition(USAGE)
    return f"{before.rstrip()}\n\n{section}{usage}{rest}" if usage else f"{before.rstrip()}\n\n{section}"
