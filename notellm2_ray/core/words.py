"""The words of a note, cut as a reader of the language would cut them.

Runs of Chinese characters are segmented by jieba. Runs of Thai, Lao, Khmer and Burmese, which have no spaces between
words either, become pairs of neighbouring letters, as is usual without a dictionary. All other words are lower-cased
and stemmed (Porter 2, English).
"""

from __future__ import annotations

import logging
import re
import tempfile
from functools import lru_cache
from itertools import pairwise
from typing import Any

from notellm2_ray.core.schema import Note
from notellm2_ray.core.scripts import CHINESE, SOUTHEAST_ASIAN

# a run of Chinese, a run of a Southeast Asian script, or a word of any other script or digits with an inner apostrophe
# ("don't")
_RUNS = re.compile(
    rf"[{CHINESE}]+|[{SOUTHEAST_ASIAN}]+"
    rf"|(?:[^\W_{CHINESE}{SOUTHEAST_ASIAN}]+(?:['’][^\W_{CHINESE}{SOUTHEAST_ASIAN}]+)*)"
)
_IS_CHINESE = re.compile(f"[{CHINESE}]")
_IS_SOUTHEAST_ASIAN = re.compile(f"[{SOUTHEAST_ASIAN}]")
_LETTER = re.compile(r"\w[^\w\s]*")  # with its vowel and tone marks


def note_text(note: Note) -> str:
    """All text of a note: title, topics and content."""
    return "\n".join((note.title, " ".join(note.topics), note.content))


def tokenize(text: str, *, stem: bool = True) -> list[str]:
    """Words of a text, without punctuation.

    Chinese is segmented, Southeast Asian scripts are cut into pairs of letters, the rest is lower-cased and stemmed.

    >>> tokenize("Baking three cakes 巧克力蛋糕")
    ['bake', 'three', 'cake', '巧克力', '蛋糕']
    """
    tokens: list[str] = []
    for run in _RUNS.findall(text):
        if _IS_CHINESE.match(run):
            tokens += _segmenter().lcut(run)
        elif _IS_SOUTHEAST_ASIAN.match(run):
            tokens += _pairs(_LETTER.findall(run))
        else:
            word = run.lower().replace("’", "'")
            tokens.append(_stem(word) if stem else word)
    return tokens


def _pairs(letters: list[str]) -> list[str]:
    """Neighbouring letters joined; a single letter as it is."""
    return [first + second for first, second in pairwise(letters)] or letters


@lru_cache(maxsize=1)
def _segmenter() -> Any:
    import jieba

    jieba.setLogLevel(logging.WARNING)
    segmenter = jieba.Tokenizer()
    # By default jieba reads a dictionary cache from the shared temporary directory, where any user may have written it.
    with tempfile.TemporaryDirectory() as directory:
        segmenter.tmp_dir = directory
        segmenter.initialize()
    return segmenter


@lru_cache(maxsize=1)
def _stemmer() -> Any:
    import Stemmer

    return Stemmer.Stemmer("english")


@lru_cache(maxsize=100_000)
def _stem(word: str) -> str:
    return _stemmer().stemWord(word)
