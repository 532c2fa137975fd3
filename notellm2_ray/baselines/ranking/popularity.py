"""Popularity: a candidate's clicks, without those that are validation or test targets."""

from __future__ import annotations

from notellm2_ray.baselines.ranking.baseline import RankingBaseline, Scores
from notellm2_ray.baselines.ranking.data import ProtocolData, RankingData


def _scores(data: RankingData, protocol: ProtocolData) -> Scores:
    return {None: protocol.task.scores_by_note(protocol.clicks)}


BASELINE = RankingBaseline(_scores)
