"""The base's checkpoint on any storage: what it holds, from its files' headers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from cluster.artifacts import INDEX, WEIGHTS, ArtifactError, promised_tensors, some_of
from cluster.model import ModelShape
from cluster.storage import Storage
from training.merge.headers import Header, Stored, read_header
from training.modeling.mxfp4 import BLOCK, NAN_SCALE

FLOATS = ("BF16", "F16", "F32")
PACKED = "U8"
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "LICENSE",
    "NOTICE",
    "USAGE_POLICY",
)
"""files that a merged checkpoint takes over from its base, where the base has them"""


@dataclass(frozen=True)
class Weight:
    """A weight of the model: one stored tensor, or, where it is packed, blocks and scales."""

    name: str
    shape: tuple[int, ...]
    """as the model multiplies it; of packed experts [E, I, O]"""
    stored: Stored
    """the tensor, or its blocks, uint8 [E, O, I/32, 16]"""
    scales: Stored | None = None
    """uint8 [E, O, I/32]"""


class Base:
    """A whole gpt-oss checkpoint. Reads `config.json` and headers.

    Args:
        storage: its folder.

    Raises:
        ArtifactError: a file or a tensor is missing or damaged, the folder holds no gpt-oss, or one in numbers that
            merge does not read.
        StorageError: the storage does not answer.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.settings = self._read_settings()
        try:
            self.shape = ModelShape.from_config(self.settings, f"{storage}/config.json")
        except ValueError as error:
            raise ArtifactError(str(error)) from None
        self._refuse_other_quantisation()
        self.headers = self._read_headers()
        """by file name"""
        self.stored = {tensor.name: tensor for header in self.headers.values() for tensor in header.tensors}
        self.copied = [name for name in COPIED if storage.exists(name)]
        self._refuse_incomplete()
        self.weights = {weight.name: weight for weight in map(self._weight, self.stored.values()) if weight}
        """by name, in the files' order"""

    def read(self, tensor: Stored, start: int = 0, size: int | None = None) -> memoryview:
        """`size` bytes of a tensor from its byte `start`; by default all.

        Raises:
            StorageError: they cannot be read.
        """
        count = tensor.size - start if size is None else size
        data = self.storage.read_range(tensor.file, tensor.start + start, count)
        return data

    def read_scales(self, tensor: Stored, start: int, size: int) -> memoryview:
        """As `read`.

        Raises:
            ArtifactError: one of them is not a number.
        """
        data = self.read(tensor, start, size)
        if bytes([NAN_SCALE]) in bytes(data):
            raise ArtifactError(
                f"{self.storage}/{tensor.file} is corrupted: {tensor.name} holds {NAN_SCALE}, which is NaN; "
                "copy it again"
            )
        return data

    def _read_settings(self) -> dict[str, Any]:
        place = f"{self.storage}/config.json"
        try:
            settings = json.loads(self.storage.read("config.json"))
        except FileNotFoundError:
            raise ArtifactError(f"{place} is missing: a checkpoint folder carries its config.json") from None
        except ValueError as error:
            raise ArtifactError(f"{place} is not valid JSON: {error}") from None
        if not isinstance(settings, dict):
            raise ArtifactError(f"{place} is no JSON object; copy it again")
        return settings

    def _refuse_other_quantisation(self) -> None:
        quantised = self.settings.get("quantization_config")
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        if quantised and method != "mxfp4":
            raise ArtifactError(
                f"{self.storage}/config.json: the base is quantised with {method!r}, and merge reads mxfp4, bf16, fp16 "
                "and fp32; give the base that the adapter was trained on in one of these"
            )

    def _read_headers(self) -> dict[str, Header]:
        """As in transformers, an index of shards counts only where there is no `model.safetensors`."""
        if self.storage.exists(WEIGHTS):
            return {WEIGHTS: read_header(self.storage, WEIGHTS)}
        index = f"{self.storage}/{INDEX}"
        try:
            promised = promised_tensors(self.storage.read(INDEX), index)
        except FileNotFoundError:
            raise ArtifactError(
                f"{self.storage} holds neither {WEIGHTS} nor {INDEX}; copy the checkpoint again"
            ) from None
        headers = {}
        for file, tensors in sorted(promised.items()):
            place = f"{self.storage}/{file}"
            try:
                headers[file] = read_header(self.storage, file)
            except FileNotFoundError:
                raise ArtifactError(
                    f"{place} is missing: {index} says it holds {some_of(tensors)}; copy it again"
                ) from None
            missing = sorted(set(tensors) - {tensor.name for tensor in headers[file].tensors})
            if missing:
                raise ArtifactError(f"{place} lacks {some_of(missing)}, which {index} says it holds; copy it again")
        return headers

    def _refuse_incomplete(self) -> None:
        missing = sorted(self.shape.tensor_names() - set(self.stored))
        if missing:
            raise ArtifactError(f"{self.storage} has no weights for {some_of(missing)}; copy the checkpoint again")
        if "tokenizer.json" not in self.copied:
            raise ArtifactError(f"{self.storage}/tokenizer.json is missing; copy it from the base model")

    def _weight(self, tensor: Stored) -> Weight | None:
        """The weight of which `tensor` is the whole or the blocks; None for scales."""
        prefix, _, part = tensor.name.rpartition("_")
        if part == "scales" and f"{prefix}_blocks" in self.stored:
            return None
        if part == "blocks" and (scales := self.stored.get(f"{prefix}_scales")):
            shape = tensor.shape
            fits = len(shape) == 4 and shape[3] == BLOCK // 2 and scales.shape == shape[:3]
            if not fits or {tensor.dtype, scales.dtype} != {PACKED}:
                raise ArtifactError(
                    f"{self.storage}/{tensor.file}: {tensor.name} {list(shape)} and its scales {list(scales.shape)} "
                    "are no packed experts; copy the checkpoint again"
                )
            return Weight(prefix, (shape[0], shape[2] * BLOCK, shape[1]), tensor, scales)
        if tensor.dtype not in FLOATS:
            raise ArtifactError(
                f"{self.storage}/{tensor.file}: {tensor.name} is {tensor.dtype}, and merge reads {', '.join(FLOATS)} "
                "and packed experts; give the base that the adapter was trained on in one of these"
            )
        return Weight(tensor.name, tensor.shape, tensor)
