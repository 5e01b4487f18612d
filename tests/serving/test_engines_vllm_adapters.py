"""Adapters beside one base in the engine over vLLM, against a double of vLLM: which request reaches which adapter."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from cluster.model import ModelShape
from serving.engines.base import CheckpointError, EngineError, Sampling
from tests.benchmarks.random_checkpoints import write_adapter
from tests.serving import vllm_double
from tests.serving.engine_harness import generate
from tests.serving.tiny import tiny_config, tiny_tokenizer
from tests.serving.vllm_double import inside, new_engine

NAMES = ("first", "second", "third")
LAYERS = "base_model.model.model.layers."
LAYER = f"{LAYERS}2."


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_double.install(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(tiny_config(tiny_tokenizer()).to_dict()))
    return base


def adapter_of(base: Path, folder: Path, rank: int = 12, **settings: Any) -> Path:
    write_adapter(folder, base, ModelShape.from_folder(base), rank)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def change(adapter: Path, names: dict[str, str | None]) -> None:
    """Rename tensors of an adapter, or leave them out."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for old, new in names.items():
        tensor = tensors.pop(old)
        if new is not None:
            tensors[new] = tensor
    save_file(tensors, path)


def greedy(adapter: str | None = None) -> Sampling:
    return Sampling(2, (), 0.0, adapter=adapter)


def test_an_adapter_beside_its_base_is_used(folder: Path) -> None:
    adapter_of(folder, folder / "adapter")
    engine = new_engine(folder)
    args = inside(engine).args
    assert (args.enable_lora, args.max_loras, args.max_lora_rank) == (True, 1, 16)

    async def run() -> list[list[int]]:
        return list(await asyncio.gather(*(generate(engine, [5], greedy()) for _ in range(3))))

    assert asyncio.run(run()) == [[13, 21]] * 3
    base, seen, *served = inside(engine).requests
    assert base[2] is None
    assert seen[2].lora_path == str(folder / "adapter")
    assert [adapter.lora_int_id for _, _, adapter in served] == [1, 1, 1]


@pytest.mark.parametrize("own", [False, True])
def test_each_request_reaches_the_adapter_that_it_names(folder: Path, tmp_path: Path, own: bool) -> None:
    if own:
        adapter_of(folder, folder / "adapter")
    folders = {name: adapter_of(folder, tmp_path / name, 8 + 10 * n) for n, name in enumerate(NAMES)}
    engine = new_engine(folder, folders)
    args = inside(engine).args
    assert (args.enable_lora, args.max_loras, args.max_lora_rank) == (True, 3 + own, 32)

    async def run() -> list[list[int]]:
        asked = (*NAMES, None, *reversed(NAMES))
        return list(await asyncio.gather(*(generate(engine, [5], greedy(name)) for name in asked)))

    said = asyncio.run(run())
    # The double's next token is one more than the last, and seven for each number of an adapter.
    firsts = dict(zip((*NAMES, None), (tokens[0] for tokens in said), strict=False))
    assert firsts == {name: 6 + 7 * (number + own) for number, name in enumerate(NAMES, 1)} | {None: 6 + 7 * own}
    assert [tokens[0] for tokens in said[4:]] == [firsts[name] for name in reversed(NAMES)]
    requests = inside(engine).requests[-7:]
    paths = [adapter and adapter.lora_path for _, _, adapter in requests]
    default = str(folder / "adapter") if own else None
    assert paths == [*map(str, folders.values()), default, *map(str, reversed(folders.values()))]
    named = [adapter.lora_name for adapter in inside(engine).added]
    assert len(set(named)) == len(named) == 3 + own, "vLLM keeps cached keys and values apart by name"


def test_an_adapter_that_the_engine_does_not_have_is_a_value_error(folder: Path, tmp_path: Path) -> None:
    engine = new_engine(folder, {"first": adapter_of(folder, tmp_path / "first")})
    with pytest.raises(ValueError, match="no adapter 'second'"):
        asyncio.run(generate(engine, [5], greedy("second")))
    assert engine.healthy()
    assert not inside(engine).requests


def test_without_adapters_none_is_looked_for(folder: Path) -> None:
    engine = new_engine(folder)
    asyncio.run(generate(engine, [5], greedy()))
    assert not inside(engine).args.enable_lora
    assert len(inside(engine).requests) == 1


@pytest.mark.parametrize("which", ["own", "first", "second"])
def test_an_adapter_that_changes_nothing_is_an_error(folder: Path, tmp_path: Path, which: str) -> None:
    folders = {name: adapter_of(folder, tmp_path / name) for name in ("first", "second")}
    own = adapter_of(folder, folder / "adapter")
    engine = new_engine(folder, folders)
    path = str((folders | {"own": own})[which])
    inside(engine).ignored = {path}

    async def run() -> None:
        results = await asyncio.gather(
            *(generate(engine, [5], greedy(name)) for name in ("first", "second", None)), return_exceptions=True
        )
        assert [type(result) for result in results] == [EngineError] * 3
        with pytest.raises(EngineError, match=f"as if it had no adapter {path}; merge it"):
            await generate(engine, [5], greedy())

    asyncio.run(run())
    assert not engine.healthy()


def test_an_adapter_that_vllm_does_not_load_is_an_error(folder: Path, tmp_path: Path) -> None:
    path = adapter_of(folder, tmp_path / "first")
    engine = new_engine(folder, {"first": path})
    inside(engine).unloadable = {str(path)}
    with pytest.raises(EngineError, match=rf"does not load the adapter {path} \(.*expected target modules\); merge it"):
        asyncio.run(generate(engine, [5], greedy()))
    assert not engine.healthy()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 12, "alpha_pattern": {"q_proj": 4}}, "alpha_pattern, which vLLM does not follow"),
        ({"r": 600}, "rank 600, and vLLM takes at most 512"),
        ({"r": None}, "no PEFT adapter's settings"),
    ],
)
@pytest.mark.parametrize("own", [False, True])
def test_settings_that_vllm_would_serve_wrongly_are_refused(
    folder: Path, tmp_path: Path, settings: dict[str, Any], message: str, own: bool
) -> None:
    path = adapter_of(folder, folder / "adapter" if own else tmp_path / "first", **settings)
    with pytest.raises(CheckpointError, match=message):
        new_engine(folder, {} if own else {"first": path})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({f"{LAYER}self_attn.k_proj.lora_B.weight": None}, r"holds .*k_proj\.lora_A\.weight and lacks .*lora_B"),
        (
            {f"{LAYER}mlp.experts.base_layer.lora_{x}.weight": None for x in "AB"},
            "adapts only one of gate_up_proj and down_proj where .*layers.2.*both or neither.*merge it",
        ),
        (
            {f"{LAYER}self_attn.q_proj.lora_A.weight": "base_model.model.lm_head.lora_A.weight"},
            r"holds base_model\.model\.lm_head.*the attention's linears and of experts alone",
        ),
        (
            {f"{LAYER}self_attn.q_proj.lora_A.weight": f"{LAYERS}9.self_attn.q_proj.lora_A.weight"},
            "made for another base .*layer 9, and that has 4 layers",
        ),
        (
            {
                f"{LAYER}self_attn.q_proj.lora_A.weight": f"{LAYER}self_attn.o_proj.lora_B.weight",
                f"{LAYER}self_attn.o_proj.lora_B.weight": None,
            },
            r"made for another base .*o_proj\.lora_B\.weight is \[12, 64\], and \[64, 12\] would fit",
        ),
    ],
)
def test_tensors_that_vllm_would_pass_over_or_fail_on_are_refused(
    folder: Path, names: dict[str, str | None], message: str
) -> None:
    adapter = adapter_of(folder, folder / "adapter")
    change(adapter, dict(reversed(names.items())))
    with pytest.raises(CheckpointError, match=message):
        new_engine(folder)


def test_an_adapter_of_some_layers_experts_is_taken(folder: Path) -> None:
    adapter = adapter_of(folder, folder / "adapter")
    change(adapter, {f"{LAYER}mlp.experts.{part}lora_{x}.weight": None for part in ("", "base_layer.") for x in "AB"})
    assert inside(new_engine(folder)).args.enable_lora


@pytest.mark.parametrize("content", [None, b"", b"\x08"])
def test_an_adapter_without_weights_is_refused(folder: Path, content: bytes | None) -> None:
    path = adapter_of(folder, folder / "adapter") / "adapter_model.safetensors"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors (is missing|cannot be read)"):
        new_engine(folder)
