"""Variety in a list of results: near duplicates folded into one, and results unlike each other preferred (MMR).

Pure functions of unit vectors, so that a dot product is a cosine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Folded(NamedTuple):
    """Rows without near duplicates."""

    rows: list[int]  # kept, in their order
    duplicates: dict[int, list[int]]  # kept row to the rows that were folded into it
    of_known: list[int]  # rows that are near duplicates of known vectors


def fold(vectors: np.ndarray, above: float, known: np.ndarray) -> Folded:
    """Fold near duplicates: a row whose cosine with a kept row is ``above`` or more joins the nearest of those.

    Rows are taken in their order, so of two near duplicates the better result is kept.

    Args:
        vectors: (N, D) of the results, best first.
        above: smallest cosine of near duplicates.
        known: (M, D), for example of the query; a near duplicate of these is not kept at all.
    """
    kept: list[int] = []
    duplicates: dict[int, list[int]] = {}
    of_known: list[int] = []
    for row, vector in enumerate(vectors):
        if len(known) and (known @ vector).max() >= above:
            of_known.append(row)
            continue
        cosines = vectors[kept] @ vector
        if kept and cosines.max() >= above:
            duplicates.setdefault(kept[int(cosines.argmax())], []).append(row)
        else:
            kept.append(row)
    return Folded(kept, duplicates, of_known)


def diverse(relevance: np.ndarray, vectors: np.ndarray, k: int, diversity: float) -> list[int]:
    """The ``k`` rows that maximal marginal relevance chooses (Carbonell and Goldstein, 1998), in its order.

    Each next row is the one with the largest ``(1 - diversity) * relevance - diversity * s``, where ``s`` is its
    largest cosine with a row that was chosen before (0 for the first). Ties go to the earlier row.

    Args:
        relevance: (N,), best first.
        vectors: (N, D) unit vectors.
        k: rows wanted.
        diversity: 0 (by relevance alone) to 1.
    """
    chosen: list[int] = []
    left = np.ones(len(relevance), bool)
    nearest = np.zeros(len(relevance))
    for _ in range(min(k, len(relevance))):
        gain = np.where(left, (1 - diversity) * relevance - diversity * nearest, -np.inf)
        best = int(gain.argmax())
        cosines = vectors @ vectors[best]
        nearest = np.maximum(nearest, cosines) if chosen else cosines
        chosen.append(best)
        left[best] = False
    return chosen


def arrange(
    relevance: Sequence[float] | np.ndarray,
    vectors: np.ndarray,
    k: int,
    diversity: float,
    fold_above: float | None,
    known: np.ndarray,
) -> Folded:
    """At most ``k`` rows: folded as :func:`fold` does if ``fold_above`` is given, then chosen by :func:`diverse`."""
    folded = Folded(list(range(len(vectors))), {}, [])
    if fold_above is not None:
        folded = fold(vectors, fold_above, known)
    rows = np.array(folded.rows, np.int64)
    chosen = diverse(np.asarray(relevance, np.float64)[rows], vectors[rows], k, diversity)
    return folded._replace(rows=rows[chosen].tolist())
