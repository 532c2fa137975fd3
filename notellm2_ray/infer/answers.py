"""Cleaning a model's answers: one paragraph, whole sentences, and a test for endless repetition."""

from __future__ import annotations

import re
import zlib

# Text that compresses by more than this factor repeats itself. Whisper's decoding uses the same threshold.
_REPETITIVE = 2.4
_SENTENCE_END = re.compile(r"[.!?](?=[\s\"')\]]|$)|[。！？။។।؟۔]")  # also Burmese, Khmer, Hindi and Arabic


def one_paragraph(text: str) -> str:
    """The text on one line, without white space at its ends."""
    return re.sub(r"\s+", " ", text).strip()


def cut_at_sentence(text: str) -> str:
    """A text that the token limit cut off, up to the end of its last whole sentence; all of it if there is none."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]].strip() if ends else text


def is_repetitive(text: str) -> bool:
    """Whether a text repeats itself without end, as some models do."""
    # A byte for each different character: in UTF-8 all letters of Thai, say, begin with the same byte, so that any text
    # of theirs compresses well.
    numbers = {character: number % 256 for number, character in enumerate(dict.fromkeys(text))}
    data = bytes(map(numbers.__getitem__, text))
    # In a short text zlib's header outweighs what can be compressed.
    return len(data) > 60 and len(data) / len(zlib.compress(data)) > _REPETITIVE
