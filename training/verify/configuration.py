"""Whether the checkpoint's settings are its base's, but for what its format changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.harmony import CALL, RETURN, Codec
from cluster.verdict import Check
from training.verify.subject import Subject

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
OF_THE_FORMAT = frozenset({"quantization_config", "dtype", "torch_dtype"})
"""keys of `config.json` that follow from the format"""
INCIDENTAL = frozenset({"transformers_version", "_name_or_path"})
"""keys that say who wrote a file"""


def check_configuration(subject: Subject) -> list[Check]:
    """Checks `config`, `tokenizer`, `chat_template` and `generation`."""
    checks = {
        "config": _config_problems,
        "tokenizer": _tokenizer_problems,
        "chat_template": _template_problems,
        "generation": _generation_problems,
    }
    return [_check(name, *problems(subject)) for name, problems in checks.items()]


def _check(name: str, problems: list[str], fine: str) -> Check:
    return Check(name=name, passed=not problems, message="; ".join(problems) or fine)


def _config_problems(subject: Subject) -> tuple[list[str], str]:
    """Architecture, sizes and ids are the base's; dtype and quantization_config are the format's."""
    settings, base = _json(subject.folder, "config.json"), _json(subject.base, "config.json")
    if isinstance(settings, str) or isinstance(base, str):
        return [str(settings if isinstance(settings, str) else base)], ""
    ignored = OF_THE_FORMAT | INCIDENTAL
    different = sorted(key for key in (settings.keys() | base.keys()) - ignored if settings.get(key) != base.get(key))
    problems = [
        f"config.json says {key} = {settings.get(key)!r}, and the base {base.get(key)!r}" for key in different[:3]
    ]
    if "GptOssForCausalLM" not in (settings.get("architectures") or ["GptOssForCausalLM"]):
        problems.append(f"config.json names the architecture {settings['architectures']}, not GptOssForCausalLM")
    quantised, dtype = settings.get("quantization_config"), _dtype(settings)
    if subject.format == "bf16":
        if quantised is not None:
            problems.append("config.json has a quantization_config, and bf16 weights are not quantised: remove it")
        if dtype != "bfloat16":
            problems.append(f"config.json says dtype {dtype!r}, and the weights are bfloat16")
    else:
        if quantised != base.get("quantization_config"):
            problems.append(f"config.json's quantization_config is not the base's, as format {subject.format} keeps it")
        if subject.format == "mxfp4" and (not isinstance(quantised, dict) or quantised.get("quant_method") != "mxfp4"):
            problems.append("config.json's quantization_config does not say quant_method mxfp4")
        if dtype != _dtype(base):
            problems.append(f"config.json says dtype {dtype!r}, and the base {_dtype(base)!r}")
    method = quantised.get("quant_method") if isinstance(quantised, dict) else "none"
    return problems, f"architecture and sizes are the base's; dtype {dtype}, quantization {method}"


def _tokenizer_problems(subject: Subject) -> tuple[list[str], str]:
    problems = []
    present = [name for name in TOKENIZER_FILES if (subject.base / name).is_file()]
    for name in TOKENIZER_FILES:
        ours, theirs = subject.folder / name, subject.base / name
        if ours.is_file() != theirs.is_file():
            where = "the base has it" if theirs.is_file() else "the base has no such file"
            problems.append(f"{name} is {'missing' if theirs.is_file() else 'one too many'}: {where}")
        elif theirs.is_file() and ours.read_bytes() != theirs.read_bytes():
            problems.append(f"{name} differs from the base's: copy it from there")
    return problems, f"{', '.join(present)} identical to the base's"


def _template_problems(subject: Subject) -> tuple[list[str], str]:
    ours, theirs = _template(subject.folder), _template(subject.base)
    if ours == theirs:
        return [], "identical to the base's" if theirs is not None else "none, as in the base"
    if ours is None:
        return ["the chat template is missing: copy it from the base"], ""
    if theirs is None:
        return ["there is a chat template, and the base has none: remove it"], ""
    return ["the chat template differs from the base's: copy it from there"], ""


def _generation_problems(subject: Subject) -> tuple[list[str], str]:
    """Generation ends at the tokenizer's own `<|return|>` and `<|call|>`, with the base's other settings."""
    try:
        codec = Codec.from_folder(subject.folder)
    except (ValueError, OSError) as error:
        return [str(error)], ""
    problems = []
    config = _json(subject.folder, "config.json")
    generation: dict[str, Any] | str = {}
    if (subject.folder / "generation_config.json").is_file() or (subject.base / "generation_config.json").is_file():
        generation, base = (
            _json(subject.folder, "generation_config.json"),
            _json(subject.base, "generation_config.json"),
        )
        if isinstance(generation, dict) and isinstance(base, dict):
            keys = sorted((generation.keys() | base.keys()) - INCIDENTAL)
            different = [key for key in keys if generation.get(key) != base.get(key)]
            problems += [
                f"generation_config.json says {key} = {generation.get(key)!r}, and the base {base.get(key)!r}"
                for key in different[:3]
            ]
    problems += [text for text in (config, generation) if isinstance(text, str)]
    if problems or isinstance(config, str) or isinstance(generation, str):
        return problems, ""
    ends, of_config = _ids(generation.get("eos_token_id", config.get("eos_token_id"))), _ids(config.get("eos_token_id"))
    missing = [name for name in (RETURN, CALL) if codec.ids[name] not in ends]
    if missing:
        ids = ", ".join(f"{name} ({codec.ids[name]})" for name in missing)
        problems.append(f"generation does not stop at {ids}: add it to eos_token_id in generation_config.json")
    if codec.ids[RETURN] not in of_config:
        problems.append(f"config.json's eos_token_id {sorted(of_config)} lacks {RETURN} ({codec.ids[RETURN]})")
    return problems, f"stops at {RETURN} ({codec.ids[RETURN]}) and {CALL} ({codec.ids[CALL]})"


def _template(folder: Path) -> str | None:
    """The chat template that transformers would take: the file, or else the tokenizer's own."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    settings = _json(folder, "tokenizer_config.json")
    found = settings.get("chat_template") if isinstance(settings, dict) else None
    return None if found is None else json.dumps(found)


def _dtype(settings: dict[str, Any]) -> Any:
    return settings.get("dtype", settings.get("torch_dtype"))


def _ids(value: object) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {item for item in values if isinstance(item, int)}


def _json(folder: Path, name: str) -> dict[str, Any] | str:
    """The object in a file, or a sentence that says why there is none."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{folder / name} cannot be read ({type(error).__name__}): copy it from the base"
    return found if isinstance(found, dict) else f"{folder / name} is no JSON object: copy it from the base"
