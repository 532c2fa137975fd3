"""The test pairs and the pool of notes as arrays: strata, the published filter, and ranks of whatever scores notes."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings.retrieval import EvaluateSettings
from notellm2_ray.evaluate.recall import metrics
from notellm2_ray.index.vectors import name_some

log = logging.getLogger(__name__)

# The strata of each table of the report: the paper's Tables 2 to 4, its Table 11, and what training knows of the notes.
TABLES = {
    "main": ("all", "short_query", "short_target"),
    "long": ("long_query", "long_target"),
    "warmth": ("warm_query", "cold_query", "warm_target", "cold_target"),
}
STRATA = tuple(stratum for strata in TABLES.values() for stratum in strata)


@dataclass(frozen=True)
class RetrievalTask:
    """The test pairs, with their notes as rows of the pool.

    Attributes:
        pool_ids: (P,) object array of the notes that are ranked.
        query_ids: (Q,) object array, one per pair.
        target_ids: (Q,) object array.
        query_rows: (Q,) int64 row of the query in the pool, or -1 if it is not there.
        target_rows: (Q,) int64 row of the target in the pool.
        strata: name to (Q,) bool mask.
        cutoffs: k of Recall@k.
    """

    pool_ids: np.ndarray
    query_ids: np.ndarray
    target_ids: np.ndarray
    query_rows: np.ndarray
    target_rows: np.ndarray
    strata: Mapping[str, np.ndarray]
    cutoffs: tuple[int, ...]

    @classmethod
    def build(
        cls,
        pairs: pa.Table,
        pool_ids: Sequence[str],
        token_counts: Mapping[str, int],
        settings: EvaluateSettings,
        clicked: Collection[str] = frozenset(),
    ) -> RetrievalTask:
        """Find the pairs' notes in the pool, and the strata.

        Args:
            pairs: PAIR_SCHEMA; ``one_pair_per_note`` takes them in this order.
            pool_ids: the notes of the test period, without duplicates.
            token_counts: number of text tokens of each query and target note.
            settings: cutoffs, bounds of the strata, ``one_pair_per_note``.
            clicked: the notes with a click in the training log; all other notes are cold.

        Raises:
            DataError: there are no pairs, the pool is empty, a target is outside the pool, or a note has no token
                count.
        """
        queries, targets = pairs.column("query_id").to_pylist(), pairs.column("target_id").to_pylist()
        pool = list(pool_ids)
        if settings.one_pair_per_note:
            queries, targets, pool = one_pair_per_note(queries, targets, pool)
        if not queries or not pool:
            raise DataError(f"{len(queries)} test pairs over a pool of {len(pool)} notes: nothing to evaluate")
        row_of = {note_id: row for row, note_id in enumerate(pool)}
        absent = list(dict.fromkeys(target for target in targets if target not in row_of))
        if absent:
            raise DataError(
                f"target note {name_some(absent)} is not in the test pool: mine the pairs and the pool together"
            )
        uncounted = list(dict.fromkeys(note for note in (*queries, *targets) if note not in token_counts))
        if uncounted:
            raise DataError(f"no token count for note {name_some(uncounted)}: count the tokens of all test notes")
        return cls(
            np.array(pool, dtype=object),
            np.array(queries, dtype=object),
            np.array(targets, dtype=object),
            np.array([row_of.get(note, -1) for note in queries], dtype=np.int64),
            np.array([row_of[note] for note in targets], dtype=np.int64),
            dict(zip(STRATA, _masks(queries, targets, token_counts, settings, clicked), strict=True)),
            settings.cutoffs,
        )

    @property
    def num_pairs(self) -> int:
        return len(self.query_ids)

    @property
    def saturated(self) -> tuple[int, ...]:
        """Cutoffs at which every method finds every target, since k is at least the number of notes ranked."""
        most = int(metrics.num_candidates(len(self.pool_ids), self.query_rows).max())
        return tuple(k for k in self.cutoffs if k >= most)

    def embedding_ranks(self, ids: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """(Q,) ranks by cosine, from a table with the vectors of the pool and the queries.

        A note without a vector (quarantined when it was embedded) counts against the method: a pair with such a query
        or target gets the worst rank, and any other such note counts as above the target.

        Args:
            ids: (N,) note ids of the table.
            vectors: (N, D) float32, unit length.

        Raises:
            DataError: more than half of the pool has no vector, or a vector is not finite.
        """
        row_of = {note_id: row for row, note_id in enumerate(ids)}
        pool = np.array([row_of.get(note, -1) for note in self.pool_ids], dtype=np.int64)
        queries = np.array([row_of.get(note, -1) for note in self.query_ids], dtype=np.int64)
        present = pool >= 0
        missing = int((~present).sum())
        if missing > len(pool) / 2:
            raise DataError(
                f"{missing} of the pool's {len(pool)} notes have no vector, note {name_some(self.pool_ids[~present])}: "
                "does this embedding table belong to these pairs?"
            )
        if missing:
            log.warning("%d notes of the pool have no vector and count against the method", missing)
        ranks = metrics.num_candidates(len(pool), self.query_rows)  # the worst
        known = (queries >= 0) & present[self.target_rows]
        place = np.cumsum(present) - 1  # row in the pool to row among the notes with a vector
        query_rows = self.query_rows[known]
        found = metrics.target_ranks(
            vectors[queries[known]],
            vectors[pool[present]],
            np.where(query_rows >= 0, place[query_rows], -1),
            place[self.target_rows[known]],
        )
        ranks[known] = found + missing
        return ranks

    def ranks_by_note(self, values: Mapping[str, float]) -> np.ndarray:
        """(Q,) ranks by one value per note, the same for all queries, such as its clicks; a note without one has 0."""
        scores = np.array([values.get(note, 0) for note in self.pool_ids], dtype=np.float64)
        return metrics.ranks_by_note(scores, self.query_rows, self.target_rows)

    def random_ranks(self, seed: int) -> np.ndarray:
        """(Q,) ranks under random scores."""
        return metrics.random_ranks(len(self.pool_ids), self.query_rows, seed)


def one_pair_per_note(
    queries: Sequence[str], targets: Sequence[str], pool: Sequence[str]
) -> tuple[list[str], list[str], list[str]]:
    """The published code's filter: a pair is kept if neither of its notes is in a pair kept before, in either role.

    The result depends on the order of the pairs. The queries kept are removed from the pool.

    Returns:
        The queries kept, their targets, and the pool.
    """
    used: set[str] = set()
    kept = []
    for query, target in zip(queries, targets, strict=True):
        if query not in used and target not in used:
            kept.append((query, target))
            used |= {query, target}
    asked = {query for query, _ in kept}
    return [query for query, _ in kept], [target for _, target in kept], [note for note in pool if note not in asked]


def _masks(
    queries: Sequence[str],
    targets: Sequence[str],
    token_counts: Mapping[str, int],
    settings: EvaluateSettings,
    clicked: Collection[str],
) -> list[np.ndarray]:
    """(Q,) bool for each of STRATA."""
    lengths = [np.array([token_counts[note] for note in notes]) for notes in (queries, targets)]
    warm = [np.array([note in clicked for note in notes]) for notes in (queries, targets)]
    return [
        np.ones(len(queries), dtype=bool),
        *(tokens < settings.short_tokens for tokens in lengths),
        *(tokens > settings.long_tokens for tokens in lengths),
        *(mask for known in warm for mask in (known, ~known)),
    ]
