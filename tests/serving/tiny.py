"""A tiny random gpt-oss checkpoint with a Harmony tokenizer: everything the engines need, in a few megabytes."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import GptOssConfig, GptOssForCausalLM

SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)
VOCABULARY_SIZE = 600

LINES = (
    "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n\nReasoning: medium\n\n",
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.",
    "# Instructions\n\nreasoning language: French\n\nsystem developer user assistant analysis commentary final",
    "The quick brown fox jumps over the lazy dog. What is two plus two? Two plus two is four.",
    "Combien font deux et deux ? Deux et deux font quatre. Je réfléchis à la question posée.",
    "二足す二は四です。質問について考えています。",
)


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of a few hundred tokens, with Harmony's control tokens as special tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def tiny_config(tokenizer: Tokenizer) -> GptOssConfig:
    """gpt-oss in small: mixture of experts, attention sinks, alternating sliding and full layers, YaRN."""
    return GptOssConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.token_to_id("<|startoftext|>"),
        eos_token_id=tokenizer.token_to_id("<|return|>"),
        pad_token_id=tokenizer.token_to_id("<|endoftext|>"),
    )


def save_tiny_checkpoint(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB"
) -> Path:
    """Write a random checkpoint in Hugging Face layout to `folder` (created); `shard` is the largest file size.

    The weights are drawn wide, so that greedy continuations wander instead of repeating one token.
    """
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = GptOssForCausalLM(tiny_config(tokenizer))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(0.0, 0.2)
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
