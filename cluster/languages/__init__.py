"""Languages: which there are, how the wish to think in one is written into a prompt, which one a text is written in.

Training data and the endpoint both call `reasoning_instruction`, so a model is asked in serving exactly as it was
asked in training.
"""

from __future__ import annotations

from cluster.languages.catalogue import CATALOGUE, MEASURED, Direction, Language, find_language, matches, resolve
from cluster.languages.detection import (
    MINIMUM_LETTERS,
    UNDETERMINED,
    Detection,
    detect,
    detect_language,
    detection_candidates,
)
from cluster.languages.instruction import INSTRUCTION, InstructionForm, declared_language, reasoning_instruction
from cluster.languages.openings import opening

__all__ = [
    "CATALOGUE",
    "INSTRUCTION",
    "MEASURED",
    "MINIMUM_LETTERS",
    "UNDETERMINED",
    "Detection",
    "Direction",
    "InstructionForm",
    "Language",
    "declared_language",
    "detect",
    "detect_language",
    "detection_candidates",
    "find_language",
    "matches",
    "opening",
    "reasoning_instruction",
    "resolve",
]
