"""What a model answered, made fit to be kept: one paragraph, whole sentences, no endless repetition."""

from __future__ import annotations

import re
import zlib

# Text that compresses better than this repeats itself; Whisper's decoding draws the line at the same ratio.
_REPETITIVE = 2.4
_SENTENCE_END = re.compile(r"[.!?](?=[\s\"')\]]|$)|[。！？]")


def one_paragraph(text: str) -> str:
    """The text on one line, without blanks around it."""
    return re.sub(r"\s+", " ", text).strip()


def cut_at_sentence(text: str) -> str:
    """The text up to its last sentence's end, which running into the limit of tokens cut; all of it if it has none."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return text[: ends[-1]].strip() if ends else text


def is_repetitive(text: str) -> bool:
    """Whether a text goes round in circles, as a model does that has lost its thread."""
    data = text.encode()
    # Short texts carry zlib's own header and have nothing to compress yet.
    return len(data) > 60 and len(data) / len(zlib.compress(data)) > _REPETITIVE
