"""Recall for a user: the neighbours of the last notes of the history, merged. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np

from notellm2_ray.core.settings.serve import RecommendSettings


class Candidate(NamedTuple):
    """A note that recall found."""

    note_id: str
    score: float  # sum of weight * max(cosine, 0) ** power over the history's notes
    from_history: tuple[str, ...]  # notes of the history that it was found from, largest share of the score first


def weights(count: int, decay: float) -> np.ndarray:
    """(count,) weights of a history, oldest first: 1 for the last note, ``decay`` for the one before, and so on."""
    return decay ** np.arange(count - 1, -1, -1, dtype=np.float64)


def recent(history: Sequence[str], settings: RecommendSettings) -> list[str]:
    """The notes to search from: the last ``history_notes`` different ones, oldest first."""
    last_first = list(dict.fromkeys(reversed(history)))
    return last_first[: settings.history_notes][::-1]


def merge(
    searched: Sequence[str],
    found: Mapping[str, tuple[Sequence[str], np.ndarray]],
    excluded: frozenset[str],
    settings: RecommendSettings,
) -> list[Candidate]:
    """Candidates, best first.

    Args:
        searched: notes of the history, oldest first.
        found: (ids, cosines) of each note's neighbours, for the notes that are in the index.
        excluded: notes never to recommend.
    """
    parts: dict[str, dict[str, float]] = {}
    for source, weight in zip(searched, weights(len(searched), settings.recency_decay), strict=True):
        ids, cosines = found.get(source, ((), np.empty(0)))
        for note_id, cosine in zip(ids, np.maximum(np.asarray(cosines, np.float64), 0.0), strict=True):
            if note_id not in excluded:
                parts.setdefault(note_id, {})[source] = float(weight * cosine**settings.score_power)
    candidates = [
        Candidate(
            note_id, sum(by.values()), tuple(sorted(reversed(by), key=lambda one: -by[one]))
        )  # ties: latest first
        for note_id, by in parts.items()
    ]
    # Ties are ordered by a hash: the same on every replica, and no id stands before another because of its name.
    return sorted(candidates, key=lambda one: (-one.score, crc32(one.note_id.encode("utf-8", "surrogatepass"))))


def ranked(candidates: Sequence[Candidate], p_yes: Sequence[float | None]) -> list[tuple[Candidate, float | None]]:
    """Candidates by P(yes), descending; those without one follow in the order of recall.

    Args:
        candidates: in the order of recall.
        p_yes: of the first ``len(p_yes)`` candidates.
    """
    pairs = [(one, p_yes[row] if row < len(p_yes) else None) for row, one in enumerate(candidates)]
    return sorted(pairs, key=lambda pair: (pair[1] is None, -(pair[1] or 0.0)))  # stable, so ties keep recall's order
