"""Lists of GPUs as they are typed: `8xH100`. No torch, no ray."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cluster.config import ConfigError
from cluster.hardware import PROFILES, GpuProfile
from cluster.scaling import MOST_GPUS


@dataclass(frozen=True)
class GpuGroup:
    """GPUs of one type."""

    count: int
    profile: GpuProfile

    def __str__(self) -> str:
        return f"{self.count} × {self.profile.name}"


def parse_gpus(words: Iterable[str]) -> list[GpuGroup]:
    """Groups that `8xH100`, `4 x A100-40G` or `L40S` name, those of one type added up, in the order of their types.

    A name of several types (`A100`) is the first of them in `cluster.hardware`.

    Raises:
        ConfigError: a word is none of these, an unknown GPU, or there are more than `MOST_GPUS` in all.
    """
    counts: dict[str, int] = {}
    for word in words:
        found = re.fullmatch(r"\s*(?:([0-9]{1,9})\s*[x×*]\s*)?([A-Za-z][\w-]*)\s*", word, flags=re.IGNORECASE)
        if found is None:
            raise ConfigError(f"--gpus {word}: a number and a GPU are needed, like 8xH100")
        count = int(found[1] or 1)
        if count < 1:
            raise ConfigError(f"--gpus {word}: there must be one GPU or more")
        name = _profile(found[2]).name
        counts[name] = counts.get(name, 0) + count
    if not counts:
        raise ConfigError("--gpus is missing: name the GPUs, like --gpus 8xH100 --gpus 4xA100-40G")
    if sum(counts.values()) > MOST_GPUS:
        raise ConfigError(f"--gpus names {sum(counts.values())} GPUs, and plans go up to {MOST_GPUS}")
    return [GpuGroup(counts[each.name], each) for each in PROFILES if each.name in counts]


def counts_text(counts: Mapping[str, int]) -> str:
    """Like `8 × H100 + 4 × L40S`, of numbers by type."""
    return " + ".join(f"{count} × {name}" for name, count in counts.items())


def _profile(word: str) -> GpuProfile:
    named = [each for each in PROFILES if each.name.casefold() == word.casefold()]
    typed = [each for each in PROFILES if word.casefold() in (each.accelerator_type.casefold(), _short(each))]
    if not named and not typed:
        raise ConfigError(f"--gpus: {word} is unknown; known are {', '.join(each.name for each in PROFILES)}")
    return (named or typed)[0]


def _short(profile: GpuProfile) -> str:
    return profile.name.replace("-", "").casefold()
