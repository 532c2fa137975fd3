"""Random scores, for every seed."""

from __future__ import annotations

from notellm2_ray.baselines.ranking.baseline import RankingBaseline, Scores
from notellm2_ray.baselines.ranking.data import ProtocolData, RankingData


def _scores(data: RankingData, protocol: ProtocolData) -> Scores:
    return {seed: protocol.task.random_scores(seed) for seed in data.seeds}


BASELINE = RankingBaseline(_scores)
