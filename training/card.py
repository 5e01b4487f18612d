"""The model card of a checkpoint: the README.md that a model hub shows, made from what the manifests say.

Front matter as the Hub reads it: https://huggingface.co/docs/hub/model-cards. What is not known is left out; nothing
is estimated. Text that a user has chosen (names of files, of runs, of folders) stands in code spans or in YAML scalars,
so that it can neither be taken for markup nor end the front matter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from huggingface_hub import ModelCardData

from cluster.languages import CATALOGUE
from training.data.names import is_hub_id

GPT_OSS = re.compile(r"(?:openai/|(?:.*/)?models--openai--|/(?:.*/)?)(gpt-oss-(?:20b|120b))(?:/snapshots/[0-9a-f]+)?/?")
"""a base of OpenAI's: its hub id, the hub's cache of it, or a folder that is called like it"""
TITLES = {
    "bf16": "merged into bfloat16 weights",
    "mxfp4": "merged and rounded to MXFP4 again",
    "adapter": "base and LoRA adapter, side by side",
}
FILES_SHOWN = 20
"""data files that are listed with their hash; of more, their number"""
COUNTS = ("conversations", "documents", "tokens")
QUALITY = re.compile(r"loss|accuracy|agreement|effect|(?:^|_)kl(?:_|$)")
"""metrics that tell of the model; others tell how fast the run was"""


def model_card(base: str, format: str, details: dict[str, Any]) -> str:
    """README.md of a checkpoint: YAML front matter, then Markdown.

    Args:
        base: of the checkpoint's manifest: a folder or hub id.
        format: "bf16", "mxfp4" or "adapter".
        details: of the checkpoint's manifest: under `adapter` the adapter's manifest with its own `details`, and
            further `merge` and `verification`. All of it may be missing.
    """
    adapter = _mapping(details.get("adapter"))
    facts = _mapping(adapter.get("details"))
    names = [name for name in (base, adapter.get("base")) if isinstance(name, str)]
    sections = [
        _title(names, format),
        _training(facts),
        _data(_mapping(facts.get("data"))),
        _recipe(facts),
        _figures(facts, details),
        _usage(names, format, _mapping(facts.get("config"))),
        _limits(format),
    ]
    return f"---\n{_front_matter(names, format, facts)}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def hub_base(names: list[str]) -> str | None:
    """The hub id of a base that goes by `names` (folders, hub ids), where one of them tells it."""
    for name in names:
        if found := GPT_OSS.fullmatch(name):
            return f"openai/{found[1]}"
    return next((name for name in names if is_hub_id(name)), None)


def _front_matter(names: list[str], format: str, facts: Mapping[str, Any]) -> str:
    base = hub_base(names)
    data = _mapping(_mapping(facts.get("data")).get("train"))
    tags = {tag.partition("-")[0] for tag in _mapping(data.get("languages")) if tag in CATALOGUE}
    card = ModelCardData(
        license="apache-2.0" if base and base.startswith("openai/gpt-oss-") else None,
        base_model=base,
        base_model_relation=("adapter" if format == "adapter" else "finetune") if base else None,
        library_name="peft" if format == "adapter" else "transformers",
        pipeline_tag="text-generation",
        language=sorted(tags) or None,
        datasets=[str(data["source"])] if _on_hub(data) else None,
        tags=["raysoner", "gpt_oss", "lora", "reasoning"],
    )
    return card.to_yaml(line_break="\n").rstrip("\n")


def _title(names: list[str], format: str) -> str:
    base = hub_base(names)
    shown = (
        f"[{base}](https://huggingface.co/{base})"
        if base
        else code(PurePosixPath(names[0]).name)
        if names
        else "gpt-oss"
    )
    heading = f"# Fine-tuned {base.rpartition('/')[2]}" if base else "# Fine-tuned gpt-oss"
    return f"{heading}\n\nBase: {shown}. This checkpoint: {TITLES.get(format, code(format))}. Made with Raysoner."


def _training(facts: Mapping[str, Any]) -> str:
    lora = _mapping(_mapping(facts.get("config")).get("lora"))
    if not lora:
        return ""
    layers = lora.get("expert_layers")
    numbers = [layer for layer in layers if isinstance(layer, int)] if isinstance(layers, list) else []
    experts = (
        "all experts of all layers"
        if layers == "all"
        else f"all experts of the layers {', '.join(map(str, numbers))}"
        if numbers
        else ""
    )
    attention = "q, k, v and o projections of attention" if lora.get("attention") else ""
    targets = " and ".join(filter(None, (attention, experts)))
    scale = "alpha / √rank" if lora.get("rslora") else "alpha / rank"
    sizes = f"rank {_plain(lora.get('rank'))}, alpha {_plain(lora.get('alpha'))} (scale {scale})"
    dropout = f", dropout {_plain(lora['dropout'])}" if "dropout" in lora else ""
    return f"## What was trained\n\nLoRA of {sizes}{dropout}, on {targets}. All else is the base's."


def _data(data: Mapping[str, Any]) -> str:
    parts = ["\n".join(_data_lines(name, _mapping(data[name]))) for name in ("train", "evaluation") if name in data]
    return "## Data\n\n" + "\n".join(parts) if parts else ""


def _data_lines(name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    """One item of a list for a data set, and below it its files."""
    source = str(entry.get("source", ""))
    shown = (
        f"[{source}](https://huggingface.co/datasets/{source})" if _on_hub(entry) else code(PurePosixPath(source).name)
    )
    known = _mapping(entry.get("counts"))
    counts = [f"{value:,} {what}" for what in COUNTS if isinstance(value := known.get(what), int)]
    languages = [
        f"{CATALOGUE[tag].name} {count:,}"
        for tag, count in _mapping(entry.get("languages")).items()
        if tag in CATALOGUE and isinstance(count, int)
    ]
    asked = f"; conversations by the language that they ask to think in: {', '.join(languages)}" if languages else ""
    yield f"- {name}: {': '.join(filter(None, (shown, ', '.join(counts))))}{asked}"
    files = _mapping(entry.get("files"))
    for file in list(files)[:FILES_SHOWN]:
        yield f"  - {code(file)}, SHA-256 {code(str(files[file]))}"
    if len(files) > FILES_SHOWN:
        yield f"  - and {len(files) - FILES_SHOWN} more files, which manifest.json lists"


def _recipe(facts: Mapping[str, Any]) -> str:
    config = _mapping(facts.get("config"))
    optimizer, batch, run, data = (_mapping(config.get(name)) for name in ("optimizer", "batch", "run", "data"))
    rows = batch.get("global_batch_size")
    lines = {
        "optimizer steps": _mapping(facts.get("metrics")).get("step"),
        "peak learning rate": optimizer.get("learning_rate"),
        "learning rate at the end, as a share of the peak": optimizer.get("minimum_rate"),
        "warm-up, as a share of all steps": optimizer.get("warmup"),
        "weight decay": optimizer.get("weight_decay"),
        "rows a step": rows,
        "tokens a row, at most": data.get("sequence_length"),
        "seed": run.get("seed"),
        "precision of the arithmetic": _mapping(config.get("model")).get("precision"),
        "experts' frozen weights while training": _mapping(config.get("model")).get("base_precision"),
    }
    items = [f"- {name}: {_plain(value)}" for name, value in lines.items() if value is not None]
    channels = data.get("train_on")
    if isinstance(channels, list) and channels:
        items.append(f"- channels that carry loss: {', '.join(code(str(channel)) for channel in channels)}")
    schedule = "AdamW with a cosine schedule.\n\n" if optimizer else ""
    versions = [f"{name} {value}" for name, value in _mapping(facts.get("versions")).items()]
    if versions:
        items.append(f"- versions: {code(', '.join(versions))}")
    return f"## Recipe\n\n{schedule}" + "\n".join(items) if items else ""


def _figures(facts: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """Figures of the checkpoint that was exported, and of its verification where the manifest holds one."""
    sources = {"": _mapping(facts.get("metrics")), "verification: ": _mapping(details.get("verification"))}
    kept = _mapping(_mapping(details.get("merge")).get("report")).get("kept")
    items = [
        f"- {prefix}{code(str(name))} {_plain(value)}"
        for prefix, figures in sources.items()
        for name, value in figures.items()
        if QUALITY.search(str(name)) and _is_number(value)
    ]
    if _is_number(kept):
        items.append(f"- share of the adapter's change of the experts' weights that the format kept: {_plain(kept)}")
    told = "Losses are nats a trained token. " if any("loss" in name for name in sources[""]) else ""
    if not items:
        return ""
    where = "`verification.json`, where it lies beside this file, holds what `python -m training verify` found."
    return f"## Measured\n\n{told}{where}\n\n" + "\n".join(items)


def _usage(names: list[str], format: str, config: Mapping[str, Any]) -> str:
    base = hub_base(names) or "FOLDER_OF_THE_BASE"
    rank = _mapping(config.get("lora")).get("rank")
    if format != "adapter":
        return f"""## How to use it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER_OF_THIS_CHECKPOINT", dtype="auto", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER_OF_THIS_CHECKPOINT")
```

{_RAYSONER}"""
    maximum = f" --max-lora-rank {max(8, rank)}" if isinstance(rank, int) else ""
    return f"""## How to use it

The weights at the top are the base's, unchanged; the adapter lies in the folder `adapter`.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(base, "FOLDER_OF_THIS_CHECKPOINT/adapter")
```

With vLLM, whose support of adapters on experts depends on its version (compare answers with and without the adapter):

```
vllm serve FOLDER_OF_THIS_CHECKPOINT --enable-lora --lora-modules tuned=FOLDER_OF_THIS_CHECKPOINT/adapter{maximum}
```"""


_RAYSONER = """With Raysoner, whose endpoint returns each Harmony channel by itself:

```
python -m serving deploy --config serving/configs/gpt-oss-20b.toml --model.path FOLDER_OF_THIS_CHECKPOINT
```"""


def _limits(format: str) -> str:
    of_format = {
        "bf16": "Merged weights are rounded to bfloat16 once, so logits differ from those of base and adapter in the "
        "last bits.",
        "mxfp4": "Rounding to four bits loses a part of the adapter's effect; `manifest.json` says how much was kept.",
        "adapter": "Software that loads the weights at the top and not the adapter runs the unchanged base.",
    }
    items = [
        of_format.get(format, ""),
        "A fine-tuned model is not checked for safety again: what holds for the base need not hold here.",
        "Languages and tasks that the data above does not show were not trained, and only what is listed as measured "
        "was measured.",
    ]
    return "## Limits\n\n" + "\n".join(f"- {item}" for item in items if item)


def code(text: str) -> str:
    """`text` as a code span of one line that nothing in it can end (CommonMark 0.31, section 6.1)."""
    line = re.sub(r"[\x00-\x20\x7f-\xa0\u2028\u2029]+", " ", text).strip() or "?"
    longest = max((len(run) for run in re.findall(r"`+", line)), default=0)
    fence = "`" * (longest + 1)
    room = " " if longest else ""
    return f"{fence}{room}{line}{room}{fence}"


def _plain(value: object) -> str:
    """A number as it is read most easily; anything else as code."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return str(value) if isinstance(value, int) else code(str(value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _on_hub(entry: Mapping[str, Any]) -> bool:
    return bool(entry.get("hub")) and is_hub_id(str(entry.get("source", "")))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
