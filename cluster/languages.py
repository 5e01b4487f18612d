"""The languages Raysoner reasons in, and the one place that decides how the wish for one is written into a prompt.

Training data and the endpoint both call `reasoning_instruction`, so a model is asked in serving exactly as it was
asked in training. Detection serves evaluation: which language is this text written in?
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache

UNDETERMINED = "und"
"""BCP-47 tag for text whose language cannot be told (RFC 5646, section 4.1)."""

MINIMUM_LETTERS = 8
"""Below this many letters an identifier guesses: `42` and the empty string are no language."""


@dataclass(frozen=True)
class Language:
    """A language by its BCP-47 tag, its English name and its name in itself."""

    tag: str
    name: str
    native_name: str


LANGUAGES: dict[str, Language] = {
    language.tag: language
    for language in (
        Language("en", "English", "English"),
        Language("ja", "Japanese", "日本語"),
        Language("fr", "French", "français"),
        Language("de", "German", "Deutsch"),
        Language("es", "Spanish", "español"),
        Language("zh", "Chinese", "中文"),
        Language("ko", "Korean", "한국어"),
        Language("ar", "Arabic", "العربية"),
        Language("hi", "Hindi", "हिन्दी"),
    )
}


def find_language(wish: str) -> Language:
    """The catalogue entry for a BCP-47 tag (`fr`, `fr-CA`), an English name or a native name, in any case.

    Raises:
        ValueError: the wish names no language of the catalogue; the message lists what it holds.
    """
    key = wish.strip().casefold()
    for language in LANGUAGES.values():
        names = (language.tag, language.name.casefold(), language.native_name.casefold())
        if key in names or key.replace("_", "-").split("-")[0] == language.tag:
            return language
    known = ", ".join(f"{language.tag} ({language.name})" for language in LANGUAGES.values())
    raise ValueError(f"reasoning language {wish!r} is unknown; use one of {known}")


def reasoning_instruction(tag: str) -> str:
    """The developer instruction that asks for thinking in a language, e.g. `reasoning language: French`.

    The form is that of the HuggingFaceH4/Multilingual-Thinking data set's system messages.
    """
    return f"reasoning language: {LANGUAGES[tag].name}"


def detect_language(text: str) -> str:
    """The BCP-47 tag of the catalogue's language that `text` is written in, or `und` when there is too little to tell.

    Scripts settle Japanese, Chinese, Korean, Arabic and Hindi; py3langid, restricted to the catalogue, the others.
    The script with the most letters decides, except that kana beside Chinese characters means Japanese. Ideographs,
    kana and Hangul syllables count double, since one carries about as much as two Latin letters.
    """
    scripts = _count_scripts(text)
    if sum(scripts.values()) < MINIMUM_LETTERS:
        return UNDETERMINED
    script = max(scripts, key=lambda name: scripts[name])
    if script in ("HAN", "KANA"):
        return "ja" if scripts["KANA"] > 0 else "zh"
    by_script = {"HANGUL": "ko", "ARABIC": "ar", "DEVANAGARI": "hi"}
    if script in by_script:
        return by_script[script]
    return _latin_identifier().classify(text)[0] if script == "LATIN" else UNDETERMINED


def _count_scripts(text: str) -> dict[str, int]:
    counts = dict.fromkeys(("HAN", "KANA", "HANGUL", "ARABIC", "DEVANAGARI", "LATIN", "OTHER"), 0)
    for character in text:
        if not character.isalpha():
            continue
        script, weight = _script_of(character)
        counts[script] += weight
    return counts


@cache
def _script_of(character: str) -> tuple[str, int]:
    name = unicodedata.name(character, "")
    if name.startswith("CJK"):
        return "HAN", 2
    if name.startswith(("HIRAGANA", "KATAKANA")):
        return "KANA", 2
    for script, weight in (("HANGUL", 2), ("ARABIC", 1), ("DEVANAGARI", 1), ("LATIN", 1)):
        if name.startswith(script):
            return script, weight
    return "OTHER", 1


@cache
def _latin_identifier():  # type: ignore[no-untyped-def]
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(["en", "fr", "de", "es"])
    return identifier
