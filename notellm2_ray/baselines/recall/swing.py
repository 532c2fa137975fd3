"""Swing (Yang et al. 2020, arXiv 2010.05525): two notes are similar if many pairs of users clicked both.

A pair of users counts for less, the more notes they share beside: then their agreement says little about these two.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from notellm2_ray.baselines.recall.baseline import Ranks, RecallBaseline, RecallData
from notellm2_ray.baselines.recall.train_clicks import REMARK, TrainClicks, ranks_by_clicks

MAX_USERS = 1000  # of a note; of more, the latest. Time and memory grow with their square
_BLOCK = 1024  # notes whose sums are taken at once


def swings(clicks: TrainClicks, column: int, alpha: float) -> np.ndarray:
    """(N,) similarities of note i, the one in ``column``, with all notes j.

    s(i, j) = sum over pairs of different users u, v who clicked both of w_u w_v / (alpha + |I_u and I_v|), with
    w_u = 1 / sqrt(|I_u|) and I_u the notes that u clicked.
    """
    rows = clicks.notes_of[clicks.users(column)[-MAX_USERS:]]
    weights = 1 / np.sqrt(np.diff(rows.indptr))
    pairs = np.outer(weights, weights) / (alpha + (rows @ rows.T).toarray())
    np.fill_diagonal(pairs, 0)
    found = np.zeros(len(clicks.columns))
    several = np.flatnonzero(np.bincount(rows.indices, minlength=len(found)) > 1)
    by_note = rows.tocsc()
    for start in range(0, len(several), _BLOCK):
        block = several[start : start + _BLOCK]
        clicked = by_note[:, block].toarray().astype(float)
        # Rounded, so that equal sums stay equal whatever the order of their terms.
        found[block] = ((pairs @ clicked) * clicked).sum(axis=0).round(10)
    return found


def _ranks(data: RecallData) -> Ranks:
    return ranks_by_clicks(data, partial(swings, alpha=data.settings.evaluate.swing.alpha))


BASELINE = RecallBaseline("-", _ranks, REMARK)
