"""Item-to-item collaborative filtering: the cosine between the sets of users who clicked two notes in training."""

from __future__ import annotations

import numpy as np

from notellm2_ray.baselines.recall.baseline import Ranks, RecallBaseline, RecallData
from notellm2_ray.baselines.recall.train_clicks import REMARK, TrainClicks, ranks_by_clicks


def cosines(clicks: TrainClicks, column: int) -> np.ndarray:
    """(N,) cosines of a note with all notes: common users / sqrt(users of the one * users of the other)."""
    rows = clicks.notes_of[clicks.users(column)]
    common = np.bincount(rows.indices, minlength=len(clicks.columns))
    sizes = np.diff(clicks.users_of.indptr)
    return np.sqrt(common * common / (sizes * sizes[column]))


def _ranks(data: RecallData) -> Ranks:
    return ranks_by_clicks(data, cosines)


BASELINE = RecallBaseline("-", _ranks, REMARK)
