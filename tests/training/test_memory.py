"""The choice of activation checkpointing, and the arithmetic against what the engine allocates."""

from __future__ import annotations

import pytest
import torch

from cluster.config import ConfigError
from cluster.hardware import GIB, PROFILES
from cluster.memory import CHUNK_TOKENS, EXTRA_COLUMNS, MARGIN, MODES
from cluster.model import GPT_OSS_20B, GPT_OSS_120B, Checkpointing, ModelShape
from training.config import TrainingConfig
from training.memory import choose_checkpointing, memory_of, needed_bytes
from training.modeling import experts_ops, rows
from training.modeling.adapters import attach_adapters
from training.modeling.base import load_base
from training.modeling.matrices import Factors, Weight, matrix
from training.modeling.packed import PackedExperts

DEMO_MODEL = "training/demo/model"


def configured(**fields: object) -> TrainingConfig:
    """gpt-oss-20b with `section__field` set."""
    sections: dict[str, dict[str, object]] = {"model": {"path": "openai/gpt-oss-20b"}}
    for name, value in fields.items():
        section, _, field = name.partition("__")
        sections.setdefault(section, {})[field] = value
    return TrainingConfig.model_validate(sections)


def gpu(name: str) -> int:
    return next(profile.memory_bytes for profile in PROFILES if profile.name == name)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_that_is_set_is_taken(mode: str) -> None:
    config = configured(batch__activation_checkpointing=mode)
    assert choose_checkpointing(config, GPT_OSS_20B, None)[0] == mode
    chosen, why = choose_checkpointing(config, GPT_OSS_20B, 1 * GIB)
    assert chosen == mode
    assert "which does not fit by arithmetic" in why
    assert "does not fit" not in choose_checkpointing(config, GPT_OSS_20B, gpu("H200"))[1]


def test_auto_is_none_on_a_cpu() -> None:
    chosen, why = choose_checkpointing(configured(workers__gpus=0), GPT_OSS_120B, None)
    assert (chosen, why) == ("none", "none: there is no GPU to fit")


def test_auto_on_a_gpu_asks_for_its_memory() -> None:
    with pytest.raises(ValueError, match="needs the memory of the GPU"):
        choose_checkpointing(configured(), GPT_OSS_20B, None)


@pytest.mark.parametrize(("name", "mode"), [("H100", "none"), ("A100-40G", "none"), ("RTX-4090", "full")])
def test_auto_takes_the_first_that_fits(name: str, mode: str) -> None:
    """The default batch, 4 rows of 2048 tokens, on gpt-oss-20b: 36, 27 and 19 GiB."""
    chosen, why = choose_checkpointing(configured(), GPT_OSS_20B, gpu(name))
    assert chosen == mode
    assert why.startswith(f"{mode}: auto, ")
    assert why.endswith(f" of {gpu(name) / GIB:.1f} GiB")


@pytest.mark.parametrize("mode", MODES)
def test_the_margin_is_kept_to_the_byte(mode: Checkpointing) -> None:
    config = configured()
    needed = needed_bytes(config, GPT_OSS_20B, mode)
    assert needed == round(memory_of(config, GPT_OSS_20B, mode).total * (1 + MARGIN))
    assert choose_checkpointing(config, GPT_OSS_20B, needed)[0] == mode
    if mode == "full":
        with pytest.raises(ConfigError):
            choose_checkpointing(config, GPT_OSS_20B, needed - 1)
    else:
        assert choose_checkpointing(config, GPT_OSS_20B, needed - 1)[0] == MODES[MODES.index(mode) + 1]


def test_what_does_not_fit_is_one_sentence_with_remedies() -> None:
    config = configured(model__base_precision="bf16", batch__micro_batch_size=8)
    with pytest.raises(ConfigError) as caught:
        choose_checkpointing(config, GPT_OSS_20B, gpu("L40S"))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(
        'openai/gpt-oss-20b needs 50.3 GiB even with activation_checkpointing = "full", and the GPU has 44.3 GiB '
        "(weights 39.0 GiB, "
    )
    assert 'model.base_precision = "bf16", batch.micro_batch_size = 8 and data.sequence_length = 2048)' in message
    assert message.endswith(': set model.base_precision = "mxfp4" (22.6 GiB), or use a GPU with more memory')


def test_remedies_that_do_not_help_are_not_recommended() -> None:
    config = configured(batch__micro_batch_size=2)
    with pytest.raises(ConfigError) as caught:
        choose_checkpointing(config, GPT_OSS_120B, gpu("L40S"))
    message = str(caught.value)
    assert "set " not in message
    assert (
        "batch.micro_batch_size = 1 (78.1 GiB) or data.sequence_length = 1024 (78.1 GiB) would not be enough" in message
    )
    assert message.endswith("so use a GPU with more memory")


def test_a_remedy_does_what_it_says() -> None:
    config = configured(batch__micro_batch_size=16)
    with pytest.raises(ConfigError, match=r"set batch\.micro_batch_size = 1 \(17\.8 GiB\)"):
        choose_checkpointing(config, GPT_OSS_20B, gpu("RTX-4090"))
    assert choose_checkpointing(configured(batch__micro_batch_size=1), GPT_OSS_20B, gpu("RTX-4090"))[0] == "none"


def test_a_layer_that_the_model_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match="names layer 24, and openai/gpt-oss-20b has layers 0 to 23"):
        choose_checkpointing(configured(lora__expert_layers=(3, 24)), GPT_OSS_20B, gpu("H200"))


@pytest.mark.parametrize(
    ("setting", "value", "parts"),
    [
        ("model__base_precision", "bf16", {"weights"}),
        ("workers__count", 2, {"adapters"}),
        ("lora__expert_layers", (), {"adapters"}),
        ("loss__chunk_tokens", 512, {"loss"}),
        ("batch__activation_offload", True, {"activations"}),
        ("batch__accumulation_steps", 16, set()),
        ("model__attention", "eager", {"activations", "transient"}),
        ("data__sequence_length", 1024, {"activations", "transient", "loss"}),
        ("batch__micro_batch_size", 2, {"activations", "transient", "loss"}),
    ],
)
def test_a_setting_changes_its_part(setting: str, value: object, parts: set[str]) -> None:
    base = memory_of(configured(), GPT_OSS_20B, "none")
    other = memory_of(configured(**{setting: value}), GPT_OSS_20B, "none")
    assert {part for part in vars(base) if getattr(base, part) != getattr(other, part)} == parts


def test_sharing_the_base_changes_what_is_held_of_it_and_adds_what_is_gathered() -> None:
    base, shared = (memory_of(configured(), GPT_OSS_20B, "none", shards) for shards in (1, 4))
    assert {part for part in vars(base) if getattr(base, part) != getattr(shared, part)} == {"weights", "gathered"}
    assert base.gathered == 0
    assert "gathered layers" not in str(base)
    assert shared.total == base.total - base.weights + shared.weights + shared.gathered
    assert str(shared).startswith("weights 4.8 GiB, gathered layers 1.3 GiB, adapters ")


def test_the_mode_is_chosen_for_a_number_of_shards() -> None:
    """gpt-oss-120b on an H100: not whole, and with "experts" where two share it."""
    config = configured(workers__count=2)
    chosen, why = choose_checkpointing(config, GPT_OSS_120B, gpu("H100"), shards=2)
    assert (chosen, why) == ("experts", "experts: auto, 68.7 GiB of 79.1 GiB")
    with pytest.raises(ConfigError) as caught:
        choose_checkpointing(config, GPT_OSS_120B, gpu("A100-40G"), shards=2)
    assert 'activation_checkpointing = "full" and its layers shared by 2 workers, and the GPU has 39.3 GiB' in str(
        caught.value
    )


def test_long_micro_batches_pass_through_the_experts_in_chunks() -> None:
    """Beyond a chunk pre-activations are never kept, and of the rows only the stream's 2 · T · H grow."""
    one, two = (configured(batch__micro_batch_size=rows) for rows in (17, 34))
    assert CHUNK_TOKENS < 17 * 2048
    assert memory_of(one, GPT_OSS_20B, "none") == memory_of(one, GPT_OSS_20B, "experts")
    more = memory_of(two, GPT_OSS_20B, "none").transient - memory_of(one, GPT_OSS_20B, "none").transient
    assert more == 2 * 17 * 2048 * 2880 * 2


def test_merging_experts_costs_what_merging_costs() -> None:
    """PEFT's merged weights stay for the backward pass: without checkpointing a second copy of the adapted experts."""
    apart = configured(model__base_precision="bf16")
    merging = configured(model__base_precision="bf16", model__experts="grouped_mm")
    more = memory_of(merging, GPT_OSS_20B, "none").activations - memory_of(apart, GPT_OSS_20B, "none").activations
    assert more > 2 * GPT_OSS_20B.expert_parameters
    few = configured(model__base_precision="bf16", model__experts="grouped_mm", lora__expert_layers=(7, 15, 23))
    less = memory_of(merging, GPT_OSS_20B, "none").activations - memory_of(few, GPT_OSS_20B, "none").activations
    assert less == pytest.approx(2 * GPT_OSS_20B.expert_parameters * 21 / 24)


@pytest.mark.parametrize(("mode", "gigabytes"), [("none", 69.7), ("full", 45.7)])
def test_the_arithmetic_covers_a_measured_step(mode: Checkpointing, gigabytes: float) -> None:
    """Peaks of one H100: gpt-oss-20b in bf16, 4 rows of 2048 tokens, layers compiled, flex attention, chunked loss,
    adapters of rank 8 on attention and, merged by PEFT, on three layers' experts."""
    layers = (7, 15, 23)
    config = configured(model__base_precision="bf16", model__experts="grouped_mm", lora__expert_layers=layers)
    total = memory_of(config, GPT_OSS_20B, mode).total / 1e9
    assert gigabytes < total < 1.1 * gigabytes


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return ModelShape.from_folder(DEMO_MODEL)


@pytest.mark.parametrize("base_precision", ["mxfp4", "fp32"])
def test_weights_are_what_the_loaded_base_takes(shape: ModelShape, base_precision: str) -> None:
    config = configured(model__precision="fp32", model__base_precision=base_precision, model__path=DEMO_MODEL)
    model = load_base(config.model, torch.device("cpu"))
    taken = sum(parameter.nbytes for parameter in model.parameters())
    assert memory_of(config, shape, "none").weights == taken


@pytest.mark.parametrize("rank", [3, 8])
def test_the_passing_matrix_is_the_engines(shape: ModelShape, rank: int) -> None:
    config = configured(model__precision="bf16", lora__rank=rank)
    experts, outputs = shape.num_local_experts, 2 * shape.intermediate_size
    weight = Weight(
        torch.zeros(experts, shape.hidden_size, outputs, dtype=torch.bfloat16),
        None,
        torch.zeros(experts, outputs, dtype=torch.bfloat16),
    )
    factors = Factors.of(
        torch.zeros(experts * rank, shape.hidden_size),
        torch.zeros(outputs, rank * experts),
        1.0,
        experts,
        torch.bfloat16,
    )
    passing = matrix(weight, factors, torch.bfloat16, below=True)
    assert memory_of(config, shape, "none").dequantised == passing.nbytes


def test_constants_are_the_engines() -> None:
    assert (CHUNK_TOKENS, EXTRA_COLUMNS) == (experts_ops.CHUNK_TOKENS, rows.EXTRA)


def saved_bytes(model: torch.nn.Module, tokens: torch.Tensor) -> int:
    """Bytes that autograd keeps of a forward pass, each storage once, parameters left out."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=tokens, logits_to_keep=1, use_cache=False).logits
    assert output.requires_grad
    return sum(kept.values())


def test_recomputing_experts_saves_what_the_arithmetic_says(shape: ModelShape) -> None:
    config = configured(
        model__precision="fp32", model__path=DEMO_MODEL, data__sequence_length=32, batch__micro_batch_size=2
    )
    base = load_base(config.model, torch.device("cpu"))
    model = attach_adapters(base, config.lora)
    tokens = torch.arange(2 * 32).view(2, 32)
    everything = saved_bytes(model, tokens)
    for layer in base.model.layers:
        experts = layer.mlp.experts
        while not isinstance(experts, PackedExperts):
            experts = experts.base_layer
        experts.recompute = True
    saved = everything - saved_bytes(model, tokens)
    kept, recomputed = (memory_of(config, shape, mode).activations for mode in ("none", "experts"))
    assert saved == kept - recomputed
    assert everything > kept  # an uncompiled layer keeps more
