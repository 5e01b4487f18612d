"""Adapters on the demo's model, for the tests of merging."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from cluster.artifacts import write_manifest
from training.merge.requantise import Effect
from training.modeling.base import load_base, peft_config
from training.sections import LoraConfig, ModelConfig

DEMO = Path("training/demo/model")
CPU = torch.device("cpu")
ADAPTER = "adapter_model.safetensors"
PROMPT = torch.randint(0, 3000, (2, 24), generator=torch.Generator().manual_seed(11))


def demo(precision: str = "fp32") -> Any:
    """The demo's model, its experts dequantised, as transformers runs it."""
    config = {"path": str(DEMO), "precision": precision, "base_precision": precision, "experts": "eager"}
    return load_base(ModelConfig.model_validate(config), CPU)


def adapt(base: Any, folder: Path, *, seed: int = 0, scale: float = 0.05, change: Any = None, **lora: Any) -> PeftModel:
    """Random adapters on `base`, saved to `folder` with a manifest as a run leaves it."""
    config = peft_config(LoraConfig.model_validate(lora), base.config.num_hidden_layers)
    if change:
        change(config)
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in get_peft_model_state_dict(model, save_embedding_layers=False).values():
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    write_manifest(folder, "adapter", str(DEMO), {"seed": seed})
    return model


def rewrite(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of an adapter and sign them again, as a run of another kind would have."""
    tensors = load_file(adapter / ADAPTER)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, adapter / ADAPTER, {"format": "pt"})
    write_manifest(adapter, "adapter", str(DEMO), {})


def zero(tensors: dict[str, torch.Tensor]) -> None:
    """For `rewrite`: an adapter that does nothing, though A is not zero."""
    for name in tensors:
        if "lora_B" in name:
            tensors[name].zero_()


def scaled(factor: float) -> Callable[[dict[str, torch.Tensor]], None]:
    """For `rewrite`: an adapter of so many times the effect."""
    return lambda tensors: tensors.update({n: t * factor for n, t in tensors.items() if "lora_B" in n})


def files(folder: Path) -> dict[str, bytes]:
    """The content of all files below a folder but those that tell of time."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes() for name, path in sorted(found.items()) if name not in ("manifest.json", "README.md")
    }


def relative(effect: Effect) -> float:
    """Norm of what is lost, relative to that of the effect."""
    return float((effect.lost / effect.whole) ** 0.5)
