"""Merging to bf16: equal to PEFT's own merge, and loadable by stock transformers."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cluster.artifacts import INDEX, WEIGHTS, ArtifactError, check_checkpoint, read_manifest
from cluster.storage import Storage, StorageError
from training.merge import job, merge
from training.merge.target import Written
from training.merge.together import write_together
from training.modeling.mxfp4 import dequantise

from .merging import ADAPTER, DEMO, PROMPT, adapt, demo, rewrite, scaled, zero

pytestmark = pytest.mark.usefixtures("one_thread")


def use_rslora(config: Any) -> None:
    config.use_rslora = True


def use_patterns(config: Any) -> None:
    """Of keys that overlap the first counts; a key may be a regular expression, and is held against whole names."""
    config.rank_pattern = {
        r"layers\.[01]\.self_attn\.q_proj": 2,
        "q_proj": 3,
        "layers.1.mlp.experts.down_proj": 6,
        "experts.gate_up_proj": 1,
        "proj": 7,
    }
    config.alpha_pattern = {
        "v_proj": 20,
        r".*\.0\.mlp\.experts\..*": 3.5,
        "model.layers.2.self_attn.k_proj": 9,
        "gate_up": 100,
    }


def use_patterns_and_rslora(config: Any) -> None:
    use_patterns(config)
    use_rslora(config)


def router_and_head(config: Any) -> None:
    """Parameters that are matrices, and a module beside the layers'."""
    config.target_modules = ["q_proj", "lm_head"]
    config.target_parameters = ["layers.1.mlp.router.weight", *(config.target_parameters or [])]
    config.rank_pattern = {"router.weight": 2, "router": 5, "lm_head": 3}


def only_gate_up(config: Any) -> None:
    config.target_parameters = ["layers.2.mlp.experts.gate_up_proj"]


def only_down(config: Any) -> None:
    config.target_parameters = ["layers.2.mlp.experts.down_proj"]


def both_and_one(config: Any) -> None:
    """Layer 0 nests its factors and layer 1 does not."""
    gate_up = ["layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.gate_up_proj"]
    config.target_parameters = ["layers.0.mlp.experts.down_proj", *gate_up]


CASES: dict[str, dict[str, Any]] = {
    "all layers": {"rank": 4},
    "rsLoRA": {"rank": 4, "change": use_rslora, "scale": 0.02},
    "patterns": {"rank": 4, "change": use_patterns, "scale": 0.03},
    "patterns and rsLoRA": {"rank": 4, "change": use_patterns_and_rslora, "scale": 0.02},
    "router and head": {"rank": 4, "expert_layers": (1,), "change": router_and_head},
    "attention": {"rank": 3, "alpha": 5.0, "expert_layers": ()},
    "gate_up of one layer": {"rank": 2, "attention": False, "change": only_gate_up},
    "down of one layer": {"rank": 2, "attention": False, "change": only_down},
    "both of one layer, gate_up of another": {"rank": 2, "change": both_and_one},
    "experts of two layers": {"rank": 1, "attention": False, "expert_layers": (0, 5)},
}


LOADED = ("all layers", "rsLoRA", "attention", "both of one layer, gate_up of another")
"""cases whose merge is run by stock transformers as well"""


class Merged:
    """One adapter, merged by PEFT on the fp32 base and by us."""

    def __init__(self, root: Path, case: dict[str, Any]) -> None:
        self.folder, self.adapter = root / "merged", root / "adapter"
        model = adapt(demo(), self.adapter, **case)
        with torch.no_grad():
            self.logits = model(PROMPT).logits
        self.expected = {name: weight.detach() for name, weight in model.merge_and_unload().named_parameters()}
        merge(str(self.adapter), str(self.folder))
        self.tensors = load_file(self.folder / WEIGHTS)


@pytest.fixture(scope="module", params=list(CASES))
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    return Merged(tmp_path_factory.mktemp("case"), CASES[request.param])


@pytest.fixture(scope="module")
def base_weights() -> dict[str, torch.Tensor]:
    """The demo checkpoint with its experts dequantised, in bf16."""
    stored = load_file(DEMO / WEIGHTS)
    for name in [name for name in stored if name.endswith("_blocks")]:
        prefix = name.removesuffix("_blocks")
        stored[prefix] = dequantise(stored.pop(name), stored.pop(f"{prefix}_scales"))
    return {name: weight.to(torch.bfloat16) for name, weight in stored.items()}


@pytest.fixture(scope="module")
def one_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapt(demo(), folder, rank=2, expert_layers=(1,))
    return folder


@pytest.fixture
def adapter(one_adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(one_adapter, tmp_path / "adapter"))


def test_equals_pefts_merge(merged: Merged, base_weights: dict[str, torch.Tensor]) -> None:
    assert set(merged.tensors) == set(merged.expected)
    changed = 0
    for name, expected in merged.expected.items():
        weight = merged.tensors[name]
        assert weight.dtype == torch.bfloat16
        rounded = expected.to(torch.bfloat16)
        # fp32 sums in another order may fall on the other side of a rounding boundary: one step of bf16, rarely.
        near = (weight.float() - expected).abs() <= rounded.float().abs() * 2.0**-8 + 1e-7
        assert near.all(), name
        assert (weight != rounded).float().mean() < 1e-3, name
        changed += not torch.equal(weight, base_weights[name])
    assert changed == len({name.rpartition(".lora_")[0] for name in load_file(merged.adapter / ADAPTER)})


@pytest.mark.parametrize("merged", LOADED, indirect=True)
def test_stock_transformers_loads_it(merged: Merged) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(
        merged.folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    with torch.no_grad():
        logits = model(PROMPT).logits
        rounded = demo()
        rounded.load_state_dict({name: weight.to(torch.bfloat16).float() for name, weight in merged.expected.items()})
        assert torch.allclose(logits, rounded(PROMPT).logits, atol=2e-2, rtol=0)
        base = demo()(PROMPT).logits
    # The median: where bf16 turns a router's choice, a token's logits differ for another reason.
    effect = (base - merged.logits).abs().median()
    assert (logits - merged.logits).abs().median() < 0.2 * effect


def test_the_folder_is_a_checkpoint_with_a_manifest(merged: Merged) -> None:
    assert not check_checkpoint(merged.folder).packed
    manifest = read_manifest(merged.folder, "checkpoint")
    assert manifest.base == str(DEMO)
    assert manifest.details["adapter"] == read_manifest(merged.adapter, "adapter").model_dump(mode="json")
    assert manifest.details["format"] == "bf16"
    assert manifest.details["merge"]["device"] == "cpu"
    copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert set(manifest.files) == {"config.json", WEIGHTS, *copied}
    assert all((merged.folder / name).read_bytes() == (DEMO / name).read_bytes() for name in copied)
    assert not [path for path in merged.folder.parent.iterdir() if path.name.startswith(".")]
    settings = json.loads((merged.folder / "config.json").read_text())
    expected = json.loads((DEMO / "config.json").read_text()) | {"dtype": "bfloat16"}
    del expected["quantization_config"]
    assert settings == expected


def test_zero_adapter_gives_the_base(adapter: Path, base_weights: dict[str, torch.Tensor]) -> None:
    rewrite(adapter, zero)
    merge(str(adapter), str(adapter.parent / "out"))
    merged = load_file(adapter.parent / "out" / WEIGHTS)
    assert set(merged) == set(base_weights)
    for name, weight in merged.items():
        assert torch.equal(weight, base_weights[name]), name


def test_unpacked_base(adapter: Path) -> None:
    """A merged checkpoint is a base like another: merging A over A is merging 2·A, up to the rounding between."""
    once, twice = adapter.parent / "once", adapter.parent / "twice"
    merge(str(adapter), str(once))
    merge(str(adapter), str(twice), base=str(once))
    rewrite(adapter, scaled(2))
    merge(str(adapter), str(adapter.parent / "double"))
    double = load_file(adapter.parent / "double" / WEIGHTS)
    for name, weight in load_file(twice / WEIGHTS).items():
        assert torch.allclose(weight.float(), double[name].float(), rtol=2.0**-6, atol=2e-3), name
    assert read_manifest(twice, "checkpoint").base == str(once)


def test_shards(adapter: Path) -> None:
    whole, sharded = adapter.parent / "whole", adapter.parent / "sharded"
    merge(str(adapter), str(whole))
    limit = 6 * 2**20
    merge(str(adapter), str(sharded), shard_bytes=limit)
    expected = load_file(whole / WEIGHTS)
    shards = sorted(sharded.glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]
    assert len(shards) >= 4
    assert all(path.stat().st_size < limit + 2**16 for path in shards)
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in expected.values())
    found = {name: (path.name, weight) for path in shards for name, weight in load_file(path).items()}
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    assert set(found) == set(expected)
    assert all(torch.equal(weight, expected[name]) for name, (_, weight) in found.items())
    check_checkpoint(sharded)
    read_manifest(sharded, "checkpoint")
    model = AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.bfloat16)
    assert all(torch.equal(weight, expected[name]) for name, weight in model.named_parameters())


def test_a_tensor_larger_than_a_shard_has_its_own(adapter: Path) -> None:
    merge(str(adapter), str(adapter.parent / "out"), shard_bytes=1)
    shards = list((adapter.parent / "out").glob("*.safetensors"))
    assert len(shards) == len(check_checkpoint(adapter.parent / "out").tensor_names())


def test_what_stands_there_is_replaced_only_when_asked(adapter: Path) -> None:
    out = adapter.parent / "out"
    out.mkdir()
    (out / "model-00001-of-00002.safetensors").write_text("old")
    with pytest.raises(ArtifactError, match=r"out is not empty, and .* give --overwrite to replace it"):
        merge(str(adapter), str(out))
    assert [path.name for path in out.iterdir()] == ["model-00001-of-00002.safetensors"]
    merge(str(adapter), str(out), overwrite=True)
    listed = set(read_manifest(out, "checkpoint").files)
    assert {path.name for path in out.iterdir()} == listed | {"manifest.json", "README.md"}


def test_files_beside_each_other_are_the_same(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine of many cores."""
    alone, together = adapter.parent / "alone", adapter.parent / "together"
    merge(str(adapter), str(alone), shard_bytes=6 * 2**20)
    begun: list[str] = []
    inner = job.Job.write_file

    def noted(self: job.Job, folder: Storage, name: str, threads: int, told: job.Told) -> Written:
        begun.append(name)
        return inner(self, folder, name, threads, told)

    monkeypatch.setattr(job, "files_at_once", lambda _options: 2)
    monkeypatch.setattr(job.Job, "write_file", noted)
    merge(str(adapter), str(together), shard_bytes=6 * 2**20)
    assert len(begun) > 3
    one, two = (read_manifest(folder, "checkpoint").files for folder in (alone, together))
    assert {name: one[name] for name in begun} == {name: two[name] for name in begun}


def test_after_an_error_no_file_beside_it_goes_on() -> None:
    told: list[int] = []
    going = threading.Event()

    def write(name: str, tell: job.Told) -> Written:
        if name == "bad":
            going.wait(30)
            raise StorageError("the disk is full")
        while True:
            tell(1)
            going.set()
            time.sleep(0.01)

    with pytest.raises(StorageError, match="the disk is full"):
        list(write_together(["endless", "bad", "never"], write, 2, told.append))
    assert told
