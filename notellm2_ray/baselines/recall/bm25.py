"""BM25 over title, topics and content: the text baseline. :mod:`notellm2_ray.core.words` splits texts into words."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from notellm2_ray.baselines.recall.baseline import Ranks, RecallBaseline, RecallData
from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings.baselines import Bm25Settings
from notellm2_ray.core.words import note_text, tokenize
from notellm2_ray.evaluate.recall.metrics import ranks_by_query


class Bm25:
    """BM25 (Lucene's variant) over the texts of a pool.

    Memory: the inverted index, and one row of scores while ranking.
    """

    def __init__(self, texts: Iterable[str], settings: Bm25Settings | None = None):
        """Index the texts of the pool's notes, in the order of its rows.

        Raises:
            DataError: there are no notes, or none has a word.
        """
        import bm25s

        self._words: dict[str, int] = {}
        documents = [array("i", self._ids(text)) for text in texts]
        self.num_notes = len(documents)
        if not self._words:
            raise DataError(
                f"BM25: no word in the texts of {len(documents)} notes: leave bm25 out of evaluate.baselines"
            )
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        knobs = settings or Bm25Settings()
        self._index = bm25s.BM25(k1=knobs.k1, b=knobs.b)
        self._index.index((documents, self._words), create_empty_token=False, show_progress=False)

    def scores(self, query_text: str) -> np.ndarray:
        """(P,) float32 scores of the pool's notes; a word that the query repeats counts each time."""
        known = [self._words[word] for word in tokenize(query_text) if word in self._words]
        return self._index.get_scores_from_ids(known) if known else np.zeros(self.num_notes, dtype=np.float32)

    def ranks(self, query_texts: Sequence[str], query_rows: np.ndarray, target_rows: np.ndarray) -> np.ndarray:
        """Rank of each pair's target among the pool; the query note is left out, ties count against the target.

        Args:
            query_texts: (Q,) text of each pair's query.
            query_rows: (Q,) row of the query note in the pool, -1 where it is not in it.
            target_rows: (Q,) row of the target note in the pool.

        Returns:
            (Q,) int64, 1 is best. Notes that share no word with the query all tie.
        """
        return ranks_by_query(self.scores, query_texts, query_rows, target_rows)

    def _ids(self, text: str) -> list[int]:
        return [self._words.setdefault(word, len(self._words)) for word in tokenize(text)]


def _ranks(data: RecallData) -> Ranks:
    index = Bm25((note_text(data.notes[note_id]) for note_id in data.task.pool_ids), data.settings.evaluate.bm25)
    queries = [note_text(data.notes[note_id]) for note_id in data.task.query_ids]
    return {None: index.ranks(queries, data.task.query_rows, data.task.target_rows)}


BASELINE = RecallBaseline("text", _ranks)
