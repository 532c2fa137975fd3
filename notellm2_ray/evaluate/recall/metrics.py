"""Exact ranks of the targets among all notes of a pool, and the figures computed from them.

A rank is 1 + the number of other notes that score at least as high as the target, so ties count against the method. The
query note is left out. Rows are positions in the pool; a query outside the pool has the row -1.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import stream_seed

# Cosines closer than this are equal in float32: the same vector in another place of a matrix product, or embedded in
# another batch, differs by about 1e-7, and such a difference must not decide a rank.
TIE = 1e-6
BLOCK_BYTES = 64 << 20
Query = TypeVar("Query", bound=Hashable)


def target_ranks(
    queries: np.ndarray,
    pool: np.ndarray,
    query_rows: np.ndarray,
    target_rows: np.ndarray,
    *,
    tie: float = TIE,
    block_bytes: int = BLOCK_BYTES,
) -> np.ndarray:
    """Rank of each pair's target by the dot product with its query (section 4.1 of the paper; cosine for unit vectors).

    Blocks of queries are multiplied with the whole pool, so that memory stays near ``block_bytes``.

    Args:
        queries: (Q, D) float32, one row per pair.
        pool: (P, D) float32.
        query_rows: (Q,) row of the query note in the pool, or -1.
        target_rows: (Q,) row of the target note in the pool.
        tie: a score that is lower than the target's by at most this counts as a tie.
        block_bytes: size of a block of scores; a block has at least one query.

    Returns:
        (Q,) int64 ranks, 1 is best.

    Raises:
        DataError: the pool is empty, a pair's query is its target, or a vector has NaN or infinite values.
    """
    _check_rows(len(pool), query_rows, target_rows)
    if queries.ndim != 2 or pool.ndim != 2 or queries.shape[1] != pool.shape[1] or len(queries) != len(query_rows):
        raise DataError(
            f"queries of shape {queries.shape} for a pool of shape {pool.shape} and {len(query_rows)} pairs"
        )
    if not (np.isfinite(queries).all() and np.isfinite(pool).all()):
        raise DataError(
            "NaN or infinite values among the vectors to be ranked; they would never count as above the target"
        )
    queries, pool = np.asarray(queries, dtype=np.float32), np.asarray(pool, dtype=np.float32)
    ranks = np.empty(len(queries), dtype=np.int64)
    step = max(1, block_bytes // (4 * len(pool)))
    for start in range(0, len(queries), step):
        block = slice(start, start + step)
        scores = queries[block] @ pool.T  # (B, P)
        ranks[block] = ranks_in_scores(scores, query_rows[block], target_rows[block], tie=tie)
    return ranks


def ranks_in_scores(
    scores: np.ndarray, query_rows: np.ndarray, target_rows: np.ndarray, *, tie: float = 0.0
) -> np.ndarray:
    """(B,) int64 ranks of the targets in a (B, P) matrix of scores, which is modified in place."""
    here = np.arange(len(scores))
    thresholds = scores[here, target_rows] - np.float32(tie)
    inside = query_rows >= 0
    scores[here[inside], query_rows[inside]] = -np.inf
    # Counting row by row is several times faster than counting along an axis.
    counts = [np.count_nonzero(row >= threshold) for row, threshold in zip(scores, thresholds, strict=True)]
    return np.array(counts, dtype=np.int64)  # the target counts itself, so that 1 is best


def ranks_by_note(scores: np.ndarray, query_rows: np.ndarray, target_rows: np.ndarray) -> np.ndarray:
    """Ranks by one score per note that is the same for all queries, such as its clicks.

    Args:
        scores: (P,) one per note of the pool.
        query_rows: (Q,) row of the query in the pool or -1.
        target_rows: (Q,) row of the target.

    Returns:
        (Q,) int64 ranks.
    """
    _check_rows(len(scores), query_rows, target_rows)
    own = scores[target_rows]
    at_least = len(scores) - np.searchsorted(np.sort(scores), own, side="left")
    query_counted = (query_rows >= 0) & (scores[query_rows] >= own)
    return (at_least - query_counted).astype(np.int64)


def ranks_by_query(
    scores_of: Callable[[Query], np.ndarray], queries: Iterable[Query], query_rows: np.ndarray, target_rows: np.ndarray
) -> np.ndarray:
    """Ranks by scores that are computed for one query at a time, so that a single row of scores is held.

    Args:
        scores_of: a query to the (P,) scores of the pool's notes; called once for each different query.
        queries: (Q,) the query of each pair, such as its text or its id.
        query_rows: (Q,) row of the query note in the pool, or -1.
        target_rows: (Q,) row of the target note in the pool.

    Returns:
        (Q,) int64 ranks.
    """
    ranks = np.empty(len(target_rows), dtype=np.int64)
    pairs_of: dict[Query, list[int]] = {}
    for pair, query in enumerate(queries):
        pairs_of.setdefault(query, []).append(pair)
    for query, pairs in pairs_of.items():
        scores = scores_of(query)
        for pair in pairs:
            own, row = scores[target_rows[pair]], query_rows[pair]
            above = np.count_nonzero(scores >= own)  # the target counts itself, so that 1 is best
            ranks[pair] = above - (row >= 0 and scores[row] >= own)
    return ranks


def random_ranks(num_notes: int, query_rows: np.ndarray, seed: int) -> np.ndarray:
    """(Q,) int64 ranks under random scores: uniform from 1 to the number of notes ranked."""
    rng = np.random.default_rng(stream_seed(seed, "random ranks"))
    return rng.integers(1, num_candidates(num_notes, query_rows), endpoint=True)


def num_candidates(num_notes: int, query_rows: np.ndarray) -> np.ndarray:
    """(Q,) int64 number of notes ranked for each query: the pool without the query itself."""
    return num_notes - (np.asarray(query_rows) >= 0).astype(np.int64)


def recall_at(ranks: np.ndarray, cutoffs: Sequence[int]) -> dict[int, float]:
    """Recall@k: the share of pairs whose target is among the first k; NaN if there are no pairs."""
    return {k: float(np.mean(ranks <= k)) if len(ranks) else float("nan") for k in cutoffs}


def chance_at(num_notes: int, query_rows: np.ndarray, cutoffs: Sequence[int]) -> dict[int, float]:
    """The expected Recall@k of random scores."""
    candidates = num_candidates(num_notes, query_rows)
    return {k: float(np.mean(np.minimum(k / candidates, 1))) if len(candidates) else float("nan") for k in cutoffs}


def mean_reciprocal_rank(ranks: np.ndarray) -> float:
    """Mean of 1 / rank; NaN if there are no pairs."""
    return float(np.mean(1 / ranks)) if len(ranks) else float("nan")


def _check_rows(num_notes: int, query_rows: np.ndarray, target_rows: np.ndarray) -> None:
    if not num_notes:
        raise DataError("the test pool is empty: there is nothing to rank")
    if len(query_rows) != len(target_rows):
        raise DataError(f"{len(query_rows)} queries for {len(target_rows)} targets")
    same = np.flatnonzero(query_rows == target_rows)
    if len(same):
        raise DataError(f"pair {same[0]} ({len(same)} in all) has the query as its own target: mine the pairs again")
