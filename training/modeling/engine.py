"""The model that a worker trains: base, adapters, and what makes both fast and small."""

from __future__ import annotations

import torch
import torch._dynamo
from peft import PeftModel
from torch.distributed.device_mesh import DeviceMesh
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssExperts

from cluster.model import Checkpointing
from training.config import TrainingConfig
from training.modeling.adapters import attach_adapters
from training.modeling.base import load_base
from training.modeling.expert_parallel import ExpertShare
from training.modeling.isolation import isolate_documents
from training.modeling.sharding import ignore_frozen, is_sharded

SHAPES = 64
"""compiled graphs of a layer's code, at most"""


def build_model(
    config: TrainingConfig,
    device: torch.device,
    checkpointing: Checkpointing,
    mesh: DeviceMesh | None = None,
    share: ExpertShare | None = None,
) -> PeftModel:
    """Load the base on `device`, put new adapters on it and prepare it for training.

    DistributedDataParallel may wrap what is returned, and will broadcast and average the adapters alone, and of those
    the ones that all workers hold.

    Args:
        config: of the run.
        device: of this worker.
        checkpointing: what the backward pass computes again; see `training.strategy.choose_strategy`.
        mesh: workers over which the base's layers are sharded; see `sharding.sharding_mesh`. None keeps them whole.
        share: of each layer's experts, and of their adapters, that this worker holds; None gives it all of them.

    Raises:
        ArtifactError: the checkpoint is incomplete or corrupted.
        ValueError: the adapters name layers that the model does not have.
    """
    model = attach_adapters(load_base(config.model, device, mesh, share), config.lora)
    prepare(model, checkpointing, compiled=config.compiled)
    ignore_frozen(model)
    return model


def prepare(model: PeftModel, checkpointing: Checkpointing, *, compiled: bool) -> None:
    """Keep packed documents apart, and set what is recomputed and what is compiled.

    Layers are compiled one by one, in place: the layers of one attention type share one compiled graph, and what is
    cached on disk (TORCHINDUCTOR_CACHE_DIR) serves any number of layers and runs. Of a sharded layer its forward is
    compiled and not its call, so that FSDP2's hooks gather and free the weights outside the graph, which sees ordinary
    tensors.
    """
    isolate_documents(model)
    for module in model.modules():
        if isinstance(module, GptOssExperts):
            module.recompute = checkpointing == "experts"
    if checkpointing == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compiled:
        # Each shape of batch, with and without gradient, is a graph for each type of layer. Beyond the limit PyTorch
        # would run layers uncompiled without a word, attention with every score in memory.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        torch._dynamo.config.optimize_ddp = False  # it splits graphs at DDP's buckets, which a layer is smaller than
        sharded = is_sharded(model)
        for module in model.modules():
            if isinstance(module, GptOssDecoderLayer) and sharded:
                module.forward = torch.compile(module.forward, dynamic=False)
            elif isinstance(module, GptOssDecoderLayer):
                module.compile(dynamic=False)
