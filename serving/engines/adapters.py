"""Adapters that are served by name beside one base: where they lie, and that they were made for this base."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from cluster.artifacts import (
    ADAPTER_SETTINGS,
    ADAPTER_WEIGHTS,
    MANIFEST,
    ArtifactError,
    Manifest,
    read_manifest,
    sha256,
    tensor_files,
)
from cluster.model import ModelShape
from cluster.verdict import refuse_failed
from serving.engines.base import CheckpointError

ADAPTER_FOLDER = "adapter"
"""subfolder of a base in which its adapter lies, as `python -m training merge --format adapter` writes it"""

_PREFIX = "base_model.model.model.layers."
_MERGE = "merge it with python -m training merge --format bf16"


def find_adapters(base: Path, locations: Mapping[str, str]) -> dict[str, Path]:
    """The folders of the PEFT adapters that `model.adapters` names, by name.

    An export of `python -m training merge --format adapter` must not have failed its verification, and the hashes of
    its base's weights must be those of `base`: of its manifest, where it has one, else of its files. Of an adapter
    alone the base that it names is compared likewise if it lies on this node; else a warning says that it was not.

    Raises:
        CheckpointError: an adapter is not there, damaged, unverified or made for another base; the sentence names it.
    """
    served = _Base(base)
    found = {}
    for name, location in locations.items():
        try:
            found[name] = _find(f"model.adapters.{name}", Path(location), served)
        except ArtifactError as error:
            raise CheckpointError(f"model.adapters.{name}: {error}") from error
    return found


def check_tensors(adapter: Path, base: Path) -> None:
    """Return if vLLM takes every tensor of a PEFT adapter, and each fits the base.

    vLLM 0.22 fails on some others after it has started, and passes over some in silence: adapters of layers that the
    model does not have (vllm/lora/model_manager.py).

    Raises:
        CheckpointError: it would not; the sentence names the first tensor.
    """
    path = adapter / ADAPTER_WEIGHTS
    shapes = _shapes(path)
    try:
        shape = ModelShape.from_folder(base)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    fitting = _fitting(shape, adapter_settings(adapter)["r"])
    for name in shapes:
        if name.replace(".experts.lora_", ".experts.base_layer.lora_") not in shapes:
            raise CheckpointError(
                f"{path} adapts only one of gate_up_proj and down_proj where {name} lies, and vLLM takes both or "
                f"neither of a layer's experts; {_MERGE}"
            )
    for name, found in shapes.items():
        layer = re.match(rf"{re.escape(_PREFIX)}(\d+)\.", name)
        if layer and int(layer[1]) >= shape.num_hidden_layers:
            raise CheckpointError(
                f"{path} was made for another base than {base}: it adapts layer {layer[1]}, and that has "
                f"{shape.num_hidden_layers} layers; name the base it was trained on in model.path"
            )
        if name not in fitting:
            raise CheckpointError(
                f"{path} holds {name}, and vLLM serves adapters of the attention's linears and of experts alone; "
                f"{_MERGE}"
            )
        if found != fitting[name]:
            raise CheckpointError(
                f"{path} was made for another base than {base}: {name} is {list(found)}, and {list(fitting[name])} "
                "would fit; name the base it was trained on in model.path"
            )
    for name in shapes:
        other = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        if other not in shapes:
            raise CheckpointError(f"{path} holds {name} and lacks {other}; make the adapter again")


def adapter_settings(adapter: Path) -> dict[str, Any]:
    """A PEFT adapter's `adapter_config.json`, with a whole number under `r`.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = adapter / ADAPTER_SETTINGS
    try:
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return settings | {"r": int(settings["r"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no PEFT adapter's settings ({error!r}); make the adapter again") from error


class _Base:
    """The base beside which adapters are served."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def weights(self) -> dict[str, str]:
        """SHA-256 of the files with weights, by name: those of its manifest, or else read whole."""
        return _weights(self.folder)


def _find(setting: str, folder: Path, base: _Base) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"{setting} {folder}: no such folder on this node; give that of an adapter")
    if (folder / ADAPTER_SETTINGS).is_file():
        # The subfolder of an export, named itself.
        if folder.name == ADAPTER_FOLDER and (folder.parent / MANIFEST).is_file():
            _check_export(setting, folder.parent, base)
        else:
            _check_alone(setting, folder, base)
        return folder
    if (folder / ADAPTER_FOLDER / ADAPTER_SETTINGS).is_file():
        _check_export(setting, folder, base)
        return folder / ADAPTER_FOLDER
    raise CheckpointError(
        f"{setting} {folder} holds neither {ADAPTER_SETTINGS} nor {ADAPTER_FOLDER}/{ADAPTER_SETTINGS}; name the folder "
        "of a PEFT adapter, or of an export of python -m training merge --format adapter"
    )


def _check_export(setting: str, export: Path, base: _Base) -> None:
    manifest = _manifest(export)
    if manifest is None:
        raise CheckpointError(f"{setting} {export} has no {MANIFEST}: it is no finished export; merge again")
    refuse_failed(export)
    for name, expected in manifest.files.items():
        if name.startswith(f"{ADAPTER_FOLDER}/") and sha256(export / name) != expected:
            raise CheckpointError(f"{setting}: {export / name} is corrupted, it is not the manifest's; merge again")
    if _listed_weights(manifest) != base.weights:
        raise _other_base(setting, export, base)


def _check_alone(setting: str, adapter: Path, base: _Base) -> None:
    if (adapter / MANIFEST).is_file():
        recorded = read_manifest(adapter, "adapter").base
    else:
        recorded = str(adapter_settings(adapter).get("base_model_name_or_path") or "")
    place = Path(recorded).expanduser()
    if recorded and place.resolve() == base.folder.resolve():
        return
    try:
        weights = _weights(place) if recorded else None
    except ArtifactError:
        weights = None
    if weights is None:
        logging.getLogger("ray.serve").warning(
            f"{setting} {adapter} was trained on {recorded or 'a base that it does not name'}, whose weights are not "
            f"on this node; only shapes were held against {base.folder}"
        )
    elif weights != base.weights:
        raise _other_base(setting, adapter, base, f", {recorded}")


def _other_base(setting: str, folder: Path, base: _Base, name: str = "") -> CheckpointError:
    return CheckpointError(
        f"{setting} {folder} was made for another base{name}: its weights are not those of model.path {base.folder}; "
        "name its own base there, or merge it and deploy it as an application of its own"
    )


def _manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ArtifactError(f"{folder / MANIFEST} cannot be read ({error.errors()[0]['msg']}); merge again") from None


def _weights(folder: Path) -> dict[str, str]:
    manifest = _manifest(folder)
    if manifest is not None and (listed := _listed_weights(manifest)):
        return listed
    return {path.name: sha256(path) for path in sorted(set(tensor_files(folder).values()))}


def _listed_weights(manifest: Manifest) -> dict[str, str]:
    return {
        name: digest for name, digest in manifest.files.items() if "/" not in name and name.endswith(".safetensors")
    }


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; make the adapter again")
    try:
        with safe_open(path, framework="np") as tensors:
            found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read, it may be cut short ({error}); make the adapter again") from None
    if not found:
        raise CheckpointError(f"{path} holds no tensors; make the adapter again")
    return found


def _fitting(shape: ModelShape, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that an adapter of one rank may have, by PEFT's names.

    Of stacked experts A is [E·R, I] and B [O, R·E]; gate_up_proj, which is wrapped first, is the inner of the two.
    """
    hidden, inner, experts = shape.hidden_size, shape.intermediate_size, shape.num_local_experts
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    modules = {
        "self_attn.q_proj": (rank, hidden, queries),
        "self_attn.k_proj": (rank, hidden, keys),
        "self_attn.v_proj": (rank, hidden, keys),
        "self_attn.o_proj": (rank, queries, hidden),
        "mlp.experts.base_layer": (rank * experts, hidden, 2 * inner),
        "mlp.experts": (rank * experts, inner, hidden),
    }
    fitting: dict[str, tuple[int, ...]] = {}
    for layer in range(shape.num_hidden_layers):
        for module, (ranks, inputs, outputs) in modules.items():
            fitting[f"{_PREFIX}{layer}.{module}.lora_A.weight"] = (ranks, inputs)
            fitting[f"{_PREFIX}{layer}.{module}.lora_B.weight"] = (outputs, ranks)
    return fitting
