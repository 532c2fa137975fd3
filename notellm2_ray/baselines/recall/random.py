"""Random ranks, for every seed."""

from __future__ import annotations

from notellm2_ray.baselines.recall.baseline import Ranks, RecallBaseline, RecallData


def _ranks(data: RecallData) -> Ranks:
    return {seed: data.task.random_ranks(seed) for seed in data.seeds}


BASELINE = RecallBaseline("-", _ranks)
