"""The recommender's model before tuning, prompted with titles alone, as TALLRec."""

from __future__ import annotations

from notellm2_ray.baselines.ranking.baseline import RankingBaseline

BASELINE = RankingBaseline(untuned="tallrec")
