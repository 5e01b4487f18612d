"""Plans: lists of GPUs, what is chosen, what is refused, and what the command prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.__main__ import main
from cluster.config import ConfigError
from cluster.model import GPT_OSS_20B, GPT_OSS_120B
from cluster.planning.gpus import parse_gpus
from cluster.planning.plan import Job, Plan, make_plan


def plan(model: str, *gpus: str, host: int = 8, network: float = 400.0, up_to: int = 0, **changes: Any) -> Plan:
    shape = {"20b": GPT_OSS_20B, "120b": GPT_OSS_120B}[model]
    return make_plan(Job(model, shape, **changes), parse_gpus(gpus), host, network, up_to)


@pytest.mark.parametrize(
    ("words", "groups"),
    [
        (["8xH100"], ["8 × H100"]),
        (["8×h100", "H100"], ["9 × H100"]),
        (["4 x A100-40G", "2*rtx4090"], ["4 × A100-40G", "2 × RTX-4090"]),
        (["A100"], ["1 × A100-80G"]),
        (["1024xH200"], ["1024 × H200"]),
    ],
)
def test_gpu_lists(words: list[str], groups: list[str]) -> None:
    assert [str(group) for group in parse_gpus(words)] == groups


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--gpus is missing"),
        (["8"], "8: a number and a GPU"),
        (["0xH100"], "one GPU or more"),
        (["-1xH100"], "a number and a GPU"),
        (["8xTPU"], "TPU is unknown; known are H100"),
        (["1000xH100", "25xH200"], "1025 GPUs, and plans go up to 1024"),
        (["99999999999xH100"], "a number and a GPU"),
    ],
)
def test_gpu_lists_that_are_refused(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_gpus(words)


def test_the_base_is_whole_where_it_fits_and_shared_where_not() -> None:
    assert plan("20b", "8xH100").recommended.strategy == "data_parallel"
    assert plan("120b", "8xH100").recommended.strategy == "sharded"
    assert plan("120b", "16xH100").recommended.strategy == "hybrid"
    assert plan("120b", "8xH200").recommended.strategy == "data_parallel"


def test_what_is_chosen_fits_with_its_margin() -> None:
    for model, all_gpus in {
        "20b": ("8xH100", "16xA100-40G", "32xL40S", "64xRTX-4090"),
        "120b": ("1xH200", "8xH100", "16xA100-40G"),
    }.items():
        for gpus in all_gpus:
            for choice in plan(model, gpus).choices:
                assert choice.memory_bytes <= choice.memory_limit_bytes
                assert choice.micro_batch_size * choice.accumulation_steps == 16


def test_a_measured_step_says_so() -> None:
    one = plan("20b", "1xH200").recommended
    assert one.source != "guessed"
    known = [choice for choice in plan("20b", "1xH100").choices if choice.micro_batch_size == 8]
    assert [choice.source for choice in known] == ["measured"]
    assert known[0].tokens_per_second == pytest.approx(26_443, rel=1e-3)
    assert plan("20b", "8xH100").recommended.source == "from a measured step"
    assert plan("20b", "8xL40S").recommended.source == "guessed"


def test_hours_are_tokens_over_speed() -> None:
    found = plan("20b", "8xH100", rows=128_000, epochs=2.0).recommended
    assert found.steps == 2000
    assert found.hours == pytest.approx(2 * 128_000 * 2048 / found.tokens_per_second / 3600)
    assert plan("20b", "8xH100").recommended.hours is None


def test_the_network_of_a_host_bounds_full_sharding() -> None:
    slow = {choice.strategy: choice for choice in plan("20b", "64xH100", network=10.0).choices}
    assert slow["sharded"].network_share > 0.9 > slow["hybrid"].network_share
    assert slow["sharded"].tokens_per_second < slow["hybrid"].tokens_per_second / 5
    within = {choice.strategy: choice for choice in plan("20b", "8xH100", network=10.0).choices}
    assert all(choice.network_bytes == 0 for choice in within.values())


def test_mixed_gpus_take_the_slowest_ones_step() -> None:
    found = plan("20b", "8xH100", "4xA100-80G")
    alone = {
        next(iter(choice.gpus)): choice for choice in found.choices if len(choice.gpus) == 1 and choice.shards == 1
    }
    together = next(choice for choice in found.choices if len(choice.gpus) == 2 and choice.shards == 1)
    assert together.step_seconds == pytest.approx(alone["A100-80G"].step_seconds, rel=0.02)
    assert together.tokens_per_second < alone["H100"].tokens_per_second
    assert found.recommended.gpus == {"H100": 8}


def test_one_of_several_types_may_be_too_small() -> None:
    found = plan("120b", "8xH100", "1xRTX-4090")
    assert found.recommended.gpus == {"H100": 8}
    assert {"RTX-4090": 1} in [refusal.gpus for refusal in found.refusals]
    with pytest.raises(ConfigError, match=r"needs 78.* GiB of a GPU .* have 23.5 GiB: take more GPUs"):
        plan("120b", "1xRTX-4090")


def test_a_global_batch_is_dealt_evenly_or_refused() -> None:
    found = plan("20b", "8xH100", global_batch_size=64).recommended
    assert found.micro_batch_size * found.accumulation_steps == 8
    with pytest.raises(ConfigError, match="cannot be dealt evenly to 8 GPUs"):
        plan("20b", "8xH100", global_batch_size=20)


def test_scaling_goes_up_to_a_thousand() -> None:
    found = plan("20b", "8xH100", up_to=1024).scaling
    whole = [choice for choice in found if choice.strategy == "data_parallel"]
    assert [choice.workers for choice in whole] == [2**power for power in range(1, 11)]
    speeds = [choice.tokens_per_second for choice in whole]
    assert speeds == sorted(speeds)
    assert all(0 < choice.efficiency <= 1 for choice in found)


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = {"tokens": 100_000, "documents": 500}
    manifest = {"rows": 1600, "sequence_length": 1024, "counts": counts}
    (tmp_path / "prepared.json").write_text(json.dumps(manifest))
    words = ["plan", "--model", "20b", "--gpus", "8xH100", "--data", str(tmp_path)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "rows of 1024 tokens, 1,600 rows" in shown
    assert "recommended (*): --workers.count 8 --workers.strategy data_parallel" in shown
    assert main([*words, "--json"]) == 0
    found = Plan.model_validate_json(capsys.readouterr().out)
    assert found.recommended.steps == -(-1600 // 128)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model", "20b"], "--gpus is missing"),
        (["--model", "30b", "--gpus", "H100"], "neither 20b nor 120b nor a checkpoint"),
        (["--model", "20b", "--gpus", "H100", "--data", "nowhere"], "prepared.json is missing"),
        (["--model", "20b", "--gpus", "H100", "--tokens", "nan"], "a number above 0"),
        (["--model", "20b", "--gpus", "H100", "--up-to", "2000"], "up to 1024"),
        (["--gpus", "H100"], "--model"),
    ],
)
def test_bad_flags_end_in_one_sentence(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1


def test_planning_needs_neither_torch_nor_ray() -> None:
    code = "import sys, cluster.__main__, cluster.planning.command; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
