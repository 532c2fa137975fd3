"""GRU4Rec on note ids."""

from __future__ import annotations

from notellm2_ray.baselines.ranking.baseline import RankingBaseline, Scores
from notellm2_ray.baselines.ranking.data import ProtocolData, RankingData
from notellm2_ray.baselines.ranking.sequential.scores import sequential_scores


def _scores(data: RankingData, protocol: ProtocolData) -> Scores:
    return sequential_scores("gru4rec", data, protocol)


BASELINE = RankingBaseline(_scores)
