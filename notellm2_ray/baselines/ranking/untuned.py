"""The recommender's model before tuning, prompted with a preference and the candidate's image."""

from __future__ import annotations

from notellm2_ray.baselines.ranking.baseline import RankingBaseline

BASELINE = RankingBaseline(untuned="mllm_msr")
