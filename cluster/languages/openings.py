"""How a thought begins in each language: what thinking that came in another language is begun with."""

from __future__ import annotations

from cluster.languages.catalogue import CATALOGUE

_OPENINGS: dict[str, str] = {
    "en": "Let me think step by step.",
    "ja": "順を追って考えます。",
    "fr": "Réfléchissons étape par étape.",
    "de": "Ich denke Schritt für Schritt nach.",
    "es": "Pensemos paso a paso.",
    "zh": "我一步一步地思考。",
    "ko": "차근차근 생각해 보겠습니다.",
    "ar": "لنفكر خطوة بخطوة.",
    "hi": "चरण दर चरण सोचते हैं।",
    "pt": "Vamos pensar passo a passo.",
    "it": "Ragioniamo passo dopo passo.",
    "nl": "Laten we stap voor stap nadenken.",
    "pl": "Pomyślmy krok po kroku.",
    "ru": "Сначала разберёмся, что здесь спрашивают.",
    "uk": "Давайте поміркуємо крок за кроком.",
    "tr": "Adım adım düşünelim.",
    "vi": "Hãy suy nghĩ từng bước một.",
    "th": "ลองคิดทีละขั้นตอน",
    "id": "Mari kita berpikir langkah demi langkah.",
    "ms": "Mari kita fikirkan langkah demi langkah.",
    "fa": "بیایید گام به گام فکر کنیم.",
    "he": "נחשוב צעד אחר צעד.",
    "sv": "Låt oss tänka steg för steg.",
    "da": "Lad os tænke trin for trin.",
    "nb": "La oss tenke steg for steg.",
    "fi": "Mietitään vaihe vaiheelta.",
    "cs": "Přemýšlejme krok za krokem.",
    "sk": "Premýšľajme krok za krokom.",
    "hu": "Gondolkodjunk lépésről lépésre.",
    "ro": "Să gândim pas cu pas.",
    "bg": "Нека помислим стъпка по стъпка.",
    "el": "Ας σκεφτούμε βήμα προς βήμα.",
    "hr": "Razmislimo korak po korak.",
    "sr": "Размислимо корак по корак.",
    "sl": "Najprej premislimo, kaj nas tukaj sprašujejo.",
    "lt": "Pagalvokime žingsnis po žingsnio.",
    "lv": "Padomāsim soli pa solim.",
    "et": "Mõtleme samm-sammult.",
    "ca": "Pensem pas a pas.",
    "bn": "ধাপে ধাপে ভাবা যাক।",
    "ta": "படிப்படியாகச் சிந்திப்போம்.",
    "te": "దశలవారీగా ఆలోచిద్దాం.",
    "mr": "टप्प्याटप्प्याने विचार करूया.",
    "ur": "آئیے قدم بہ قدم سوچتے ہیں۔",
    "gu": "ચાલો પગલાવાર વિચારીએ.",
    "pa": "ਆਓ ਕਦਮ ਦਰ ਕਦਮ ਸੋਚੀਏ।",
    "ml": "നമുക്ക് ഘട്ടംഘട്ടമായി ചിന്തിക്കാം.",
    "kn": "ಹಂತ ಹಂತವಾಗಿ ಯೋಚಿಸೋಣ.",
    "sw": "Tufikirie hatua kwa hatua.",
    "fil": "Mag-isip tayo nang sunud-sunod na hakbang.",
    "zh-Hant": "我一步一步地思考這個問題。",
    "pt-BR": "Vamos pensar passo a passo.",
}
_UNSPACED = frozenset({"Jpan", "Hans", "Hant", "Thai"})
"""scripts whose sentences follow each other without a space"""


def opening(tag: str) -> str:
    """The first sentence of a thought in the language `tag` of `CATALOGUE`, with the space after it."""
    return _OPENINGS[tag] + ("" if CATALOGUE[tag].script in _UNSPACED else " ")
