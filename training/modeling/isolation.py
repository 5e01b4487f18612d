"""Keeps packed documents apart in gpt-oss's attention.

transformers 5.23's `GptOssModel.forward` builds its masks without looking at position ids, unlike Llama's or Qwen's,
so a document would attend to those before it in its row. Here the masks are built with them, and handed over the way
`generate` hands its own: as a mapping from layer type to mask.

Flash attention takes the documents' bounds instead of a mask. transformers 5.23 reads them off position ids only where
a batch has a single row (`_is_packed_sequence` in transformers/modeling_flash_attention_utils.py), and in each layer
again, so they are handed over too.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import GptOssModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils.generic import is_flash_attention_requested

from training.modeling.attention import FLEX, block_masks, document_starts

_ARGUMENTS = tuple(inspect.signature(GptOssModel.forward).parameters)[1:-1]


def isolate_documents(model: torch.nn.Module) -> RemovableHandle:
    """Have each forward pass with `position_ids` and no mask tell documents by positions that begin again.

    Returns a handle whose `remove()` undoes it. Calls with a cache are left as they are, and so are calls with an
    attention mask, but for one kind: with `FLEX` a padding mask [B, T] is replaced by block masks, of `position_ids`
    or else of the positions 0, 1, 2, …. That is exact for rows padded on the right, which is where
    `training.data.collator` pads. Rows padded on the left need `position_ids` that begin at 0 after the padding, as
    `generate` gives them: without any, the padding would be attended to, and looking for it would make the GPU wait.

    Raises:
        ValueError: there is no `GptOssModel` in `model`.
    """
    for module in model.modules():
        if isinstance(module, GptOssModel):
            handle: RemovableHandle = module.register_forward_pre_hook(_add_masks, with_kwargs=True)
            return handle
    raise ValueError(f"{type(model).__name__} holds no GptOssModel; packing knows gpt-oss alone")


def _add_masks(
    model: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    assert isinstance(model, GptOssModel)
    given = {**dict(zip(_ARGUMENTS, arguments, strict=False)), **keywords}
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    tokens = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    if tokens is None or given.get("past_key_values") is not None:
        return None
    rows, length = tokens.shape[:2]
    if model.config._attn_implementation == FLEX:
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            return None
        if positions is None:
            positions = torch.arange(length, device=tokens.device)[None]
        masks = block_masks(positions.expand(rows, -1), model.config.sliding_window)
        return (), {**given, "attention_mask": masks}
    if positions is None or mask is not None:
        return None
    if is_flash_attention_requested(model.config):
        no_masks = dict.fromkeys(model.config.layer_types)
        return (), {**given, **_bounds(positions.expand(rows, -1)), "attention_mask": no_masks}
    if given.get("inputs_embeds") is None:
        given |= {"inputs_embeds": model.embed_tokens(given["input_ids"]), "input_ids": None}
    return (), {**given, "attention_mask": _dense_masks(model, given["inputs_embeds"], positions)}


def _dense_masks(model: GptOssModel, embeddings: Tensor, positions: Tensor) -> dict[str, Any]:
    described = {
        "config": model.config,
        "inputs_embeds": embeddings,
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": positions,
    }
    return {
        "full_attention": create_causal_mask(**described),
        "sliding_attention": create_sliding_window_causal_mask(**described),
    }


def _bounds(positions: Tensor) -> dict[str, Any]:
    """Documents of positions [B, T] as flash attention's keywords: where each begins in the rows laid end to end."""
    starts = document_starts(positions).flatten().nonzero().flatten()
    bounds = torch.nn.functional.pad(starts, (0, 1), value=positions.numel()).to(torch.int32)
    longest = positions.shape[1]
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
