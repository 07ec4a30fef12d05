"""Which language a text is in, as far as its letters and its commonest words tell."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping

SHARE_MIN = 0.5  # of the letters, in the language's script
_LETTER = re.compile(r"[^\W\d_]")
_WORD = re.compile(r"[^\W\d_]+")
# Language -> how the Unicode names of its letters begin.
_SCRIPTS: Mapping[str, tuple[str, ...]] = {
    "ar": ("ARABIC",), "fa": ("ARABIC",), "ur": ("ARABIC",), "bg": ("CYRILLIC",),
    "ru": ("CYRILLIC",), "uk": ("CYRILLIC",), "bn": ("BENGALI",), "el": ("GREEK",),
    "gu": ("GUJARATI",), "he": ("HEBREW",), "hi": ("DEVANAGARI",), "mr": ("DEVANAGARI",),
    "ne": ("DEVANAGARI",), "ja": ("HIRAGANA", "KATAKANA", "CJK"), "kn": ("KANNADA",),
    "ko": ("HANGUL",), "ml": ("MALAYALAM",), "pa": ("GURMUKHI",), "ta": ("TAMIL",),
    "te": ("TELUGU",), "th": ("THAI",), "zh": ("CJK",),
}  # fmt: skip
# Letters that tell languages of one script apart: language -> some of them have to occur.
_OWN: Mapping[str, str] = {"fa": "پچژگ", "ur": "ٹڈڑےں", "uk": "іїєґ", "ja": "のはにをがでとた"}
# And letters that do not.
_FOREIGN: Mapping[str, str] = {"zh": _OWN["ja"], "ar": _OWN["fa"] + _OWN["ur"], "ru": _OWN["uk"]}
# Of languages in Latin letters, the commonest words.
_COMMON: Mapping[str, str] = {
    "de": "der die das und ist nicht ein eine zu mit den von auf für sich ich im",
    "en": "the and of to is in that it for you with on are as this be",
    "es": "el la de que y en los un una es por con las para del se no",
    "fi": "ja on ei että se oli kun hän ovat mutta myös joka ole tai niin",
    "fr": "le la les de et des un une est que dans pour qui pas sur du en",
    "it": "il di che la e un una per non è con del sono della le i",
    "pl": "i w nie na się z do to że jest jak o co po ale",
    "pt": "o a de que e do da em um uma para com não os é por",
    "ro": "și de la în nu a cu este pe un o care mai din să",
    "sw": "na ya wa kwa ni katika za la cha kuwa hii yake kama watu",
    "tr": "ve bir bu da de için ile çok ne olarak daha gibi olan",
    "vi": "và của là có không được cho một trong với các này người những",
}
KNOWN = frozenset((*_SCRIPTS, *_COMMON))


def is_in(language: str, text: str) -> bool:
    """Whether a text is in the language, by its ISO 639-1 code, one of KNOWN."""
    letters = _LETTER.findall(text)
    if not letters:
        return False
    script = _SCRIPTS.get(language, ("LATIN",))
    inside = sum(unicodedata.name(one, "").startswith(script) for one in letters)
    if inside < SHARE_MIN * len(letters):
        return False
    if language in _SCRIPTS:
        own, foreign = _OWN.get(language), _FOREIGN.get(language, "")
        is_own = own is None or any(one in text for one in own)
        return is_own and not any(one in text for one in foreign)
    words = Counter(_WORD.findall(text.lower()))
    counts = {one: sum(words[word] for word in common.split()) for one, common in _COMMON.items()}
    return counts.get(language, 0) > 0 and counts[language] == max(counts.values())
