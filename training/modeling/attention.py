"""Attention with sinks as one fused kernel, over rows that hold several documents.

gpt-oss adds a learned logit, the sink, to each head's softmax and drops its share afterwards (Agarwal et al. 2025,
arXiv:2508.10925, section 2.2). FlexAttention (Dong et al. 2024, arXiv:2412.05496) knows no sinks, but returns the
log-sum-exp of each query's scores, and the share that stays with the keys is sigmoid(lse - sink).

Importing this module registers `FLEX` with transformers. Shape legend: B rows, T tokens, D size of a head.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flex_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FLEX = "flex_sinks"
"""transformers' name, `config._attn_implementation`, of the attention in this module"""

FLASH_3 = "kernels-community/vllm-flash-attn3"
"""transformers' name of FlashAttention 3 with sinks: the hub repository that the package kernels fetches it from"""

BLOCK = 128
"""queries, and keys, in a block of a mask: FlexAttention's default"""


def implementation(choice: str, device: torch.device) -> str:
    """transformers' name for `model.attention` = `choice` on `device`.

    auto is `FLEX` on a GPU and eager on a CPU, where FlexAttention has no backward pass.

    flash_attention_3 does not train sinks: the kernel's autograd function returns no gradient for them
    (huggingface/kernels-community, vllm-flash-attn3/torch-ext/vllm_flash_attn3/flash_attn_interface.py), which frozen
    sinks do not need. Whether its gradients of queries, keys and values count the sinks is not verified;
    nvidia-cosmos/cosmos-rl issue 219 says that they did not in August 2025.

    Without the package kernels it is flex_attention instead, and the log says so.

    Raises:
        ValueError: the device rules the choice out.
    """
    on_gpu = device.type == "cuda"
    if choice == "auto":
        return FLEX if on_gpu else "eager"
    if choice == "eager":
        return "eager"
    if choice not in ("flex_attention", "flash_attention_3"):
        raise ValueError(f'model.attention = "{choice}" is unknown; set it to "auto"')
    if not on_gpu:
        raise ValueError(f'model.attention = "{choice}" needs a GPU; set it to "eager" to train on a CPU')
    if choice == "flex_attention":
        return FLEX
    if importlib.util.find_spec("kernels") is None:
        logging.getLogger(__name__).warning(
            'model.attention = "flash_attention_3" needs the package kernels, which is not installed (pip install '
            "kernels): flex_attention is used instead"
        )
        return FLEX
    return FLASH_3


def flex_sinks(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form of transformers' attention functions, exact in the sinks and in their gradient.

    Unlike transformers' `flex_attention_forward` (transformers/integrations/flex_attention.py), the log-sum-exp stays
    in the kernel's fp32.

    Args:
        module: the layer; one that says `is_causal` must come with a mask.
        query: [B, query heads, T, D].
        key: [B, key heads, T, D]; query heads are a multiple of key heads.
        value: [B, key heads, T, D].
        attention_mask: of `block_masks`, or of transformers' `flex_attention_mask`; None lets each query see all keys.
        scaling: of the scores; None is 1 / √D.
        dropout: must be 0, FlexAttention has none.
        s_aux: sinks [query heads]; None is attention without them.

    Returns:
        [B, T, query heads, D], contiguous, in the query's dtype; and None in place of attention weights.

    Raises:
        ValueError: dropout, another kind of mask, or a backward pass on a CPU.
        RuntimeError: outside torch.compile, more shapes of batches than it compiles for.
    """
    if dropout > 0:
        raise ValueError(
            f'attention "{FLEX}" has no dropout and got {dropout}; set attention_dropout = 0 in the model\'s config, '
            'or model.attention = "eager"'
        )
    if not isinstance(attention_mask, BlockMask) and (
        attention_mask is not None or getattr(module, "is_causal", False)
    ):
        raise ValueError(
            f'attention "{FLEX}" takes a BlockMask and got {type(attention_mask).__name__}; call isolate_documents on '
            'the model, or set model.attention = "eager"'
        )
    output, lse = _attend(query, key, value, attention_mask, scaling, kwargs.get("kernel_options"))
    if s_aux is not None:
        output = apply_sinks(output, lse, s_aux)
    return output.to(query.dtype).transpose(1, 2).contiguous(), None


def apply_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """What attention without sinks becomes with them: a share 1 - sigmoid(lse - sink) of the softmax goes to the sink.

    Args:
        output: attention without sinks [B, heads, T, D].
        lse: log-sum-exp of each query's scores [B, heads, T], in fp32 or better.
        sinks: one logit a head [heads].

    Returns:
        [B, heads, T, D] in the precision of `lse`.
    """
    kept = torch.sigmoid(lse - sinks.to(lse.dtype).view(1, -1, 1))
    return output * kept.unsqueeze(-1)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: BlockMask | None,
    scaling: float | None,
    kernel_options: Any,
) -> tuple[Tensor, Tensor]:
    """Attention [B, heads, T, D] and log-sum-exp [B, heads, T] of FlexAttention."""
    on_cpu = query.device.type == "cpu"
    if on_cpu and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise ValueError(
            f'attention "{FLEX}" trains on a GPU alone, FlexAttention has no backward pass on a CPU; '
            'set model.attention = "eager"'
        )
    # Compiled for a CPU, FlexAttention returns no log-sum-exp; uncompiled it does, from a dense softmax.
    direct = on_cpu or torch.compiler.is_compiling()
    attend: Any = flex_attention if direct else _compiled_flex_attention()
    try:
        output, auxiliary = attend(
            query,
            key,
            value,
            block_mask=block_mask,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            kernel_options=kernel_options,
            return_aux=AuxRequest(lse=True),
        )
    except FailOnRecompileLimitHit as error:
        raise RuntimeError(
            "attention is compiled for each shape of a batch, and there were more shapes than "
            "torch._dynamo.config.recompile_limit; give all batches the same numbers of rows and tokens"
        ) from error
    return output, auxiliary.lse


@functools.cache
def _compiled_flex_attention() -> Callable[..., Any]:
    # With fullgraph a shape too many is an error; without it, it would run uncompiled and hold all T × T scores.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def block_masks(position_ids: Tensor, sliding_window: int) -> dict[str, BlockMask]:
    """Masks of causal attention inside each document, for gpt-oss's two types of layers.

    A document begins wherever a position is not its predecessor's plus one, as in transformers'
    `find_packed_sequence_indices`. Query q then sees the keys lo(q) to q, with lo(q) the start of its document or,
    where that is later, q - window + 1. As lo never falls, the first and last query of a block tell which blocks of
    keys it touches, so the tables take O((T / BLOCK)²) work and no score is looked at. They equal those of
    `torch.nn.attention.flex_attention.create_block_mask`. Nothing waits for the device.

    Rows that are padded on the right and hold one document need no more than its positions 0, 1, 2, …: causal
    attention keeps real tokens from what comes after them. What padding attends to is of no account.

    Args:
        position_ids: integers [B, T].
        sliding_window: tokens that a query sees in sliding layers, itself among them.

    Returns:
        `full_attention` and `sliding_attention`, each [B, 1, T, T], on the device of `position_ids`.
    """
    indices = torch.arange(position_ids.shape[1], device=position_ids.device, dtype=torch.int32)
    starts = torch.where(document_starts(position_ids), indices, 0).cummax(dim=1).values
    return {
        "full_attention": _block_mask(starts),
        "sliding_attention": _block_mask(torch.maximum(starts, indices - (sliding_window - 1))),
    }


def document_starts(position_ids: Tensor) -> Tensor:
    """Whether a document begins at each token: bool [B, T] of positions [B, T]."""
    follows = torch.diff(position_ids, dim=1) == 1
    return torch.nn.functional.pad(~follows, (1, 0), value=True)


def _block_mask(lowest: Tensor) -> BlockMask:
    """The mask of queries q [B, T] that see the keys from `lowest`[b, q], which never falls along a row, to q."""
    length = lowest.shape[1]
    first = torch.arange(0, length, BLOCK, device=lowest.device, dtype=torch.int32)
    last = first + (BLOCK - 1)
    last_query = last.clamp(max=length - 1)
    touched = (first <= last_query[:, None]) & (last >= lowest[:, first][..., None])
    # As create_block_mask pads with what is not allowed, a block of queries that sticks out over T is never full.
    full = (last < first[:, None]) & (first >= lowest[:, last_query][..., None]) & (last < length)[:, None]
    partial_count, partial_indices = _block_table(touched & ~full)
    full_count, full_indices = _block_table(full)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_indices,
        full_count,
        full_indices,
        BLOCK_SIZE=BLOCK,
        mask_mod=_from_lowest_to_query(lowest),
        seq_lengths=(length, length),
    )


def _block_table(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Of [B, query blocks, key blocks]: how many are chosen in each row, and their indices before all others."""
    count = chosen.sum(dim=-1, dtype=torch.int32)
    indices = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)
    return count[:, None], indices[:, None].contiguous()


def _from_lowest_to_query(lowest: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    # One code object for all batches and both types of layers, so torch.compile compiles it once; `lowest` is an input.
    def allowed(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= lowest[row, query])

    return allowed


ALL_ATTENTION_FUNCTIONS.register(FLEX, flex_sinks)
ALL_MASK_ATTENTION_FUNCTIONS.register(FLEX, flex_attention_mask)
