"""Snapshots: taken and put back to the bit, in standard formats, and refused where they do not belong."""

from __future__ import annotations

import json
import random
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cluster.artifacts import ArtifactError
from cluster.storage import Storage
from training.checkpoints import buffers as buffers_module
from training.checkpoints.buffers import SnapshotBuffers
from training.checkpoints.files import CheckpointManifest, from_files, to_files, to_safetensors
from training.checkpoints.rng import own_rng, set_rng
from training.checkpoints.snapshot import (
    Snapshot,
    adapter_weights,
    check_identity,
    restore_snapshot,
    take_snapshot,
)
from training.checkpoints.store import CheckpointStore

from .checkpointing import IDENTITY, Run, differences, new_run, seed_all
from .packed import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def through_files(snapshot: Snapshot) -> Snapshot:
    files = {name: b"".join(pieces) for name, pieces in to_files(snapshot).items()}
    manifest = CheckpointManifest(
        step=snapshot.step,
        workers=snapshot.workers,
        metrics=snapshot.metrics,
        identity=snapshot.identity,
        files=dict.fromkeys(files, ""),
    )
    return from_files(manifest, files)


def restored(snapshot: Snapshot, **settings: Any) -> Run:
    """As a new process would go on."""
    run = new_run(seed=99, **settings)
    restore_snapshot(snapshot, run.model, run.optimizer, run.scheduler)
    run.state = snapshot.new_trainer_state()
    set_rng(snapshot.rng, 0)
    return run


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_restored_run_takes_the_same_steps_to_the_bit(steps: int, tmp_path: Path) -> None:
    run = new_run()
    for _ in range(steps):
        run.step()
    store = CheckpointStore(Storage.at(str(tmp_path)))
    snapshot = run.snapshot(eval_loss=2.5, broken=float("inf"))
    store.write(snapshot)
    expected = [run.step() for _ in range(3)]
    assert len(set(expected)) == 3

    read = store.read(steps)
    assert differences(read, snapshot) == []
    for _ in range(2):
        again = restored(read)
        assert [again.step() for _ in range(3)] == expected
        assert differences(again.snapshot(), run.snapshot()) == []
    assert again.state.log_history == run.state.log_history


@pytest.mark.parametrize("forgotten", ["python", "numpy", "torch"])
def test_each_generator_matters(forgotten: str) -> None:
    """Else the test above would pass without them."""
    run = new_run()
    run.step()
    snapshot = run.snapshot()
    expected = [run.step() for _ in range(3)]
    seed_all(5)
    snapshot.rng[0][forgotten] = own_rng()[forgotten]
    again = restored(snapshot)
    assert [again.step() for _ in range(3)] != expected


def test_a_snapshot_does_not_change_with_the_run() -> None:
    run = new_run()
    run.step()
    snapshot = run.snapshot()
    kept = through_files(snapshot)
    run.step()
    assert differences(snapshot, kept) == []
    again = restored(snapshot)
    again.step()
    assert differences(snapshot, kept) == []


def test_a_folder_is_a_peft_adapter(tmp_path: Path) -> None:
    run = new_run()
    for _ in range(3):
        run.step()
    CheckpointStore(Storage.at(str(tmp_path))).write(run.snapshot())
    folder = tmp_path / "checkpoints" / "step-00000003"
    loaded = PeftModel.from_pretrained(tiny_model(), folder).eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, run.model.eval()(tokens).logits)
        assert not torch.equal(loaded(tokens).logits, tiny_model()(tokens).logits)
    run.model.save_pretrained(tmp_path / "peft")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / name).exists()
    theirs = safetensors.torch.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    own = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (folder, tmp_path / "peft")]
    for config in configs:
        config["target_modules"].sort()
    assert configs[0] == configs[1]
    state = json.loads((folder / "state.json").read_text())
    name = next(iter(own))
    assert state["scalars"][name] == {"step": 3.0}
    assert set(safetensors.torch.load_file(folder / "optimizer.safetensors")) == {
        f"{name}.{moment}" for name in own for moment in ("exp_avg", "exp_avg_sq")
    }


def test_a_file_of_tensors_is_as_the_library_makes_it() -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.arange(7, dtype=torch.uint8),
        "c": torch.randn(2, 4).t(),
        "d": torch.randn(5).bfloat16(),
        "e": torch.arange(3),
        "f": torch.empty(0, 4),
        "g": torch.tensor(2.5),
    }
    made = b"".join(to_safetensors(tensors))
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    theirs = safetensors.torch.save(plain, metadata={"format": "pt"})
    assert header(made) == header(theirs)
    assert len(made) == len(theirs)
    read = safetensors.torch.load(made)
    assert all(torch.equal(read[name], plain[name]) and read[name].dtype == plain[name].dtype for name in plain)
    assert safetensors.torch.load(b"".join(to_safetensors({}))) == {}


def header(data: bytes) -> Any:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_buffers_are_used_again_and_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers_module, "SLAB_BYTES", 1024)
    run, buffers = new_run(), SnapshotBuffers()
    before_first = run.snapshot(buffers=buffers)
    assert differences(before_first, run.snapshot(rng=before_first.rng)) == []
    run.step()
    one = run.snapshot(buffers=buffers)
    assert differences(one, run.snapshot(rng=one.rng)) == []
    places = {name: tensor.data_ptr() for name, tensor in (one.adapter | one.moments).items()}
    run.step()
    two = run.snapshot(buffers=buffers)
    assert differences(two, run.snapshot(rng=two.rng)) == []
    assert {name: tensor.data_ptr() for name, tensor in (two.adapter | two.moments).items()} == places
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in (two.adapter | two.moments).values())
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))


def test_buffers_wait_until_they_are_written() -> None:
    run, buffers = new_run(), SnapshotBuffers()
    run.snapshot(buffers=buffers)
    buffers.free.clear()
    taken = threading.Thread(target=lambda: run.snapshot(buffers=buffers))
    taken.start()
    taken.join(0.3)
    assert taken.is_alive()
    buffers.free.set()
    taken.join(10)
    assert not taken.is_alive()


def test_accelerates_wrappers_and_fused_steps() -> None:
    """Saved by one kind of AdamW, gone on with by another, whose steps differ in their last bits."""
    run = new_run()
    for _ in range(3):
        run.step()
    snapshot = run.snapshot()
    fused = new_run(seed=3, fused=True)
    accelerator = Accelerator(cpu=True)
    try:
        optimizer, scheduler = accelerator.prepare(fused.optimizer, fused.scheduler)
        assert optimizer is not fused.optimizer
        restore_snapshot(snapshot, fused.model, optimizer, scheduler)
        assert "param_groups" in differences(fused.snapshot(), snapshot)
        wrapped = take_snapshot(
            fused.model, optimizer, scheduler, fused.state, rng=[], data={}, metrics={}, identity={}
        )
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert {"adapter", "moments", "scalars", "scheduler"}.isdisjoint(differences(wrapped, snapshot))
    assert [group["fused"] for group in fused.optimizer.param_groups] == [True, True]
    assert [group["lr"] for group in fused.optimizer.param_groups] == [g["lr"] for g in run.optimizer.param_groups]
    for one in (run, fused):
        set_rng(snapshot.rng, 0)
        one.step()
    for own, other in zip(fused.weights, run.weights, strict=True):
        assert torch.allclose(own, other, rtol=0, atol=1e-6)


def test_another_model_or_other_targets_are_refused_and_nothing_changes() -> None:
    run = new_run()
    run.step()
    snapshot = run.snapshot()
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"target_modules": ["q_proj", "k_proj", "v_proj"]},
            r"it lacks \S*layers\.0\.self_attn\.k_proj\.lora_A\.weight;",
        ),
        ({"target_modules": ["q_proj"]}, r"it holds \S*layers\.0\.self_attn\.v_proj\.lora_A\.weight, which this run"),
        ({"r": 4}, r"layers\.0\.self_attn\.q_proj\.lora_A\.weight is \[3, 32\] in float32 in it, and \[4, 32\] in"),
    ]
    for settings, message in cases:
        other = new_run(**settings)
        before = other.snapshot()
        with pytest.raises(ArtifactError, match=f"^the checkpoint of step 1 is of another model or.*{message}"):
            restore_snapshot(snapshot, other.model, other.optimizer, other.scheduler)
        assert differences(other.snapshot(rng=before.rng), before) == []
    single = torch.optim.AdamW(run.weights)
    with pytest.raises(
        ArtifactError, match=r"step 1 is of another optimizer: it has groups of \[4, 4\] tensors.*\[8\]"
    ):
        restore_snapshot(snapshot, run.model, single, run.scheduler)


def test_identity() -> None:
    snapshot = new_run().snapshot()
    check_identity(snapshot, IDENTITY)
    check_identity(through_files(snapshot), IDENTITY)
    with pytest.raises(
        ArtifactError, match=r"belongs to another model or.*: model was 'tiny' and is 'large'; give the run"
    ):
        check_identity(snapshot, {**IDENTITY, "model": "large"})
    with pytest.raises(ArtifactError, match="alpha was None and is 4"):
        check_identity(snapshot, {**IDENTITY, "alpha": 4})


def test_a_sharded_base_is_not_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 with one rank makes the same DTensors as with many."""
    run = new_run()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        fully_shard(run.model, mesh=mesh, ignored_params=set(run.weights))
        run.step()
        assert sum(isinstance(weight, DTensor) for weight in run.model.parameters()) > 10

        def refuse(*arguments: Any, **keywords: Any) -> None:
            raise AssertionError("a sharded weight is gathered")

        monkeypatch.setattr(DTensor, "full_tensor", refuse)
        monkeypatch.setattr(DTensor, "redistribute", refuse)
        snapshot = run.snapshot()
        again = new_run(seed=99)
        restore_snapshot(snapshot, again.model, again.optimizer, again.scheduler)
        restore_snapshot(snapshot, run.model, run.optimizer, run.scheduler)
        for one in (run, again):
            one.state = snapshot.new_trainer_state()
            assert differences(one.snapshot(rng=snapshot.rng), snapshot) == []
        sharded = new_run()
        fully_shard(sharded.model, mesh=mesh)
        with pytest.raises(ValueError, match=r"lora_A.weight is sharded; a checkpoint holds adapters that are whole"):
            adapter_weights(sharded.model)
    finally:
        dist.destroy_process_group()


def test_trained_weights_outside_the_adapter_are_refused() -> None:
    run = new_run()
    next(iter(run.model.parameters())).requires_grad_(True)
    with pytest.raises(ValueError, match="of 9 trainable weights PEFT saves 8"):
        adapter_weights(run.model)


def test_ranks_beyond_the_saved_ones_get_generators_of_their_own() -> None:
    states, following = [], []
    for seed in (1, 2):
        seed_all(seed)
        # Normal numbers come in pairs, of which the generators keep the second.
        draws()
        states.append(own_rng())
        following.append(draws())
    drawn = []
    for rank in range(5):
        set_rng(states, rank)
        drawn.append(draws())
        set_rng(states, rank)
        assert draws() == drawn[-1]
    assert drawn[:2] == following
    assert len({number for of_rank in drawn for number in of_rank}) == 15
    set_rng(states[1:], 4)
    assert draws() != drawn[4]


def draws() -> tuple[float, ...]:
    return (random.gauss(0, 1), float(np.random.randn()), float(torch.rand(())))


@pytest.mark.gpu
def test_on_a_gpu_fused_and_through_pinned_memory(tmp_path: Path) -> None:
    run, buffers = new_run(device="cuda", fused=True), SnapshotBuffers()
    for _ in range(3):
        run.step()
        snapshot = run.snapshot(buffers=buffers)
    assert all(tensor.is_pinned() for tensor in (snapshot.adapter | snapshot.moments).values())
    assert next(iter(snapshot.scalars.values())) == {"step": 3.0}
    store = CheckpointStore(Storage.at(str(tmp_path)))
    store.write(snapshot)
    expected = [run.step() for _ in range(3)]
    read = store.read(3)
    assert differences(read, snapshot) == []
    again = restored(read, device="cuda", fused=True)
    assert [again.step() for _ in range(3)] == expected
    assert differences(again.snapshot(), run.snapshot()) == []
    on_cpu = restored(read)
    assert {"adapter", "moments", "scalars", "scheduler"}.isdisjoint(differences(on_cpu.snapshot(), read))
    on_cpu.step()
