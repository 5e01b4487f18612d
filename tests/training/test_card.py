"""The model card: front matter that a hub reads, nothing that is not known, and no text that gets out of its place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard

from training.card import code, hub_base, model_card

GOLDEN = Path(__file__).parent / "model_card.md"
"""of `DETAILS`; written again by `python -m tests.training.test_card`"""
DETAILS: dict[str, Any] = {
    "format": "bf16",
    "adapter": {
        "kind": "adapter",
        "base": "openai/gpt-oss-20b",
        "details": {
            "config": {
                "model": {"path": "openai/gpt-oss-20b", "precision": "bf16", "base_precision": "mxfp4"},
                "data": {"sequence_length": 2048, "train_on": ["analysis", "final"]},
                "lora": {
                    "rank": 8,
                    "alpha": 16.0,
                    "rslora": False,
                    "dropout": 0.0,
                    "attention": True,
                    "expert_layers": "all",
                },
                "optimizer": {"learning_rate": 2e-4, "minimum_rate": 0.1, "warmup": 0.03, "weight_decay": 0.0},
                "batch": {"global_batch_size": 16},
                "run": {"name": "tuned", "seed": 0},
            },
            "metrics": {"step": 90, "loss": 0.25, "eval_loss": 0.5, "tokens_per_second": 26444.0},
            "data": {
                "train": {
                    "source": "HuggingFaceH4/Multilingual-Thinking",
                    "hub": True,
                    "files": {},
                    "counts": {"conversations": 1000, "documents": 1000, "tokens": 1234567},
                    "languages": {"fr": 600, "pt-BR": 400},
                },
                "evaluation": {
                    "source": "/home/somebody/heldout",
                    "hub": False,
                    "files": {"a.jsonl": "0" * 64, "b.jsonl": "1" * 64},
                    "counts": {"conversations": 20},
                    "languages": {"de": 20},
                },
            },
            "versions": {"torch": "2.11.0", "peft": "0.21.2"},
        },
        "files": {},
    },
    "merge": {"seconds": 3.0},
}


def front_matter(card: str) -> dict[str, Any]:
    opening, matter, _ = card.split("---\n", 2)
    assert opening == ""
    found: dict[str, Any] = yaml.safe_load(matter)
    return found


def details(**changes: Any) -> dict[str, Any]:
    """`DETAILS` with entries of the adapter's own details exchanged."""
    changed = copy.deepcopy(DETAILS)
    changed["adapter"]["details"] |= changes
    return changed


def test_golden() -> None:
    assert model_card("/models/base", "bf16", DETAILS) == GOLDEN.read_text(encoding="utf-8")


def test_the_hubs_own_reader_reads_it() -> None:
    card = ModelCard(model_card("/models/base", "bf16", DETAILS))
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "base_model": "openai/gpt-oss-20b",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "language": ["fr", "pt"],
        "datasets": ["HuggingFaceH4/Multilingual-Thinking"],
        "tags": ["raysoner", "gpt_oss", "lora", "reasoning"],
    }


def test_the_adapter_format_is_an_adapter() -> None:
    card = model_card("/models/base", "adapter", DETAILS)
    assert front_matter(card)["base_model_relation"] == "adapter"
    assert front_matter(card)["library_name"] == "peft"
    assert 'from_pretrained("openai/gpt-oss-20b"' in card
    assert "--lora-modules tuned=FOLDER_OF_THIS_CHECKPOINT/adapter --max-lora-rank 8" in card


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("openai/gpt-oss-20b", "openai/gpt-oss-20b"),
        ("/models/gpt-oss-120b", "openai/gpt-oss-120b"),
        ("/cache/models--openai--gpt-oss-20b/snapshots/6cee5e8", "openai/gpt-oss-20b"),
        ("somebody/gpt-oss-20b", "somebody/gpt-oss-20b"),
        ("/models/gpt-oss-20b-other", None),
        ("/models/demo", None),
    ],
)
def test_a_license_is_stated_only_of_openais_bases(name: str, hub: str | None) -> None:
    assert hub_base([name]) == hub
    matter = front_matter(model_card(name, "bf16", {}))
    assert matter.get("base_model") == hub
    assert matter.get("license") == ("apache-2.0" if hub and hub.startswith("openai/") else None)


def test_what_the_format_kept_is_told() -> None:
    merged = DETAILS | {"merge": {"seconds": 3.0, "report": {"kept": 0.376736, "layers": {}}}}
    assert "weights that the format kept: 0.376736\n" in model_card("/models/base", "mxfp4", merged)
    assert "the format kept" not in model_card("/models/base", "bf16", DETAILS)


def test_what_is_unknown_is_left_out() -> None:
    card = model_card("/models/demo", "bf16", {})
    assert "None" not in card
    assert [line for line in card.splitlines() if line.startswith("## ")] == ["## How to use it", "## Limits"]
    assert "language" not in front_matter(card)
    assert "nan" not in model_card("/models/demo", "bf16", details(metrics={"eval_loss": float("nan"), "step": 3}))


def test_no_path_of_the_machine_is_told() -> None:
    card = model_card("/home/somebody/base", "bf16", details(versions={}))
    assert "/home/somebody" not in card


HOSTILE = 'x\n---\nlicense: mit\n# Heading\n<script>alert(1)</script>| ``` `` [a](http://b) "quoted" \u2028 #: '


@pytest.mark.parametrize("format", ["bf16", "mxfp4", "adapter", HOSTILE])
def test_hostile_names_stay_in_their_place(format: str) -> None:
    hostile = {
        "train": {"source": f"/data/{HOSTILE}", "hub": True, "files": {HOSTILE: HOSTILE}, "languages": {HOSTILE: 1}},
        HOSTILE: {"source": HOSTILE},
    }
    lora = {"rank": HOSTILE, "alpha": HOSTILE, "expert_layers": [HOSTILE], "attention": True}
    config = {"lora": lora, "optimizer": {"learning_rate": HOSTILE}, "data": {"train_on": [HOSTILE]}}
    harmless = model_card("/base", format, details(data={"train": {"source": "x"}}, config=config, metrics={}))
    card = model_card(
        HOSTILE,
        format,
        details(data=hostile, config=config, metrics={f"loss{HOSTILE}": 1.0}, versions={HOSTILE: HOSTILE}),
    )
    assert front_matter(card) == front_matter(harmless)
    # What stands at a line's beginning is ours, and every line with foreign text has it inside code spans.
    headings = [line for line in card.splitlines() if line.startswith(("#", "---", "<", "|"))]
    assert all("Heading" not in line and "license" not in line for line in headings)
    for line in card.splitlines():
        if "script" in line:
            assert "<script>" not in outside_code(line), line


def outside_code(line: str) -> str:
    """A line without its code spans, by CommonMark's rule: a run of backticks closes at the next run as long."""
    rest, kept = line, ""
    while "`" in rest:
        before, _, _ = rest.partition("`")
        run = len(rest[len(before) :]) - len(rest[len(before) :].lstrip("`"))
        kept, rest = kept + before, rest[len(before) + run :]
        position = 0
        while position < len(rest):
            ticks = len(rest[position:]) - len(rest[position:].lstrip("`"))
            if ticks == run:
                break
            position += max(1, ticks)
        assert position < len(rest), f"a code span is not closed in {line}"
        rest = rest[position + run :]
    return kept + rest


@pytest.mark.parametrize("text", ["a", "`", "``", "a`b``c", " ", "\n", "```"])
def test_code_spans_cannot_be_ended(text: str) -> None:
    assert outside_code(code(text)) == ""


if __name__ == "__main__":
    GOLDEN.write_text(model_card("/models/base", "bf16", DETAILS), encoding="utf-8")
