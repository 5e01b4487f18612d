"""Held-out questions that a model answers in training: what is asked, what it says, and what is counted."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import GptOssForCausalLM, Mxfp4Config, set_seed

from cluster.answers.numbers import read_number
from cluster.config import load_files
from cluster.harmony import Codec
from cluster.storage import Storage
from tests.benchmarks.distributed_trainer import Metering
from training.agreement import trainable
from training.answering import Answering, Question, held_out_questions, shares
from training.checkpoints.store import CheckpointStore
from training.config import TrainingConfig
from training.data.heldout import HeldOut, with_languages
from training.data.prepare import prepare
from training.data.shards import read_shards
from training.durable import DurableTrainer
from training.keeping import Keeper
from training.modeling.engine import build_model
from training.modeling.expert_parallel import ExpertShare
from training.modeling.sharding import sharding_mesh
from training.throughput import Meter
from training.worker import make_trainer

from .processes import spawn_workers, take_place

DEMO, MODEL = "training/configs/demo.toml", Path("training/demo/model")
CPU = torch.device("cpu")
COUNT, TOKENS, FEW = 7, 48, 12

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.from_folder(MODEL)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    """Three conversations in each of nine languages."""
    folder = tmp_path_factory.mktemp("held-out")
    by_language: Counter[str] = Counter()
    with (folder / "own.jsonl").open("w", encoding="utf-8") as own:
        for line in Path("training/demo/data/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True):
            language = json.loads(line)["reasoning_language"]
            by_language[language] += 1
            if by_language[language] <= 3:
                own.write(line)
    config = load_files(TrainingConfig, DEMO).data
    place = prepare(str(folder / "own.jsonl"), config, str(MODEL), str(folder), 0, spread=False)
    return with_languages(read_shards(str(place), folder), MODEL)


@pytest.fixture(scope="module")
def questions(held_out: HeldOut, codec: Codec) -> list[Question]:
    return held_out_questions(held_out, codec, COUNT)


def model_of(mesh: Any = None, share: ExpertShare | None = None) -> PeftModel:
    return build_model(load_files(TrainingConfig, DEMO), CPU, "none", mesh, share).eval()


def answering(
    questions: list[Question], codec: Codec, rank: int = 0, workers: int = 1, rows: int = 3, tokens: int = TOKENS
) -> Answering:
    return Answering(questions, codec, maximum_tokens=tokens, rows=rows, rank=rank, workers=workers)


def test_questions_are_taken_of_each_language_in_turn(held_out: HeldOut, codec: Codec) -> None:
    found = held_out_questions(held_out, codec, 20)
    assert [question.language for question in found] == [*(tags := held_out.languages), *tags, *tags[:2]]
    assert len(held_out_questions(held_out, codec, 1000)) == 27
    text = codec.decode(found[0].prompt)
    assert text.endswith("<|start|>assistant")
    assert "<|channel|>" not in text
    assert any(question.expected is not None for question in found)


def test_answers_are_those_of_generate_one_by_one(questions: list[Question], codec: Codec) -> None:
    """transformers' own model of the same base, without padding and with its own experts."""
    stock = GptOssForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation="eager", quantization_config=Mxfp4Config(dequantize=True)
    )
    found = {tuple(one.prompt): said for one, said in answering(questions, codec)._answered(model_of())}
    assert len(found) == COUNT
    for question in questions[:3]:
        prompt = torch.tensor([question.prompt])
        stops = [*codec.stop_tokens]
        settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": stops, "pad_token_id": stops[0]}
        expected = stock.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[0, prompt.shape[1] :]
        assert found[tuple(question.prompt)] == expected.tolist()


def test_answering_leaves_no_trace(questions: list[Question], codec: Codec) -> None:
    model = model_of()
    before, state = model.config._attn_implementation, torch.get_rng_state()
    answering(questions[:1], codec).sums(model)
    assert model.config._attn_implementation == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.grad is not None for parameter in model.parameters())


def trained(held_out: HeldOut, folder: Path, **run: Any) -> DurableTrainer:
    """After three steps with dropout on one worker; with `run` of settings it evaluates after each."""
    folder.mkdir()
    raw = load_files(TrainingConfig, DEMO).model_dump()
    raw["workers"]["count"], raw["batch"]["micro_batch_size"], raw["lora"]["dropout"] = 1, 2, 0.1
    raw["data"]["evaluation"] = "training/demo/data/train.jsonl" if run else None
    raw["run"] |= {"storage": str(folder), "tracker": "none", "maximum_steps": 3, "logging_steps": 1, **run}
    config = TrainingConfig.model_validate(raw)
    set_seed(0)
    model, keeper, meter = build_model(config, CPU, "none"), Keeper(config, folder), Meter(CPU, 0.0, None)
    rows = held_out.rows.select(range(6)).remove_columns("languages")
    evaluation = HeldOut(held_out.rows.select(range(2)), held_out.languages) if run else None
    trainer = make_trainer(config, MODEL, model, rows, evaluation, keeper, meter, folder, [Metering(meter)])
    with keeper:
        trainer.train_from(None, folder)
    return trainer


def test_a_run_learns_the_same_whether_it_is_measured_or_not(held_out: HeldOut, tmp_path: Path) -> None:
    """Its losses, adapters and random numbers, to the bit."""
    alone = trained(held_out, tmp_path / "alone")
    measured = trained(
        held_out, tmp_path / "measured", evaluation_steps=1, evaluation_answers=2, answer_tokens=3, patience=9
    )
    lines = [line for line in measured.state.log_history if "eval_complete" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    losses, those = ([line["loss"] for line in each.state.log_history if "loss" in line] for each in (alone, measured))
    assert len(set(losses)) == 3
    assert losses == those
    learned = trainable(measured.model)
    assert all(torch.equal(weight, learned[name]) for name, weight in trainable(alone.model).items())
    saved = [open_store_at(tmp_path / name).read(3).rng[0] for name in ("alone", "measured")]
    assert all(torch.equal(state, saved[1][name]) for name, state in saved[0].items())


def open_store_at(folder: Path) -> CheckpointStore:
    return CheckpointStore(Storage.at(str(folder / "demo")))


COMPLETIONS = {
    "fr": "<|channel|>analysis<|message|>Je compte les lettres, une par une.<|end|><|start|>assistant<|channel|>final"
    "<|message|>Il y en a 12.<|return|>",
    "de": "<|channel|>analysis<|message|>I count the letters, one by one.<|end|><|start|>assistant<|channel|>final"
    "<|message|>Es sind 13.<|return|>",
    "und": "<|channel|>analysis<|message|>Twelve, I would say, but I am not",
}


def test_counts_and_shares(codec: Codec, held_out: HeldOut) -> None:
    twelve = held_out_questions(held_out, codec, 1)[0]._replace(expected=None)
    asked = [twelve._replace(language=tag, expected=read_number("12")) for tag in ("fr", "de")]
    asked.append(twelve._replace(language="und"))
    judge = answering(asked, codec)
    counts = Counter(
        name for one in asked for name in judge._judged(one, codec_tokens(codec, COMPLETIONS[one.language]))
    )
    assert counts == {
        "answers": 3,
        "complete": 2,
        "asked fr": 1,
        "followed fr": 1,
        "asked de": 1,
        "numbers": 2,
        "right": 1,
    }
    named = {**dict.fromkeys(("asked fr", "followed fr", "asked de", "followed de"), 0), **counts}
    assert shares(named) == {
        "complete": 2 / 3,
        "adherence": 0.5,
        "adherence_fr": 1.0,
        "adherence_de": 0.0,
        "right": 0.5,
    }
    assert shares({}) == {}


def codec_tokens(codec: Codec, text: str) -> list[int]:
    """Tokens of a text whose control tokens are such."""
    pieces = re.split(r"(<\|[a-z]+\|>)", text)
    return [token for piece in pieces for token in ([codec.ids[piece]] if piece in codec.ids else codec.encode(piece))]


def work(rank: int, port: int, folder: str, kind: str, questions: list[Question]) -> None:
    """One of two workers that answer together."""
    take_place(rank, port)
    dist.init_process_group("gloo")
    model = model_of(mesh=sharding_mesh(CPU, 2)) if kind == "sharded" else model_of(share=ExpertShare.of_all_workers())
    sums = answering(questions, Codec.from_folder(MODEL), rank, 2, rows=2, tokens=FEW).sums(model)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(sums))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["sharded", pytest.param("expert_parallel", marks=pytest.mark.long)])
def test_workers_that_share_the_base_answer_as_one_does(
    kind: str, questions: list[Question], codec: Codec, tmp_path: Path
) -> None:
    """Five questions on two workers, two at a time: one has a question less, and takes part all the same."""
    asked = questions[:5]
    spawn_workers(work, 2, str(tmp_path), kind, asked)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["answers"] for each in found] == [3, 2]
    alone = answering(asked, codec, tokens=FEW).sums(model_of())
    assert {name: found[0][name] + found[1][name] for name in alone} == alone
