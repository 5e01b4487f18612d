"""The trainer's loss: the mean over a step's trained tokens, however its rows are dealt out, and what it logs."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, TrainerCallback
from transformers.models.gpt_oss.modeling_gpt_oss import load_balancing_loss_func
from trl import SFTConfig, SFTTrainer

from cluster.harmony import Label
from tests.training.packed import tiny_model
from tests.training.processes import spawn_workers, take_place
from training.data.collator import IGNORED, Collator
from training.modeling.isolation import isolate_documents
from training.trainer import WeightedTrainer

TOKENIZER = "training/demo/model"
TRAINED = (40, 1, 2, 30, 0, 3, 25, 1)
"""trained tokens of each row, so uneven that a mean of micro-batches' means is another number"""
HELD_OUT = (3, 30, 1, 12, 40)
LANGUAGES = ("de", "fr")
TOKENS = (3, 56, 59, 80, 87, 90)
"""the tiny model's favourites, so that some are the likeliest where they stand"""
WEIGHTS = {"analysis": 0.5, "final": 2.0}
PLAIN = {"analysis": 1.0, "final": 1.0}


def make_rows(trained: tuple[int, ...] = TRAINED, seed: int = 0, size: int = 52) -> list[dict[str, Any]]:
    """Rows of `size` tokens in two documents, the second of five tokens and without labels."""
    rng = np.random.default_rng(seed)
    made = []
    for count in trained:
        asked = [Label.USER] * (size - 5 - count)
        labels = [*asked, *[Label.ANALYSIS] * (count // 2), *[Label.FINAL] * (count - count // 2), *[Label.USER] * 5]
        tokens = rng.choice(TOKENS, size).astype(np.int32)
        made.append({"tokens": tokens, "labels": np.array(labels, np.uint8), "lengths": [size - 5, 5], "size": size})
    return made


def make_uneven_rows() -> list[dict[str, Any]]:
    """Rows of 20, 35 and 50 tokens, so that two of them are padded."""
    return [row for size in (20, 35, 50) for row in make_rows((size // 3,), seed=size, size=size)]


def build(folder: Path, kind: type[Any] = WeightedTrainer, weights: dict[str, float] = WEIGHTS, **keywords: Any) -> Any:
    """A trainer on a tiny gpt-oss in fp32, with random adapters of stock PEFT's on attention and experts."""
    settings = {name: keywords.pop(name) for name in list(keywords) if name in SFTConfig.__dataclass_fields__}
    model = tiny_model()
    isolate_documents(model)
    adapters = LoraConfig(
        r=4,
        init_lora_weights=False,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["layers.1.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"],
    )
    fixed: dict[str, Any] = {
        "output_dir": str(folder),
        "router_aux_loss_coef": 0.0,
        "max_length": None,
        "max_grad_norm": 0.0,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "report_to": [],
        "save_strategy": "no",
        "max_steps": 1,
        "logging_steps": 1,
        "ddp_find_unused_parameters": False,
    }
    if issubclass(kind, WeightedTrainer):
        keywords["languages"] = LANGUAGES
    off = dict.fromkeys(("bf16", "remove_unused_columns", "gradient_checkpointing"), False)
    return kind(
        model=model,
        args=SFTConfig(**{**fixed, **off, "use_cpu": True, "disable_tqdm": True, **settings}),
        train_dataset=Dataset.from_list(make_rows()),
        eval_dataset=Dataset.from_list(spoken_rows()),
        data_collator=Collator(weights),
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
        peft_config=adapters,
        **keywords,
    )


def spoken_rows() -> list[dict[str, Any]]:
    """Held-out rows whose documents speak the languages in turn."""
    rows = make_rows(HELD_OUT, seed=1)
    return [
        row | {"languages": [(number + place) % 2 for place in range(len(row["lengths"]))]}
        for number, row in enumerate(rows)
    ]


class Gradients(TrainerCallback):
    """Keeps the gradients that the optimizer is about to use."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *arguments: Any, model: Any = None, **keywords: Any) -> None:
        self.values = gradients_of(model)


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("module."): weight.grad.clone()
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


class Step(NamedTuple):
    gradients: dict[str, torch.Tensor]
    logs: dict[str, float]
    evaluation: dict[str, float]


def take_step(folder: Path, micro_batch: int, accumulation: int, **keywords: Any) -> Step:
    """One optimizer step of a new trainer, its line in the log, and an evaluation of what came out."""
    batch: dict[str, Any] = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
    trainer = build(folder, **batch, per_device_eval_batch_size=2, **keywords)
    kept = Gradients()
    trainer.add_callback(kept)
    trainer.train()
    evaluation = trainer.evaluate()
    return Step(kept.values, trainer.state.log_history[0], evaluation)


def assert_same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    """Each adapter's gradient, relative to its norm."""
    assert one.keys() == other.keys()
    for name in one:
        scale = float(one[name].norm())
        assert scale > 0
        assert float((one[name] - other[name]).norm()) <= tolerance * scale, name


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Step:
    """All 8 rows in one micro-batch of one worker."""
    return take_step(tmp_path_factory.mktemp("whole"), 8, 1)


def by_hand(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int, int]:
    """Σ weight · negative log-likelihood from plain logits, trained tokens, and those that are the likeliest."""
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    weights = batch.get("loss_weights", torch.ones_like(batch["labels"]))[:, 1:]
    each = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    return (each * weights).sum(), int((labels != IGNORED).sum()), int((logits.argmax(-1) == labels).sum())


@pytest.mark.parametrize("weights", [WEIGHTS, {"analysis": 0.5, "final": 0.5}, PLAIN, {"final": 1.0}])
def test_loss_and_gradients_are_plain_cross_entropys(trainer: Any, weights: dict[str, float]) -> None:
    batch = Collator(weights)(make_rows() + make_uneven_rows())
    trainer.model.train()
    trainer.model.zero_grad()
    total, trained, _ = by_hand(trainer.model, batch)
    (total / trained).backward()
    wanted = gradients_of(trainer.model)
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    assert loss.item() == pytest.approx(total.item() / trained, rel=1e-6)
    assert_same(wanted, gradients_of(trainer.model), 2e-6)


def test_the_loss_is_trls_where_nothing_is_weighed(tmp_path: Path) -> None:
    batch = Collator(PLAIN)(make_rows())
    losses, gradients = [], []
    for kind in (SFTTrainer, WeightedTrainer):
        one = build(tmp_path, kind, PLAIN)
        one.model.train()
        loss = one.compute_loss(one.model, dict(batch), num_items_in_batch=torch.tensor(150))
        loss.backward()
        losses.append(loss.item())
        gradients.append(gradients_of(one.model))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert_same(gradients[0], gradients[1], 2e-6)


def test_doubling_the_weights_doubles_the_loss(trainer: Any) -> None:
    trainer.model.train()
    with torch.no_grad():
        once, twice = (
            trainer.compute_loss(trainer.model, Collator({"analysis": factor, "final": factor})(make_rows()))
            for factor in (1.0, 2.0)
        )
    assert float(twice) == pytest.approx(2 * float(once), rel=1e-6)


def test_no_document_is_predicted_from_the_one_before_it() -> None:
    """Even where all tokens are trained, the first of each document and of the padding has no label."""
    rows = make_uneven_rows()
    for row in rows:
        row["labels"] = np.full(len(row["labels"]), Label.FINAL, np.uint8)
    batch = Collator(PLAIN)(rows)
    assert ((batch["position_ids"] == 0) & (batch["labels"] != IGNORED)).sum() == 0
    assert int((batch["labels"] != IGNORED).sum()) == sum(length - 1 for row in rows for length in row["lengths"])


def test_one_times_eight_is_eight_times_one(tmp_path: Path, whole: Step) -> None:
    """A row without trained tokens is among them, so one of the eight micro-batches has no loss."""
    apart = take_step(tmp_path, 1, 8)
    assert apart.logs["loss"] == pytest.approx(whole.logs["loss"], rel=1e-6)
    assert_same(whole.gradients, apart.gradients)
    for name in ("mean_token_accuracy", "grad_norm"):
        assert apart.logs[name] == pytest.approx(whole.logs[name], rel=1e-6)


def test_a_mean_of_micro_batches_means_would_be_another_loss(trainer: Any, whole: Step) -> None:
    """What the comparisons of this file would find if tokens were not counted over the whole step."""
    batches = [Collator(WEIGHTS)([row]) for row in make_rows()]
    with torch.no_grad():
        naive = np.mean([float(total) / max(1, n) for total, n, _ in (by_hand(trainer.model, b) for b in batches)])
    assert abs(naive / whole.logs["loss"] - 1) > 1e-3


def test_the_log_holds_the_steps_own_figures(trainer: Any, whole: Step) -> None:
    with torch.no_grad():
        batch = Collator(WEIGHTS)(make_rows())
        total, trained, hits = by_hand(trainer.model, batch)
    assert trained == sum(TRAINED)
    assert 0 < hits < trained
    assert whole.logs["loss"] == pytest.approx(float(total) / trained, rel=1e-6)
    assert whole.logs["mean_token_accuracy"] == pytest.approx(hits / trained)
    assert whole.logs["num_tokens"] == batch["labels"].numel()
    assert not {"entropy", "aux_loss"} & whole.logs.keys()


def test_evaluation_counts_each_held_out_token_alike(trainer: Any) -> None:
    trainer.args.per_device_eval_batch_size = 2
    found = trainer.evaluate()
    rows = make_rows(HELD_OUT, seed=1)
    with torch.no_grad():
        total, trained, hits = by_hand(trainer.model, Collator(WEIGHTS)(rows))
        batches = [Collator(WEIGHTS)(rows[start : start + 2]) for start in range(0, len(rows), 2)]
        means = [float(part) / n for part, n, _ in (by_hand(trainer.model, batch) for batch in batches)]
    assert found["eval_loss"] == pytest.approx(float(total) / trained, rel=1e-6)
    assert abs(np.mean(means) / found["eval_loss"] - 1) > 1e-3
    assert 0 < hits < trained
    assert found["eval_mean_token_accuracy"] == pytest.approx(hits / trained)
    assert trainer.state.log_history[-1]["eval_loss"] == found["eval_loss"]


def test_evaluation_says_the_loss_of_each_language(trainer: Any) -> None:
    trainer.args.per_device_eval_batch_size = 2
    found = trainer.evaluate()
    batch = Collator(WEIGHTS)(spoken_rows())
    spoken = batch.pop("languages")
    whole = 0.0
    for place, tag in enumerate(LANGUAGES):
        own = batch | {"labels": batch["labels"].masked_fill(spoken != place, -100)}
        with torch.no_grad():
            total, trained, _ = by_hand(trainer.model, own)
        assert trained > 0
        assert found[f"eval_loss_{tag}"] == pytest.approx(float(total) / trained, rel=1e-6)
        whole += float(total)
    assert abs(found["eval_loss_de"] / found["eval_loss_fr"] - 1) > 1e-3
    assert whole == pytest.approx(found["eval_loss"] * int((batch["labels"] != -100).sum()), rel=1e-6)


def test_a_micro_step_exchanges_nothing(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("a micro-step reached for the other workers")

    for name in ("gather", "gather_for_metrics", "reduce"):
        monkeypatch.setattr(trainer.accelerator, name, refuse)
    trainer.model.train()
    trainer.compute_loss(trainer.model, Collator(WEIGHTS)(make_rows()), num_items_in_batch=torch.tensor(9))
    with pytest.raises(AssertionError, match="reached"):
        trainer.log({})


class Spy(torch.nn.Module):
    """Wraps a model as data parallelism does, and keeps what came out."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.outputs: list[Any] = []

    def forward(self, **inputs: Any) -> Any:
        self.outputs.append(self.module(**inputs))
        return self.outputs[-1]


def test_the_wrapped_model_is_called_and_projects_nothing(trainer: Any) -> None:
    batch = Collator(WEIGHTS)(make_rows())
    spy = Spy(trainer.model).train()
    trainer.compute_loss(spy, batch)
    (outputs,) = spy.outputs
    assert outputs.logits.numel() == 0
    assert outputs.router_logits is None
    logits = trainer.model(input_ids=batch["input_ids"]).logits
    assert logits.shape == (*batch["input_ids"].shape, 97)


def test_a_forward_pass_that_fails_leaves_the_head_as_it_was(trainer: Any) -> None:
    class Fails(Spy):
        def forward(self, **inputs: Any) -> Any:
            raise RuntimeError("out of memory")

    head = trainer.model.get_output_embeddings()
    before = len(head._forward_pre_hooks)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.compute_loss(Fails(trainer.model), Collator(WEIGHTS)(make_rows()))
    assert len(head._forward_pre_hooks) == before


def balance_by_hand(trainer: Any, rows: list[dict[str, Any]]) -> float:
    """transformers' balancing loss over the tokens that the rows really have, and a mask from their sizes."""
    batch = Collator(WEIGHTS)(rows)
    mask = torch.zeros_like(batch["input_ids"])
    for index, row in enumerate(rows):
        mask[index, : row["size"]] = 1
    assert not mask.all()
    with torch.no_grad():
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        logits = trainer.model(**inputs, output_router_logits=True).router_logits
        masked, unmasked = (float(load_balancing_loss_func(logits, 4, 2, each)) for each in (mask, None))
    assert abs(masked / unmasked - 1) > 1e-4
    return masked


@pytest.mark.parametrize("steps", [1, 4])
def test_router_balance_adds_its_share(trainer: Any, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    rows = make_uneven_rows()
    batch = Collator(WEIGHTS)(rows)
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", steps, raising=False)
    items = {"num_items_in_batch": torch.tensor(100)}
    trained = int((batch["labels"] != IGNORED).sum())
    trainer.model.train()
    with torch.no_grad():
        without = trainer.compute_loss(trainer.model, dict(batch), **items)
        monkeypatch.setattr(trainer, "router_balance", 0.3)
        balanced = trainer.compute_loss(trainer.model, dict(batch), **items)
        trainer.model.eval()
        held_out = trainer.compute_loss(trainer.model, dict(batch))
    assert float(balanced - without) == pytest.approx(0.3 * balance_by_hand(trainer, rows) / steps, rel=1e-5)
    assert float(held_out) == pytest.approx(float(without) * 100 / trained, rel=1e-6)


def test_router_balance_reaches_the_adapters_with_and_without_checkpointing(tmp_path: Path, whole: Step) -> None:
    """Those before the last router, that is: the adapted experts are the last layer's, so theirs stay as they were."""
    kept = [
        take_step(tmp_path, 8, 1, router_balance=0.5, gradient_checkpointing=checkpointing)
        for checkpointing in (False, True)
    ]
    assert_same(kept[0].gradients, kept[1].gradients)
    differ = {name for name, grad in kept[0].gradients.items() if not torch.allclose(grad, whole.gradients[name])}
    assert differ == {name for name in whole.gradients if "self_attn" in name}
    for step in kept:
        assert step.logs["loss"] == pytest.approx(whole.logs["loss"] + 0.5 * step.logs["aux_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("router_aux_loss_coef", None),
        ("router_aux_loss_coef", 0.01),
        ("label_smoothing_factor", 0.1),
        ("loss_type", "dft"),
        ("average_tokens_across_devices", False),
        ("compute_loss_func", print),
    ],
)
def test_another_loss_is_refused(tmp_path: Path, name: str, value: object) -> None:
    asked: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name):
        build(tmp_path, **asked)


def test_logits_are_refused(trainer: Any) -> None:
    with pytest.raises(NotImplementedError, match="compute_metrics"):
        trainer.compute_loss(trainer.model, Collator(WEIGHTS)(make_rows()), return_outputs=True)


def work(rank: int, port: int, folder: str) -> None:
    """What each of two workers does: a step on its 4 of 8 rows in one micro-batch, and in four."""
    take_place(rank, port)
    for micro_batch, accumulation in ((4, 1), (1, 4)):
        step = take_step(Path(folder), micro_batch, accumulation)
        torch.save(step._asdict(), Path(folder) / f"{micro_batch}-{rank}.pt")
    gc.collect()  # a reducer that outlives its group can wait for it for ever
    torch.distributed.destroy_process_group()


def test_two_workers_are_one(tmp_path: Path, whole: Step) -> None:
    """Gloo processes; evaluation too, whose five rows make accelerate repeat three."""
    spawn_workers(work, 2, str(tmp_path))
    for micro_batch in (4, 1):
        for rank in (0, 1):
            step = Step(**torch.load(tmp_path / f"{micro_batch}-{rank}.pt"))
            assert_same(whole.gradients, step.gradients)
            for name in ("loss", "mean_token_accuracy", "grad_norm"):
                assert step.logs[name] == pytest.approx(whole.logs[name], rel=1e-6)
            for name in ("eval_loss", "eval_loss_de", "eval_loss_fr", "eval_mean_token_accuracy"):
                assert step.evaluation[name] == pytest.approx(whole.evaluation[name], rel=1e-6)
