"""Scores of the sequential baselines, one training per seed."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from notellm2_ray.baselines.ranking.baseline import Scores
from notellm2_ray.baselines.ranking.data import ProtocolData, RankingData
from notellm2_ray.baselines.ranking.sequential.training_data import training_data

if TYPE_CHECKING:
    from notellm2_ray.baselines.ranking.sequential.model import Architecture
    from notellm2_ray.baselines.ranking.sequential.recommender import FrozenFeatures, SequentialRecommender

log = logging.getLogger("notellm2_ray")


def sequential_scores(
    name: str,
    architecture: Architecture,
    data: RankingData,
    protocol: ProtocolData,
    features: FrozenFeatures | None = None,
) -> Scores:
    """A sequential baseline's scores by seed. Protocols with the same test targets share one trained model per seed.

    Args:
        name: of the baseline.
        features: frozen note vectors that it reads instead of note ids.

    Raises:
        DataError: there is nothing to train it on.
    """
    task = protocol.task
    published = task.protocol == "published"
    rows = [task.candidates_of(example) for example in range(task.num_examples)]
    candidates = [[str(note) for note in task.note_ids[row]] for row in rows]
    found: dict[int | None, np.ndarray] = {}
    for seed in data.seeds:
        # The published protocol has test targets of its own, so it needs a model of its own.
        train = partial(_train, name, architecture, data, features, seed, published)
        model = data.once((name, seed, published), train)
        values = np.empty(len(task.groups))
        for row, scores in zip(rows, model.scores(protocol.histories(), candidates), strict=True):
            values[row] = scores
        found[seed] = values
    return found


def _train(
    name: str,
    architecture: Architecture,
    data: RankingData,
    features: FrozenFeatures | None,
    seed: int,
    published: bool,
) -> SequentialRecommender:
    from notellm2_ray.baselines.ranking.sequential.fit import fit

    log.info("training the baseline %s, seed %d", name, seed)
    split_by = data.settings.candidates.split_by
    sequences, validation = training_data(data.workspace, split_by, published=published)
    return fit(architecture, sequences, validation, seed=seed, features=features)
