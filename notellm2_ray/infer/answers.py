"""Cleaning a model's answers: one paragraph, whole sentences, and no endless repetition."""

from __future__ import annotations

import re
import zlib
from itertools import pairwise

# Text that compresses by more than this factor repeats itself. Whisper's decoding uses the same threshold.
_REPETITIVE = 2.4
# Some words at least three times in succession.
_LOOP = re.compile(r"(.{6,300}?)\1{2,}")
_SENTENCE = 12  # characters; a shorter one, such as the end of an abbreviation, may come again
_SENTENCE_END = re.compile(r"[.!?](?=[\s\"')\]]|$)|[。！？။។।؟۔]")  # also Burmese, Khmer, Hindi and Arabic


def one_paragraph(text: str) -> str:
    """The text on one line, without white space at its ends."""
    return re.sub(r"\s+", " ", text).strip()


def unescaped(text: str) -> str:
    """The text without backslashes before quotation marks: models copy them from a prompt, where texts are escaped.

    The next prompt would escape them again, and the backslashes double with every block.
    """
    return re.sub(r'\\+(?=")', "", text)


def cut_at_sentence(text: str) -> str:
    """A text that the token limit cut off, up to the end of its last whole sentence; all of it if there is none."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]].strip() if ends else text


def without_loop(text: str) -> str:
    """A paragraph without what it repeats, as small models do until the token limit stops them.

    Of a sentence that comes again word for word, and of words that follow each other three times or more, the first
    occurrence is kept. If the text still repeats itself with small changes, its last sentences are left out.
    """
    while is_repetitive(text) and (loop := _LOOP.search(text)):
        after = text[loop.end() :]
        after = "" if loop[1].startswith(after) else after  # the token limit cut the last repetition
        text = (text[: loop.start()] + loop[1] + after).rstrip(" ,;，、；")
    kept: dict[str, str] = {}
    for number, sentence in enumerate(_sentences(text)):
        words = sentence.strip().casefold()
        kept.setdefault(words if len(words) >= _SENTENCE else str(number), sentence)
    sentences = list(kept.values())
    while len(sentences) > 1 and is_repetitive("".join(sentences)):
        sentences.pop()
    return "".join(sentences).strip()


def _sentences(text: str) -> list[str]:
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    return [text[begin:end] for begin, end in pairwise(ends) if text[begin:end].strip()]


def is_repetitive(text: str) -> bool:
    """Whether a text repeats itself without end, as some models do."""
    # A byte for each different character: in UTF-8 all letters of Thai, say, begin with the same byte, so that any text
    # of theirs compresses well.
    numbers = {character: number % 256 for number, character in enumerate(dict.fromkeys(text))}
    data = bytes(map(numbers.__getitem__, text))
    # In a short text zlib's header outweighs what can be compressed.
    return len(data) > 60 and len(data) / len(zlib.compress(data)) > _REPETITIVE
