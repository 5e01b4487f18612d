"""Loads gpt-oss tensor by tensor from the checkpoint's files to the device, whole or this worker's share of it.

Files are memory-mapped and each tensor goes to the device in one copy, so that no more than one tensor is held twice;
on a CPU a whole tensor that needs no conversion is the mapping itself. Reading the files is what takes the time: of a
sharded base each worker reads the rows that it keeps. Shape legend: E experts, I input and O output features of one
projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GptOssForCausalLM

from cluster.artifacts import ArtifactError, check_checkpoint, some_of, tensor_files
from cluster.model import EXPERT_PARAMETERS
from training.data.places import first_line
from training.modeling.expert_parallel import ExpertShare
from training.modeling.mxfp4 import BLOCK, NAN_SCALE, dequantise, quantise
from training.modeling.packed import PackedExperts
from training.modeling.sharding import as_shard, own_rows, shard_layers

WANTED = ("*.safetensors", "*.json", "*.jinja")
"""files of a hub repository that make a checkpoint folder"""
UNWANTED = ("*/*",)
"""openai/gpt-oss-* keep the same weights twice more, in the folders original and metal"""

PACKED = ("U8",)
FLOATS = ("BF16", "F16", "F32")
"""safetensors' names of dtypes"""
ITEM_BYTES = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}
"""bytes a number of each"""


def load_packed(
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    attention: str,
    experts: str,
    mesh: DeviceMesh | None = None,
    share: ExpertShare | None = None,
) -> GptOssForCausalLM:
    """A gpt-oss checkpoint on `device`, in evaluation mode, with `PackedExperts`.

    MXFP4 experts are taken as they are, others are quantised on load, an expert at a time. To transformers, TRL and
    accelerate the model is an ordinary one: no quantiser, no `quantization_config`.

    Args:
        path: checkpoint folder or hub id.
        dtype: of everything but the packed weights.
        device: where parameters and buffers live.
        attention: name in transformers' registry of attention implementations.
        experts: name in transformers' registry of experts implementations; see `PackedExperts`.
        mesh: workers that the layers are sharded over, each of which reads its own rows; None keeps them whole.
        share: of each layer's experts, which alone are read and held; None takes all of them. Not both.

    Raises:
        ArtifactError: the checkpoint cannot be downloaded, or a file or tensor of it is missing, of another shape,
            one too many or corrupted; the message names it.
    """
    return _load(path, dtype, device, attention, experts, mesh, share, packed=True)


def load_dense(
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    attention: str,
    experts: str,
    mesh: DeviceMesh | None = None,
    share: ExpertShare | None = None,
) -> GptOssForCausalLM:
    """A gpt-oss checkpoint in shares over workers, in evaluation mode, its experts dense and in `dtype` like the rest.

    MXFP4 experts are dequantised on load, an expert at a time, and each worker does so with its own alone. Arguments
    and errors as in `load_packed`; whole dense models are transformers' `from_pretrained`'s.
    """
    return _load(path, dtype, device, attention, experts, mesh, share, packed=False)


def _load(
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    experts: str,
    mesh: DeviceMesh | None,
    share: ExpertShare | None,
    *,
    packed: bool,
) -> GptOssForCausalLM:
    folder = checkpoint_folder(path)
    check_checkpoint(folder)
    config = AutoConfig.from_pretrained(folder)
    config.name_or_path = path
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = without_weights(config, dtype, attention, experts, packed=packed)
    if mesh is not None:
        shard_layers(model, mesh)
    with Checkpoint(folder, device, _shares(model, share)) as checkpoint:
        _fill(model, checkpoint, dtype)
    for layer in model.model.layers if share else ():
        layer.mlp.experts.share = share
    # Computed on the CPU, as from_pretrained does: powers differ between devices in the last bit.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def checkpoint_folder(path: str) -> Path:
    """`path` where it is a folder, else the folder that the hub's repository of this id is downloaded to.

    Raises:
        ArtifactError: the repository cannot be downloaded.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"model.path = {path} cannot be downloaded from the hub ({first_line(error)}); check the name and the "
            "connection, or give a checkpoint folder"
        ) from None


class Checkpoint:
    """The tensors of a checkpoint folder, each read once, with progress on a terminal.

    Args:
        folder: of the checkpoint.
        device: where tensors go.
        shares: by tensor name, the rows of dimension 0 that are read of it; a tensor without an entry is read whole.

    Raises:
        ArtifactError: a file is missing or cut short.
    """

    def __init__(self, folder: Path, device: torch.device, shares: Mapping[str, slice] | None = None) -> None:
        # safetensors takes "cuda" for GPU 0, torch for the current one.
        current = device.type == "cuda" and device.index is None
        self.device = torch.device("cuda", torch.cuda.current_device()) if current else device
        self.folder = folder
        self.files = tensor_files(folder)
        self.read_bytes = 0
        self._shares = shares or {}
        self._unread = set(self.files)
        self._stack = ExitStack()
        paths = sorted(set(self.files.values()))
        self._open = {
            path: self._stack.enter_context(safe_open(path, framework="pt", device=str(self.device))) for path in paths
        }
        self._progress = self._stack.enter_context(
            tqdm(
                desc="loading",
                total=sum(self._size(name) for name in self.files),
                unit="B",
                unit_scale=True,
                disable=None if _first_rank() else True,
                delay=1,
            )
        )

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def tensor(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS) -> torch.Tensor:
        """The tensor `name` of `shape`, or this worker's rows of it, on the device and in the file's dtype.

        Raises:
            ArtifactError: there is none, or it has another shape or dtype.
        """
        view = self._slice(name, shape, dtypes)
        share = self._shares.get(name)
        tensor: torch.Tensor = (
            self._open[self.files[name]].get_tensor(name) if share is None else view[share].to(self.device)
        )
        self._count(tensor)
        return tensor

    def packed(self, name: str, shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks, uint8 of `shape` [E, O, I/32, 16], and scales, uint8 [E, O, I/32], of the experts' weight `name`.

        Where this worker has a share of `name`, both are of its experts alone.

        Raises:
            ArtifactError: as `tensor`, or a value is not a number.
        """
        if f"{name}_blocks" not in self:
            return self._quantised(name, shape)
        scales = self.tensor(f"{name}_scales", shape[:-1], PACKED)
        if (scales == NAN_SCALE).any():
            raise ArtifactError(
                f"{self.files[name + '_scales']} is corrupted: {name}_scales holds {NAN_SCALE}, which is NaN; "
                "copy it again"
            )
        return self.tensor(f"{name}_blocks", shape, PACKED), scales

    def dense(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
        """The experts' weight `name` of `shape` [E, I, O], or this worker's experts of it, in `dtype`.

        Raises:
            ArtifactError: as `packed`.
        """
        if name in self:
            return self.tensor(name, shape).to(dtype)
        experts, inputs, outputs = shape
        blocks, scales = self.packed(name, (experts, outputs, inputs // BLOCK, BLOCK // 2))
        weight = torch.empty(len(blocks), inputs, outputs, dtype=dtype, device=self.device)
        for expert in range(len(blocks)):
            part = slice(expert, expert + 1)
            weight[part] = dequantise(blocks[part], scales[part], dtype)
        return weight

    def refuse_unread(self) -> None:
        """Raises ArtifactError where a tensor was not asked for."""
        if self._unread:
            names = sorted(self._unread)
            raise ArtifactError(
                f"{self.files[names[0]]} holds {some_of(names)}, for which gpt-oss has no place; "
                f"check that it belongs to {self.folder / 'config.json'}"
            )

    def _quantised(self, name: str, shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """As `packed`, from a weight [E, I, O]; one expert of it is held at a time."""
        experts, outputs, groups, _ = shape
        weight = self._slice(name, (experts, groups * BLOCK, outputs), FLOATS)
        own = range(experts)[self._shares.get(name, slice(None))]
        blocks = torch.empty(len(own), *shape[1:], dtype=torch.uint8, device=self.device)
        scales = torch.empty(len(own), *shape[1:-1], dtype=torch.uint8, device=self.device)
        for place, expert in enumerate(own):
            values = weight[expert : expert + 1].to(self.device)
            self._count(values)
            try:
                blocks[place : place + 1], scales[place : place + 1] = quantise(values)
            except ValueError as error:
                raise ArtifactError(
                    f"{self.files[name]}: {name} of expert {expert} cannot be packed: {error}"
                ) from None
        return blocks, scales

    def _slice(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Any:
        """safetensors' view of a tensor whose header says what it should; nothing is read yet."""
        if name not in self:
            raise ArtifactError(f"{self.folder} has no weights for {name}; copy the checkpoint again")
        view = self._open[self.files[name]].get_slice(name)
        found, kind = tuple(view.get_shape()), view.get_dtype()
        if found != tuple(shape) or kind not in dtypes:
            raise ArtifactError(
                f"{self.files[name]}: {name} is {kind} {list(found)}, and {self.folder / 'config.json'} asks for "
                f"{' or '.join(dtypes)} {list(shape)}; take both from the same checkpoint"
            )
        self._unread.discard(name)
        return view

    def _size(self, name: str) -> int:
        """Bytes that will be read of a tensor."""
        view = self._open[self.files[name]].get_slice(name)
        rows, *row = view.get_shape() or [1]
        own = len(range(rows)[self._shares.get(name, slice(None))])
        return own * int(prod(row)) * ITEM_BYTES.get(view.get_dtype(), 1)

    def _count(self, tensor: torch.Tensor) -> None:
        self.read_bytes += tensor.nbytes
        self._progress.update(tensor.nbytes)


def without_weights(
    config: Any, dtype: torch.dtype, attention: str, experts: str, *, packed: bool = True
) -> GptOssForCausalLM:
    """The model that `config` describes, on the meta device, its experts packed or transformers' own."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, experts_implementation=experts, trust_remote_code=False
        )
        for layer in model.model.layers if packed else ():
            layer.mlp.experts = PackedExperts(model.config, dtype)
    return model


def _shares(model: GptOssForCausalLM, share: ExpertShare | None) -> dict[str, slice]:
    """This worker's rows of the checkpoint's tensors of which it holds a part; packed experts are two tensors."""
    shares = {name: own_rows(weight) for name, weight in model.named_parameters() if isinstance(weight, DTensor)}
    if share is not None:
        own = share.own(model.config.num_local_experts)
        shares |= {name: own for name, _ in model.named_parameters() if ".mlp.experts." in name}
    for name in [name for name in shares if name.endswith(EXPERT_PARAMETERS)]:
        shares |= dict.fromkeys((f"{name}_blocks", f"{name}_scales"), shares[name])
    return shares


def _fill(model: GptOssForCausalLM, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Put the checkpoint's tensors in the place of all parameters.

    Every other tensor takes `dtype`, as in from_pretrained: gpt-oss's `_keep_in_fp32_modules` is about fp16 alone.
    """
    for name, parameter in list(model.named_parameters()):
        if name.endswith(EXPERT_PARAMETERS) and parameter.is_floating_point():
            _put(model, name, checkpoint.dense(name, parameter.shape, dtype))
        elif name.endswith(EXPERT_PARAMETERS):
            blocks, scales = checkpoint.packed(name, parameter.shape)
            _put(model, name, blocks)
            _put(model, f"{name}_scales", scales)
        elif not name.endswith("_scales"):
            _put(model, name, checkpoint.tensor(name, parameter.shape).to(dtype))
    for name, source in model.all_tied_weights_keys.items():
        if name in checkpoint and not torch.equal(
            checkpoint.tensor(name, model.get_parameter(source).shape).to(dtype), model.get_parameter(source)
        ):
            raise ArtifactError(
                f"{checkpoint.files[name]}: {name} differs from {source}, and config.json ties them; set "
                "tie_word_embeddings to false there"
            )
    model.tie_weights()
    checkpoint.refuse_unread()


def _put(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Put `tensor`, this worker's rows of it where it holds no more, in the place of the parameter `name`."""
    module, _, parameter = name.rpartition(".")
    old = model.get_parameter(name)
    value = as_shard(tensor, old) if isinstance(old, DTensor) else tensor
    setattr(model.get_submodule(module), parameter, torch.nn.Parameter(value, requires_grad=old.requires_grad))


def _first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
