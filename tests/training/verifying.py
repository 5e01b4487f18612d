"""A small packed base, an adapter on it, and the two merged: what tests of verification hold against each other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from cluster.artifacts import MANIFEST, WEIGHTS, Manifest, sha256, write_manifest
from cluster.verdict import Verdict
from training.demo.checkpoint import demo_config, new_model, save_checkpoint
from training.merge import merge
from training.modeling.base import load_base, peft_config
from training.modeling.mxfp4 import dequantise
from training.sections import LoraConfig, ModelConfig
from training.verify.commands import main

TOKENIZER = Path("training/demo/model/tokenizer.json")


@dataclass(frozen=True)
class Made:
    """Folders of a base, of an adapter on it and of the two merged, beside each other."""

    base: Path
    adapter: Path
    merged: Path


def make(
    root: Path, *, scale: float = 0.05, spread: float = 0.06, change: Callable[[Any], None] | None = None, **lora: Any
) -> Made:
    """Base and adapter are drawn at random, with the standard deviations `spread` and `scale`.

    `lora` are settings of `LoraConfig`, and `change` is given PEFT's description made of them.
    """
    base, adapter, merged = root / "base", root / "adapter", root / "merged"
    make_base(base, spread=spread)
    make_adapter(base, adapter, scale, change, **lora)
    merge(str(adapter), str(merged))
    return Made(base, adapter, merged)


def make_base(folder: Path, seed: int = 0, spread: float = 0.06) -> None:
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    config = demo_config(tokenizer)
    config.update({"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_local_experts": 4})
    config.update({"num_attention_heads": 4, "head_dim": 16, "layer_types": config.layer_types[:2]})
    model = new_model(config, seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(0.0, spread)
    save_checkpoint(model.state_dict(), config, tokenizer, folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")


def make_adapter(
    base: Path, folder: Path, scale: float, change: Callable[[Any], None] | None = None, **lora: Any
) -> None:
    """Adapters, by default on attention and all experts, with a manifest as a run leaves it."""
    described = {"path": str(base), "precision": "fp32", "base_precision": "fp32", "experts": "eager"}
    model = load_base(ModelConfig.model_validate(described), torch.device("cpu"))
    config = peft_config(LoraConfig.model_validate({"rank": 2} | lora), model.config.num_hidden_layers)
    if change:
        change(config)
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in get_peft_model_state_dict(adapted).values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    adapted.save_pretrained(folder)
    write_manifest(folder, "adapter", str(base), {})


def copy_of(made: Made, root: Path) -> Path:
    """A copy of the merged checkpoint that a test may spoil, with the adapter beside it."""
    shutil.copytree(made.adapter, root / "adapter")
    return Path(shutil.copytree(made.merged, root / "merged"))


def sign(folder: Path) -> None:
    """Write the manifest again, so that hashes are those of the files as they are now."""
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST)
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in paths}
    (folder / MANIFEST).write_bytes(manifest.model_copy(update={"files": files}).to_bytes())


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights of a checkpoint, as a merge with a mistake would have."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    sign(folder)


def edit(folder: Path, name: str, **changes: Any) -> None:
    """Change entries of a JSON file, None removes one, and sign again."""
    settings = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    sign(folder)


def base_weight(base: Path, name: str) -> torch.Tensor:
    """A weight of the packed base, in bf16."""
    stored: dict[str, torch.Tensor] = load_file(base / WEIGHTS)
    if name in stored:
        return stored[name]
    return dequantise(stored[f"{name}_blocks"], stored[f"{name}_scales"])


def side_by_side(made: Made, folder: Path) -> Path:
    """The checkpoint of format adapter: the base's files and the adapter in a folder."""
    shutil.copytree(made.base, folder)
    (folder / "adapter").mkdir()
    adapter = Manifest.model_validate_json((made.adapter / MANIFEST).read_bytes())
    for name in adapter.files:
        shutil.copy(made.adapter / name, folder / "adapter" / name)
    details = {"format": "adapter", "adapter": adapter.model_dump(mode="json")}
    manifest = Manifest(kind="checkpoint", base=str(made.base), details=details, files={})
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    sign(folder)
    return folder


def verdict_of(folder: Path, *flags: object) -> tuple[int, Verdict]:
    """Exit code and verdict of `training verify` with few rows."""
    code = main([str(folder), "--limit", "2", "--device", "cpu", *map(str, flags)])
    return code, Verdict.model_validate_json((folder / "verification.json").read_bytes())
