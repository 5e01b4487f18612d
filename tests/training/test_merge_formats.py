"""The formats mxfp4 and adapter: the base's own bytes where nothing changed, and loadable by stock libraries."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from cluster.artifacts import INDEX, WEIGHTS, ArtifactError, check_checkpoint, read_manifest
from training.merge import merge
from training.merge.options import KEEP_AT_LEAST
from training.modeling.loading import load_packed
from training.modeling.mxfp4 import dequantise

from .merging import CPU, DEMO, PROMPT, adapt, demo, files, rewrite, scaled, zero

pytestmark = pytest.mark.usefixtures("one_thread")

COPIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """An adapter of attention and all experts, and the logits of base + adapter in fp32."""
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    model = adapt(demo(), folder, rank=4)
    with torch.no_grad():
        return folder, model(PROMPT).logits


@pytest.fixture
def adapter(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[0], tmp_path / "adapter"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(PROMPT).logits
    return found


def stock(folder: Path) -> Any:
    """As stock transformers loads it, dequantised."""
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True),
        output_loading_info=True,
    )
    assert not any(loading.values()), loading
    return model


def test_the_adapter_beside_the_base_loses_nothing(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(str(trained[0]), str(out), format="adapter")
    assert check_checkpoint(out).packed
    manifest = read_manifest(out, "checkpoint")
    assert manifest.details["format"] == "adapter"
    own = {f"adapter/{name}": content for name, content in files(trained[0]).items()}
    assert files(out) == {name: (DEMO / name).read_bytes() for name in (*COPIED, WEIGHTS)} | own
    assert set(manifest.files) == set(files(out))
    assert (out / "README.md").read_text().startswith("---\n")
    adapted = PeftModel.from_pretrained(stock(out), str(out / "adapter"))
    assert torch.allclose(logits(adapted), trained[1], atol=1e-5, rtol=0)


def test_mxfp4_loads_in_stock_transformers_and_in_ours(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = merge(str(trained[0]), str(out), format="mxfp4")
    assert check_checkpoint(out).packed
    assert read_manifest(out, "checkpoint") == manifest
    assert all((out / name).read_bytes() == (DEMO / name).read_bytes() for name in COPIED)
    ours = load_packed(str(out), torch.float32, CPU, attention="eager", experts="eager")
    found = logits(stock(out))
    assert torch.allclose(logits(ours), found, atol=1e-4, rtol=0)
    effect = (logits(demo()) - trained[1]).abs().median()
    assert (found - trained[1]).abs().median() < 0.6 * effect


def test_the_report_is_what_the_files_say(trained: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    merge(str(trained[0]), str(tmp_path / "out"), format="mxfp4")
    merge(str(trained[0]), str(tmp_path / "dense"))
    old, new = load_file(DEMO / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    dense = load_file(tmp_path / "dense" / WEIGHTS)
    made = read_manifest(tmp_path / "out", "checkpoint").details["merge"]["report"]
    assert set(made["layers"]) == {str(layer) for layer in range(6)}
    for layer, kept in made["layers"].items():
        for projection, share in kept.items():
            name = f"model.layers.{layer}.mlp.experts.{projection}"
            before, after = (
                dequantise(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], torch.float32)
                for tensors in (old, new)
            )
            delta = dense[name].float() - before  # but for bf16's rounding
            lost = (after - before - delta).square().sum() / delta.square().sum()
            assert share == pytest.approx(1 - float(lost), abs=0.01), name
    assert min(min(kept.values()) for kept in made["layers"].values()) <= made["kept"]
    # Linears have no blocks: they are merged to their own dtype, as in a bf16 merge.
    for name in [name for name in old if name.endswith("_proj.weight")]:
        assert torch.equal(new[name], dense[name])
        assert not torch.equal(new[name], old[name])
    untouched = [name for name in old if "_proj" not in name]
    assert all(torch.equal(new[name], old[name]) for name in untouched)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_zero_adapter_gives_the_bases_files(adapter: Path, sharded: bool, tmp_path: Path) -> None:
    """Also where scales come before their blocks, or lie in another file."""
    base = shutil.copytree(DEMO, tmp_path / "base", ignore=shutil.ignore_patterns("build.json"))
    if sharded:
        split(base)
    rewrite(adapter, zero)
    made = merge(str(adapter), str(tmp_path / "out"), base=str(base), format="mxfp4").details["merge"]["report"]
    assert files(tmp_path / "out") == files(base)
    assert made["kept"] == 1.0


def test_scales_in_another_file_are_the_same(adapter: Path, tmp_path: Path) -> None:
    base = shutil.copytree(DEMO, tmp_path / "base")
    split(base)
    merge(str(adapter), str(tmp_path / "whole"), format="mxfp4")
    merge(str(adapter), str(tmp_path / "sharded"), base=str(base), format="mxfp4")
    whole = load_file(tmp_path / "whole" / WEIGHTS)
    found = {n: t for path in (tmp_path / "sharded").glob("*.safetensors") for n, t in load_file(path).items()}
    assert set(found) == set(whole)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def split(base: Path) -> None:
    """A base in two files: scales of even layers in another file than their blocks, of odd layers ahead of them."""
    tensors = load_file(base / WEIGHTS)
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, tensor in tensors.items():
        even = name.endswith("_scales") and int(name.split(".")[2]) % 2 == 0
        parts[not even][name] = tensor
    (base / WEIGHTS).unlink()
    where: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(part, base / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_too_little_kept_is_refused_and_then_written_all_the_same(adapter: Path, tmp_path: Path) -> None:
    rewrite(adapter, scaled(0.1))
    out = tmp_path / "out"
    with pytest.raises(ArtifactError) as raised:
        merge(str(adapter), str(out), format="mxfp4")
    told = str(raised.value)
    assert f"--keep-at-least asks for {KEEP_AT_LEAST:.1%}" in told
    assert "take --format bf16, or --format adapter" in told
    assert not out.exists()
    written = (tmp_path / ".out.partial" / WEIGHTS).stat().st_mtime_ns
    made = merge(str(adapter), str(out), format="mxfp4", keep_at_least=0.0).details["merge"]
    assert (out / WEIGHTS).stat().st_mtime_ns == written, "the work is not done twice"
    shares = {
        f"model.layers.{layer}.mlp.experts.{projection}": share
        for layer, kept in made["report"]["layers"].items()
        for projection, share in kept.items()
    }
    worst = min(shares, key=lambda name: shares[name])
    assert f"in MXFP4 {worst} keeps {shares[worst]:.1%} of the adapter's effect, the least of all" in told
    assert shares[worst] < KEEP_AT_LEAST
