"""All that a run needs to go on, in host memory: taken from the objects that train, and put back into them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from cluster.artifacts import ArtifactError
from training.agreement import trainable
from training.checkpoints.buffers import SnapshotBuffers
from training.checkpoints.optimizer import load_state, named_groups, state_scalars, state_tensors
from training.checkpoints.rng import Rng
from training.modeling.expert_parallel import gather_whole, owned

if TYPE_CHECKING:  # the driver reads snapshots too, and these take seconds to import
    from peft import PeftModel
    from transformers import TrainerState

REMEDY = "give the run the settings that it had, or another run.name"


@dataclass(frozen=True)
class Snapshot:
    """A run after an optimizer step. All tensors are in host memory, contiguous, and none is shared with the run's.

    Tensors of adapters, and the optimizer's by them, go by the names under which PEFT saves them.
    """

    step: int
    """optimizer steps done"""
    adapter: dict[str, Tensor]
    adapter_config: dict[str, Any]
    """PEFT's own description of the adapter"""
    moments: dict[str, Tensor]
    """the optimizer's tensors by `<adapter tensor>.<name>`, as in `….lora_A.weight.exp_avg`"""
    scalars: dict[str, dict[str, float]]
    """the optimizer's numbers by adapter tensor and name, as `step`"""
    param_groups: list[dict[str, Any]]
    """the optimizer's groups, with names of adapter tensors in `params`"""
    scheduler: dict[str, Any]
    trainer_state: dict[str, Any]
    """fields of transformers' TrainerState"""
    rng: list[Rng]
    """of each rank, in order"""
    data: dict[str, Any]
    """how far the data was read"""
    metrics: dict[str, Any]
    identity: dict[str, Any]
    """what the checkpoint belongs to; see `check_identity`"""
    buffers: SnapshotBuffers | None = dataclasses.field(default=None, compare=False, repr=False)
    """whose memory the tensors lie in"""

    @property
    def workers(self) -> int:
        """Number of ranks."""
        return len(self.rng)

    def new_trainer_state(self) -> TrainerState:
        """A TrainerState as it was, of its own."""
        from transformers import TrainerState

        return TrainerState(**copy.deepcopy(self.trainer_state))


def gather_tensors(model: PeftModel, optimizer: Optimizer) -> dict[str, Tensor]:
    """Of what only parts lie on a worker, adapters and the optimizer's tensors by them, the whole on the first one.

    Every worker must call it. Nothing is exchanged where all adapters are whole on every worker.

    Args:
        model: not wrapped for data parallelism.
        optimizer: of the model's adapters, perhaps in accelerate's wrapper.

    Returns what `take_snapshot` takes as `whole`; the other workers have no use for it.
    """
    weights = {name: weight for name, weight in adapter_weights(model).items() if owned(weight)}
    moments = state_tensors(_inner_optimizer(optimizer), weights)
    tensors = {name: (weight.detach(), owned(weight)) for name, weight in weights.items()}
    tensors |= {name: (moment, owned(weights[name.rpartition(".")[0]])) for name, moment in moments.items()}
    return gather_whole({name: (tensor, place) for name, (tensor, place) in tensors.items() if place})


def take_snapshot(
    model: PeftModel,
    optimizer: Optimizer,
    scheduler: Any,
    trainer_state: TrainerState,
    *,
    rng: Sequence[Rng],
    data: Mapping[str, Any],
    metrics: Mapping[str, Any],
    identity: Mapping[str, Any],
    buffers: SnapshotBuffers | None = None,
    whole: Mapping[str, Tensor] | None = None,
) -> Snapshot:
    """A copy of the run's state in host memory. Weights of the base are not looked at, and may be sharded.

    Training waits meanwhile, mostly for the copy: three times the adapters' bytes with AdamW. It waits longer while
    the snapshot before, taken into the same `buffers`, is still being written.

    Args:
        model: not wrapped for data parallelism; its trainable weights are whole on this worker, or in `whole`.
        optimizer: whose state is tensors or numbers by parameter, as of torch's AdamW, perhaps in accelerate's
            wrapper; before the first step it is empty.
        scheduler: of learning rates, perhaps in accelerate's wrapper.
        trainer_state: its `global_step` is the snapshot's step.
        rng: of each rank, in order; each rank's is `own_rng()`.
        data: how far the data was read; what JSON can hold, as the next two.
        metrics: latest figures, among them `eval_loss` if the best checkpoint is to be kept.
        identity: what a run must share with this one to go on from here; see `check_identity`.
        buffers: memory that is used again. Without, new memory is taken, which a GPU's copies spend most time on.
        whole: what `gather_tensors` found, where this worker holds but a part of some weights.

    Raises:
        ValueError: a trainable weight is sharded, or is no part of the adapter that PEFT saves.
    """
    weights = adapter_weights(model)
    inner = _inner_optimizer(optimizer)
    moments = state_tensors(inner, weights)
    tensors = {name: weight.detach() for name, weight in weights.items()} | moments | dict(whole or {})
    copies = (buffers or SnapshotBuffers()).copies(tensors)
    return Snapshot(
        step=trainer_state.global_step,
        adapter={name: copies[name] for name in weights},
        adapter_config=_adapter_config(model),
        moments={name: copies[name] for name in moments},
        scalars=state_scalars(inner, weights),
        param_groups=named_groups(inner, weights),
        scheduler=copy.deepcopy(_inner_scheduler(scheduler).state_dict()),
        trainer_state=dataclasses.asdict(trainer_state),
        rng=list(rng),
        data=copy.deepcopy(dict(data)),
        metrics=copy.deepcopy(dict(metrics)),
        identity=copy.deepcopy(dict(identity)),
        buffers=buffers,
    )


def restore_snapshot(snapshot: Snapshot, model: PeftModel, optimizer: Optimizer, scheduler: Any) -> None:
    """Put adapters, optimizer and scheduler back to what they were; the inverse of `take_snapshot`, on any device.

    Of the optimizer's settings those that say how it computes (fused or not) stay as they are, all others become the
    snapshot's. Random numbers are left to `set_rng`, trainer state and data position to the caller. The snapshot shares
    no memory with the run and can be restored again.

    Raises:
        ArtifactError: the snapshot is of another model, other LoRA targets or another optimizer; nothing was changed.
        ValueError: as `take_snapshot`.
    """
    weights = adapter_weights(model)
    inner = _inner_optimizer(optimizer)
    _check_adapter(snapshot, weights)
    _check_groups(snapshot, inner, weights)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(_part(snapshot.adapter[name], weight))
    moments = {name: _part(moment, weights[name.rpartition(".")[0]]) for name, moment in snapshot.moments.items()}
    load_state(inner, weights, moments, snapshot.scalars, snapshot.param_groups)
    _inner_scheduler(scheduler).load_state_dict(copy.deepcopy(snapshot.scheduler))


def check_identity(snapshot: Snapshot, identity: Mapping[str, Any]) -> None:
    """Refuse a snapshot that belongs to something else than `identity`.

    Raises:
        ArtifactError: the two differ; the message names the keys that do, with both values.
    """
    keys = sorted(snapshot.identity.keys() | identity.keys())
    differing = [
        f"{key} was {snapshot.identity.get(key)!r} and is {identity.get(key)!r}"
        for key in keys
        if snapshot.identity.get(key) != identity.get(key)
    ]
    if differing:
        raise ArtifactError(
            f"the checkpoint of step {snapshot.step} belongs to another model or other LoRA settings or other data: "
            f"{'; '.join(differing)}; {REMEDY}"
        )


def adapter_weights(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The trainable weights by the names under which PEFT saves them.

    Raises:
        ValueError: there are none, one is sharded, or one is no part of what PEFT saves.
    """
    trained = trainable(model)
    # Given weights to choose from, PEFT picks and renames, and asks the base for nothing.
    from peft import get_peft_model_state_dict

    saved: dict[str, torch.nn.Parameter] = get_peft_model_state_dict(
        model, state_dict=trained, save_embedding_layers=False
    )
    if not trained or {id(weight) for weight in saved.values()} != {id(weight) for weight in trained.values()}:
        raise ValueError(f"of {len(trained)} trainable weights PEFT saves {len(saved)}; all must be an adapter's")
    sharded = [name for name, weight in saved.items() if isinstance(weight, DTensor)]
    if sharded:
        raise ValueError(f"{sharded[0]} is sharded; a checkpoint holds adapters that are whole on every worker")
    return saved


def _check_adapter(snapshot: Snapshot, weights: Mapping[str, Tensor]) -> None:
    saved = snapshot.adapter
    differing = [
        name
        for name in sorted(saved.keys() & weights.keys())
        if (saved[name].shape, saved[name].dtype) != (_whole_shape(weights[name]), weights[name].dtype)
    ]
    if missing := sorted(weights.keys() - saved.keys()):
        found = f"it lacks {missing[0]}"
    elif extra := sorted(saved.keys() - weights.keys()):
        found = f"it holds {extra[0]}, which this run does not train"
    elif differing:
        name = differing[0]
        described = _described(_whole_shape(weights[name]), weights[name].dtype)
        found = f"{name} is {_described(saved[name].shape, saved[name].dtype)} in it, and {described} in this run"
    else:
        return
    raise ArtifactError(
        f"the checkpoint of step {snapshot.step} is of another model or other LoRA targets: {found}; {REMEDY}"
    )


def _check_groups(snapshot: Snapshot, optimizer: Optimizer, weights: Mapping[str, Tensor]) -> None:
    saved = [group["params"] for group in snapshot.param_groups]
    own = [group["params"] for group in named_groups(optimizer, weights)]
    if saved != own:
        sizes = f"groups of {[len(names) for names in saved]} tensors, and this run's has {[len(n) for n in own]}"
        raise ArtifactError(
            f"the checkpoint of step {snapshot.step} is of another optimizer: it has {sizes}, perhaps in another order"
            f"; {REMEDY}"
        )


def _described(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{list(shape)} in {str(dtype).removeprefix('torch.')}"


def _whole_shape(weight: Tensor) -> torch.Size:
    """Of the adapter's tensor, of which this worker may hold a part."""
    place = owned(weight)
    return place.whole_shape(weight) if place else weight.shape


def _part(whole: Tensor, weight: Tensor) -> Tensor:
    """What this worker holds in `weight` of such a tensor."""
    place = owned(weight)
    return place.part(whole) if place else whole


def _adapter_config(model: PeftModel) -> dict[str, Any]:
    """What PEFT writes into `adapter_config.json`."""
    described = model.peft_config[model.active_adapter].to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in described.items()}
    return copy.deepcopy({**plain, "inference_mode": True})


def _inner_optimizer(optimizer: Any) -> Any:
    """Without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _inner_scheduler(scheduler: Any) -> Any:
    """Without accelerate's wrapper."""
    return getattr(scheduler, "scheduler", scheduler)
