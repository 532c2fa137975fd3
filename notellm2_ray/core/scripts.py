"""The writing systems of texts: which are written without spaces between words, and which one a text is in."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache

CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_KANA = "\u3040-\u30ff\u31f0-\u31ff"
_THAI_AND_LAO = "\u0e00-\u0eff"
_BURMESE = "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"
_KHMER = "\u1780-\u17ff"
# Characters whose neighbours of the same kind are cut into pairs, since no dictionary for them is installed.
SOUTHEAST_ASIAN = _THAI_AND_LAO + _BURMESE + _KHMER
_UNSPACED = re.compile(f"[{CHINESE}{_KANA}{SOUTHEAST_ASIAN}]")  # without Hangul: Korean has spaces

# The first word of a character's Unicode name -> the script as people call it.
_NAMES = {
    "CJK": "Chinese",
    "HIRAGANA": "Japanese",
    "KATAKANA": "Japanese",
    "KATAKANA-HIRAGANA": "Japanese",
    "HANGUL": "Korean",
    "MYANMAR": "Burmese",
    "FULLWIDTH": "Latin",
}
_KANA_SHARE = 0.1  # Japanese is mostly written with Chinese characters; Chinese has next to no kana


def is_mostly_unspaced(text: str) -> bool:
    """Whether more than half of the letters and digits are of a script without spaces between words.

    These are Chinese, Japanese, Thai, Lao, Khmer and Burmese.
    """
    if text.isascii():
        return False
    letters = sum(character.isalnum() for character in text)
    return 2 * sum(character.isalnum() for character in _UNSPACED.findall(text)) > letters


def cut_characters(text: str, limit: int) -> str:
    """The first ``limit`` characters, and fewer where the cut would part a letter from its vowel or tone marks."""
    end = min(limit, len(text))
    while 0 < end < len(text) and unicodedata.category(text[end]).startswith("M"):
        end -= 1
    return text[: end or limit]


def script_of(text: str) -> str:
    """The script that most letters of a text are in ("Latin", "Chinese", "Thai"...); "none" without letters."""
    counts = Counter(map(_script, filter(str.isalpha, text)))
    if not counts:
        return "none"
    kana = counts["Japanese"]
    if kana >= _KANA_SHARE * (kana + counts["Chinese"]) and kana:
        counts["Japanese"] += counts.pop("Chinese", 0)
    return max(sorted(counts), key=counts.__getitem__)


@lru_cache(maxsize=10_000)
def _script(letter: str) -> str:
    first = unicodedata.name(letter, "OTHER").split()[0]
    return _NAMES.get(first, first.capitalize())
