"""What a ranking baseline is: a function from candidates to scores, and what that function needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from notellm2_ray.baselines.ranking.data import ProtocolData, RankingData
from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.settings.ranking import RankerVariant

# Seed to (R,) scores, one per candidate of the protocol; a deterministic baseline has the one seed None.
Scores = Mapping[int | None, np.ndarray]

# What earlier stages must have made: the image summaries, the embedder's vision tower, the embedder's LLM.
Need = Literal["image_summaries", "image_tower", "llm"]


@dataclass(frozen=True)
class RankingBaseline:
    """A row of the ranking tables that is not a tuned ranker.

    Either ``scores`` or ``untuned`` is given.

    Attributes:
        scores: gives the scores of a protocol's candidates, ``protocol.task.note_ids``, higher is better. It is called
            once per protocol; what protocols share it keeps with ``data.once``.
        untuned: the row is the recommender's model before tuning, prompted like this ranker variant; score-candidates
            writes its table of scores.
        needs: what earlier stages must have made, besides sequences and notes.
        remark: a sentence on how the row was made, for the head of the report.
    """

    scores: Callable[[RankingData, ProtocolData], Scores] | None = None
    untuned: RankerVariant | None = None
    needs: frozenset[Need] = frozenset()
    remark: Callable[[RankingData], str] | None = None

    def __post_init__(self) -> None:
        if (self.scores is None) == (self.untuned is None):
            raise ConfigError("a ranking baseline needs either a function for its scores, or untuned")
