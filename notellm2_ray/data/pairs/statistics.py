"""The dataset statistics of the paper's Table 1.

Words are separated by white space. In a text of a script that is written without spaces (Chinese, Thai and others)
every character counts as a word. In averages over notes, a note without a title counts as zero words; "words per topic"
is an average over the topics of all notes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from notellm2_ray.core.scripts import is_mostly_unspaced

_ROWS = (
    ("# notes", "num_notes"),
    ("# note pairs", "num_pairs"),
    ("avg. # words per title", "words_per_title"),
    ("avg. # topics per note", "topics_per_note"),
    ("avg. # words per topic", "words_per_topic"),
    ("avg. # words per content", "words_per_content"),
)


def count_words(text: str) -> int:
    """The number of words of ``text``, or of characters in a script without spaces between words."""
    words = text.split()
    return sum(map(len, words)) if is_mostly_unspaced(text) else len(words)


class NoteStatistics:
    """Running averages over batches of notes, which give a column of Table 1."""

    def __init__(self) -> None:
        self.num_notes = 0
        self._topics = self._title_words = self._topic_words = self._content_words = 0

    def add(self, batch: pa.RecordBatch | pa.Table) -> None:
        """Count the notes of ``batch``: columns title, topics and content."""
        self.num_notes += batch.num_rows
        self._title_words += sum(map(count_words, batch.column("title").to_pylist()))
        self._content_words += sum(map(count_words, batch.column("content").to_pylist()))
        topics = [topic for topics in batch.column("topics").to_pylist() for topic in topics]
        self._topics += len(topics)
        self._topic_words += sum(map(count_words, topics))

    def column(self, num_pairs: int) -> dict[str, float]:
        """One column of the table; an average over nothing is 0."""
        notes, topics = max(self.num_notes, 1), max(self._topics, 1)
        return {
            "num_notes": self.num_notes,
            "num_pairs": num_pairs,
            "words_per_title": self._title_words / notes,
            "topics_per_note": self._topics / notes,
            "words_per_topic": self._topic_words / topics,
            "words_per_content": self._content_words / notes,
        }


def describe_notes(batches: Iterable[pa.RecordBatch], num_pairs: int) -> dict[str, float]:
    """One column of Table 1, for the notes of all ``batches``."""
    statistics = NoteStatistics()
    for batch in batches:
        statistics.add(batch)
    return statistics.column(num_pairs)


def format_statistics(statistics: Mapping[str, Mapping[str, Any]]) -> str:
    """Table 1 as aligned text, a column for each entry of ``statistics`` (training, testing)."""
    names = list(statistics)
    lines = [["", *names]]
    for label, key in _ROWS:
        lines.append([label, *(_number(statistics[name][key]) for name in names)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(names) + 1)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
