"""Keeps packed documents apart in gpt-oss's attention.

transformers 5.23's `GptOssModel.forward` builds its masks without looking at position ids, unlike Llama's or Qwen's,
so a document would attend to those before it in its row. Here the masks are built with them, and handed over the way
`generate` hands its own: as a mapping from layer type to mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import GptOssModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask


def isolate_documents(model: torch.nn.Module) -> RemovableHandle:
    """Have each forward pass with `position_ids` and no mask tell documents by positions that begin again.

    Returns a handle whose `remove()` undoes it. Calls with an attention mask or a cache are left as they are.

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
    positions = keywords.get("position_ids")
    taken = keywords.get("attention_mask") is not None or keywords.get("past_key_values") is not None
    if arguments or positions is None or taken:
        return None
    assert isinstance(model, GptOssModel)
    embeddings = keywords.get("inputs_embeds")
    if embeddings is None:
        embeddings = model.embed_tokens(keywords["input_ids"])
    described = {
        "config": model.config,
        "inputs_embeds": embeddings,
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": positions,
    }
    masks = {
        "full_attention": create_causal_mask(**described),
        "sliding_attention": create_sliding_window_causal_mask(**described),
    }
    return arguments, {**keywords, "input_ids": None, "inputs_embeds": embeddings, "attention_mask": masks}
