"""The words of a note, cut as a reader of the language would cut them.

Runs of Chinese characters are segmented by jieba. All other words are lower-cased and stemmed (Porter 2, English).
"""

from __future__ import annotations

import logging
import re
import tempfile
from functools import lru_cache
from typing import Any

from notellm2_ray.core.schema import Note

_CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# a run of Chinese, or a word of any other script or digits with an inner apostrophe ("don't")
_RUNS = re.compile(rf"[{_CHINESE}]+|(?:[^\W_{_CHINESE}]+(?:['’][^\W_{_CHINESE}]+)*)")
_IS_CHINESE = re.compile(f"[{_CHINESE}]")


def note_text(note: Note) -> str:
    """All text of a note: title, topics and content."""
    return "\n".join((note.title, " ".join(note.topics), note.content))


def tokenize(text: str, *, stem: bool = True) -> list[str]:
    """Words of a text: Chinese segmented, everything else lower-cased and stemmed; punctuation dropped.

    >>> tokenize("Baking three cakes 巧克力蛋糕")
    ['bake', 'three', 'cake', '巧克力', '蛋糕']
    """
    tokens: list[str] = []
    for run in _RUNS.findall(text):
        if _IS_CHINESE.match(run):
            tokens += _segmenter().lcut(run)
        else:
            word = run.lower().replace("’", "'")
            tokens.append(_stem(word) if stem else word)
    return tokens


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
