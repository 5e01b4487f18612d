"""The languages that can be asked for, and finding one by its tag or by any of its names.

Tags are BCP-47 (RFC 5646), scripts ISO 15924; names, autonyms and scripts are those of the Unicode CLDR.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Literal

Direction = Literal["ltr", "rtl"]
"""Writing direction, as HTML's `dir` attribute names it."""

_LONGEST_WISH = 64
_TAG = re.compile(r"[a-z]{2,3}(-[a-z0-9]{1,8})*")
_RIGHT_TO_LEFT = frozenset({"Arab", "Hebr"})


@dataclass(frozen=True)
class Language:
    """A language of the catalogue.

    Attributes:
        tag: BCP-47 tag.
        name: English name.
        autonym: name in the language itself.
        japanese_name: name in Japanese.
        script: ISO 15924 code of the script it is written in.
        aliases: further names, and tags that mean the same (deprecated ones, or those of regions).
    """

    tag: str
    name: str
    autonym: str
    japanese_name: str
    script: str = "Latn"
    aliases: tuple[str, ...] = ()

    @property
    def direction(self) -> Direction:
        """The direction its script is written in."""
        return "rtl" if self.script in _RIGHT_TO_LEFT else "ltr"


CATALOGUE: dict[str, Language] = {
    language.tag: language
    for language in (
        Language("en", "English", "English", "英語"),
        Language("ja", "Japanese", "日本語", "日本語", "Jpan", ("Nihongo",)),
        Language("fr", "French", "français", "フランス語"),
        Language("de", "German", "Deutsch", "ドイツ語"),
        Language("es", "Spanish", "español", "スペイン語", "Latn", ("Castilian", "castellano")),
        Language(
            "zh",
            "Chinese",
            "中文",
            "中国語",
            "Hans",
            (
                *("zh-Hans", "zh-CN", "zh-SG", "zh-MY", "cmn", "Mandarin", "Mandarin Chinese", "Simplified Chinese"),
                *("Chinese (Simplified)", "汉语", "漢語", "普通话", "简体中文", "中文(简体)", "簡体中国語"),
                *("簡体字中国語", "中国語(簡体字)"),
            ),
        ),
        Language("ko", "Korean", "한국어", "韓国語", "Kore", ("조선말", "朝鮮語")),
        Language("ar", "Arabic", "العربية", "アラビア語", "Arab", ("اللغة العربية", "Modern Standard Arabic")),
        Language("hi", "Hindi", "हिन्दी", "ヒンディー語", "Deva", ("हिंदी", "ヒンディ語")),
        Language("pt", "Portuguese", "português", "ポルトガル語", "Latn", ("European Portuguese",)),
        Language("it", "Italian", "italiano", "イタリア語"),
        Language("nl", "Dutch", "Nederlands", "オランダ語", "Latn", ("Flemish", "Vlaams")),
        Language("pl", "Polish", "polski", "ポーランド語"),
        Language("ru", "Russian", "русский", "ロシア語", "Cyrl", ("русский язык",)),
        Language("uk", "Ukrainian", "українська", "ウクライナ語", "Cyrl", ("українська мова",)),
        Language("tr", "Turkish", "Türkçe", "トルコ語"),
        Language("vi", "Vietnamese", "Tiếng Việt", "ベトナム語"),
        Language("th", "Thai", "ไทย", "タイ語", "Thai", ("ภาษาไทย",)),
        Language("id", "Indonesian", "Indonesia", "インドネシア語", "Latn", ("in", "Bahasa Indonesia")),
        Language("ms", "Malay", "Melayu", "マレー語", "Latn", ("Bahasa Melayu", "Bahasa Malaysia", "Malaysian")),
        Language("fa", "Persian", "فارسی", "ペルシア語", "Arab", ("Farsi", "Dari", "ペルシャ語")),
        Language("he", "Hebrew", "עברית", "ヘブライ語", "Hebr", ("iw",)),
        Language("sv", "Swedish", "svenska", "スウェーデン語"),
        Language("da", "Danish", "dansk", "デンマーク語"),
        Language(
            "nb",
            "Norwegian Bokmål",
            "norsk bokmål",
            "ノルウェー語(ブークモール)",
            "Latn",
            ("no", "Norwegian", "norsk", "Bokmål", "ノルウェー語"),
        ),
        Language("fi", "Finnish", "suomi", "フィンランド語"),
        Language("cs", "Czech", "čeština", "チェコ語"),
        Language("sk", "Slovak", "slovenčina", "スロバキア語"),
        Language("hu", "Hungarian", "magyar", "ハンガリー語"),
        Language("ro", "Romanian", "română", "ルーマニア語", "Latn", ("mo", "Moldovan", "Moldavian")),
        Language("bg", "Bulgarian", "български", "ブルガリア語", "Cyrl"),
        Language("el", "Greek", "Ελληνικά", "ギリシャ語", "Grek", ("Modern Greek", "ギリシア語")),
        Language("hr", "Croatian", "hrvatski", "クロアチア語"),
        Language("sr", "Serbian", "српски", "セルビア語", "Cyrl", ("srpski",)),
        Language("sl", "Slovenian", "slovenščina", "スロベニア語", "Latn", ("Slovene",)),
        Language("lt", "Lithuanian", "lietuvių", "リトアニア語"),
        Language("lv", "Latvian", "latviešu", "ラトビア語"),
        Language("et", "Estonian", "eesti", "エストニア語"),
        Language("ca", "Catalan", "català", "カタロニア語", "Latn", ("Valencian", "カタルーニャ語")),
        Language("bn", "Bangla", "বাংলা", "ベンガル語", "Beng", ("Bengali",)),
        Language("ta", "Tamil", "தமிழ்", "タミル語", "Taml"),
        Language("te", "Telugu", "తెలుగు", "テルグ語", "Telu"),
        Language("mr", "Marathi", "मराठी", "マラーティー語", "Deva", ("マラーティ語",)),
        Language("ur", "Urdu", "اردو", "ウルドゥー語", "Arab"),
        Language("gu", "Gujarati", "ગુજરાતી", "グジャラート語", "Gujr", ("グジャラーティー語",)),
        Language("pa", "Punjabi", "ਪੰਜਾਬੀ", "パンジャブ語", "Guru", ("Panjabi", "パンジャーブ語")),
        Language("ml", "Malayalam", "മലയാളം", "マラヤーラム語", "Mlym"),
        Language("kn", "Kannada", "ಕನ್ನಡ", "カンナダ語", "Knda"),
        Language("sw", "Swahili", "Kiswahili", "スワヒリ語"),
        Language("fil", "Filipino", "Filipino", "フィリピノ語", "Latn", ("tl", "Tagalog", "タガログ語")),
        Language(
            "zh-Hant",
            "Traditional Chinese",
            "繁體中文",
            "繁体中国語",
            "Hant",
            (
                *("zh-TW", "zh-HK", "zh-MO", "Chinese (Traditional)", "Taiwanese Mandarin", "正體中文", "繁体中文"),
                *("中文(繁體)", "繁体字中国語", "中国語(繁体字)", "台湾華語"),
            ),
        ),
        Language(
            "pt-BR",
            "Brazilian Portuguese",
            "português (Brasil)",
            "ポルトガル語 (ブラジル)",
            "Latn",
            ("Portuguese (Brazil)", "português do Brasil", "português brasileiro", "ブラジルポルトガル語"),
        ),
    )
}
"""Every language that can be asked for, by tag."""

MEASURED: tuple[str, ...] = ("en", "ja", "fr", "de", "es", "zh", "ko", "ar", "hi")
"""Tags of the languages in which adherence is measured; detection chooses among them unless told otherwise."""


def matches(tag: str, wish: str) -> bool:
    """Whether text in `tag` is what `wish` asks for: the same tag, or a more specific one.

    Basic filtering of RFC 4647, section 3.3.1: who asks for `zh` may get `zh-Hant`.
    """
    return f"{tag}-".startswith(f"{wish}-")


def find_language(wish: str) -> Language:
    """The catalogue's entry for a tag or a name.

    A tag may be in any case, written with `-` or `_`, and more specific than the catalogue, which is then searched by
    lookup (RFC 4647, section 3.4): `fr-CA` finds `fr`, and `zh-TW` finds `zh-Hant`. A name may be English, Japanese or
    the language's own, or a common alias, in any case and Unicode normalisation form; accents may be missing in Latin
    script.

    Raises:
        ValueError: the wish names no language of the catalogue; the message suggests some that it does hold.
    """
    language = resolve(wish)
    if language is None:
        raise ValueError(_refusal(wish))
    return language


def resolve(wish: str) -> Language | None:
    """As `find_language`, but None for an unknown language."""
    key = _fold(wish)
    if len(key) > _LONGEST_WISH:
        return None
    if found := _names().get(key):
        return found
    tag = key.replace("_", "-")
    if not _TAG.fullmatch(tag):
        return None
    while tag and tag not in _tags():
        tag = tag.rpartition("-")[0]
    return _tags().get(tag)


def _refusal(wish: str) -> str:
    def listed(tags: tuple[str, ...] | list[str]) -> str:
        return ", ".join(f"{tag} ({CATALOGUE[tag].name})" for tag in tags)

    key = _fold(wish)
    close = difflib.get_close_matches(key, _names(), n=5, cutoff=0.75) if 3 < len(key) <= _LONGEST_WISH else []
    suggested = list(dict.fromkeys(_names()[name].tag for name in close))[:3]
    shown = repr(wish) if len(wish) <= _LONGEST_WISH else f"{wish[:_LONGEST_WISH]!r}…"
    hint = f"did you mean {listed(suggested)}? " if suggested else ""
    return (
        f"reasoning language {shown} is unknown; {hint}use a tag or name of one of {len(CATALOGUE)} languages, such as "
        f"{listed(MEASURED)}"
    )


@cache
def _names() -> dict[str, Language]:
    names: dict[str, Language] = {}
    for language in CATALOGUE.values():
        for name in (language.name, language.autonym, language.japanese_name, *language.aliases):
            folded = _fold(name)
            bare = "".join(one for one in unicodedata.normalize("NFKD", folded) if not unicodedata.combining(one))
            for key in (folded, bare) if bare.isascii() else (folded,):
                names.setdefault(key, language)
    return names


@cache
def _tags() -> dict[str, Language]:
    tags = {}
    for language in CATALOGUE.values():
        for alias in (language.tag, *language.aliases):
            if _TAG.fullmatch(alias.casefold()):
                tags[alias.casefold()] = language
    return tags


def _fold(text: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())
