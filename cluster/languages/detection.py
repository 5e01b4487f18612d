"""Which language a text is written in: its script settles most languages, py3langid those that share a script.

What cannot be told apart:

- Portuguese and Brazilian Portuguese. Either is reported as `pt`, or as `pt-BR` where that alone is a candidate.
- Serbian in Latin script and Croatian: `hr`, or `sr` where `hr` is no candidate. Cyrillic script means `sr`.
- Indonesian and Malay, often, and Norwegian and Danish, now and then, in texts of a single sentence.
"""

from __future__ import annotations

import copy
import unicodedata
from collections import Counter
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any, NamedTuple

from cluster.languages.catalogue import CATALOGUE, MEASURED

UNDETERMINED = "und"
"""BCP-47 tag for text whose language cannot be told (RFC 5646, section 4.1)."""

MINIMUM_LETTERS = 8
"""Below this many letters an identifier guesses: `42` and the empty string are no language."""

_TWINS = {"pt": "pt-BR", "pt-BR": "pt", "sr": "hr", "hr": "sr", "id": "ms", "ms": "id"}
_LABELS = {"nb": "no", "fil": "tl", "pt-BR": "pt"}
"""py3langid's labels where they are not the tag"""
_LETTER_SCRIPTS = {"Jpan": ("Hani", "Hrkt"), "Hans": ("Hani",), "Hant": ("Hani",), "Kore": ("Hang",)}
"""scripts of the letters that are counted, where the language's script is a compound of them or a variant"""
_UNICODE_NAMES = (
    ("CJK", "Hani", 2),
    ("HIRAGANA", "Hrkt", 2),
    ("KATAKANA", "Hrkt", 2),
    ("HANGUL", "Hang", 2),
    ("ARABIC", "Arab", 1),
    ("DEVANAGARI", "Deva", 1),
    ("LATIN", "Latn", 1),
    ("CYRILLIC", "Cyrl", 1),
    ("GREEK", "Grek", 1),
    ("HEBREW", "Hebr", 1),
    ("THAI", "Thai", 1),
    ("BENGALI", "Beng", 1),
    ("TAMIL", "Taml", 1),
    ("TELUGU", "Telu", 1),
    ("GUJARATI", "Gujr", 1),
    ("GURMUKHI", "Guru", 1),
    ("MALAYALAM", "Mlym", 1),
    ("KANNADA", "Knda", 1),
)
"""start of a letter's Unicode name, its script (ISO 15924), and how many letters it counts as"""
_OTHER = "Zyyy"


class Detection(NamedTuple):
    """A language found in a text, and how sure that is.

    `confidence` is the share of the text's letters that are in the language's script, times, where languages share
    the script, the probability that the identifier gives this one among them; 0 where nothing could be told.
    """

    tag: str
    confidence: float


def detect_language(text: str, among: Iterable[str] | None = None) -> str:
    """The BCP-47 tag of the candidate that `text` is written in, or `und` when there is too little to tell.

    The script with the most letters decides, except that kana beside Chinese characters means Japanese. Ideographs,
    kana and Hangul syllables count double, since one carries about as much as two Latin letters. Where several
    candidates share the script, py3langid chooses among them; `zh` and `zh-Hant` are told apart by characters that only
    GB 2312 or only Big5 holds. Text in a script of no candidate is `und`; text in another language of the script is
    taken for the nearest candidate.

    Args:
        text: some sentences, or one; the more, the surer.
        among: tags of `CATALOGUE` to choose from; None for `MEASURED`.

    Raises:
        ValueError: `among` holds a tag that is not in the catalogue.
    """
    return detect(text, among).tag


def detect(text: str, among: Iterable[str] | None = None) -> Detection:
    """As `detect_language`, with how sure it is.

    Raises:
        ValueError: as `detect_language`.
    """
    by_script = _by_script(MEASURED if among is None else frozenset(among))
    counts = dict.fromkeys(by_script, 0)
    total = 0
    for character, times in Counter(text).items():
        script, weight = _script_of(character)
        total += weight * times
        counts[script if script in by_script else _OTHER] += weight * times
    if total < MINIMUM_LETTERS:
        return Detection(UNDETERMINED, 0.0)
    script = max(counts, key=lambda name: counts[name])
    candidates = by_script[script]
    share = counts[script] / total
    if script in ("Hani", "Hrkt") and counts.get("Hrkt"):
        return Detection("ja", (counts["Hani"] + counts["Hrkt"]) / total)
    if script == "Hani":
        return Detection(_of_ideographs(text, candidates), share)
    if len(candidates) > 1:
        tag, probability = _identify(text, candidates)
        return Detection(tag, share * probability)
    return Detection(candidates[0], share) if candidates else Detection(UNDETERMINED, 0.0)


def detection_candidates(wanted: str | None = None) -> frozenset[str]:
    """Tags to detect among when text in the language `wanted` is expected: the catalogue.

    Of two languages that cannot be told apart reliably only the wanted one is a candidate, so that text in it is not
    taken for the other.
    """
    return frozenset(CATALOGUE) - {_TWINS.get(wanted or "", "")}


@lru_cache(maxsize=128)
def _by_script(among: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Candidates for each script that any is written in, in the order in which scripts of equal weight win."""
    tags = frozenset(among)
    if unknown := sorted(tags - CATALOGUE.keys()):
        raise ValueError(f"among holds {unknown[0]!r}, which is no tag of the catalogue")
    found: dict[str, list[str]] = {script: [] for _, script, _ in _UNICODE_NAMES}
    for tag, language in CATALOGUE.items():
        if tag not in tags or (tag == "pt-BR" and "pt" in tags):
            continue
        for script in _LETTER_SCRIPTS.get(language.script, (language.script,)):
            found[script].append(tag)
        if tag == "sr" and "hr" not in tags:
            found["Latn"].append(tag)
    return {script: tuple(candidates) for script, candidates in found.items() if candidates} | {_OTHER: ()}


@cache
def _script_of(character: str) -> tuple[str, int]:
    if not character.isalpha():
        return _OTHER, 0
    name = unicodedata.name(character, "")
    found = ((script, weight) for start, script, weight in _UNICODE_NAMES if name.startswith(start))
    return next(found, (_OTHER, 1))


def _of_ideographs(text: str, candidates: tuple[str, ...]) -> str:
    chinese = [tag for tag in candidates if tag != "ja"]
    if len(chinese) > 1:
        return "zh-Hant" if sum(map(_traditional, text)) > 0 else "zh"
    return chinese[0] if chinese else "ja"


@cache
def _traditional(character: str) -> int:
    """1 for a character that only traditional text uses, -1 for one of simplified text, 0 for any other.

    GB 2312 holds the characters of simplified Chinese, Big5 those of traditional Chinese.
    """
    return _encodes(character, "big5") - _encodes(character, "gb2312")


def _encodes(character: str, encoding: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _identify(text: str, candidates: tuple[str, ...]) -> tuple[str, float]:
    label, probability = _identifier(candidates).classify(text)
    return next(tag for tag in candidates if _LABELS.get(tag, tag) == label), float(probability)


@lru_cache(maxsize=32)
def _identifier(candidates: tuple[str, ...]) -> Any:
    identifier = copy.copy(_whole_identifier())
    identifier.set_languages([_LABELS.get(tag, tag) for tag in candidates])
    return identifier


@cache
def _whole_identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
