"""Scores of the sequential baselines, one training per seed, with the knobs of the settings or of a search."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from notellm2_ray.baselines.ranking.baseline import Scores
from notellm2_ray.baselines.ranking.data import ProtocolData, RankingData
from notellm2_ray.baselines.ranking.sequential.training_data import training_data
from notellm2_ray.core.errors import DataError
from notellm2_ray.core.settings.baselines import SequentialSettings, points

if TYPE_CHECKING:
    from notellm2_ray.baselines.ranking.sequential.recommender import FrozenFeatures, SequentialRecommender

log = logging.getLogger("notellm2_ray")


def sequential_scores(
    name: str, data: RankingData, protocol: ProtocolData, features: FrozenFeatures | None = None
) -> Scores:
    """A sequential baseline's scores by seed. Protocols with the same test targets share one trained model per seed.

    Args:
        name: of the baseline; its knobs are ``ranking.NAME``.
        features: frozen note vectors that it reads instead of note ids.

    Raises:
        DataError: there is nothing to train it on, or to tune it by.
    """
    task = protocol.task
    published = task.protocol == "published"
    settings = _settings(name, data, features, published)
    rows = [task.candidates_of(example) for example in range(task.num_examples)]
    candidates = [[str(note) for note in task.note_ids[row]] for row in rows]
    found: dict[int | None, np.ndarray] = {}
    for seed in data.seeds:
        # The published protocol has test targets of its own, so it needs a model of its own.
        train = partial(_train, name, settings, data, features, seed, published)
        model = data.once((name, seed, published), train)
        values = np.empty(len(task.groups))
        for row, scores in zip(rows, model.scores(protocol.histories(), candidates), strict=True):
            values[row] = scores
        found[seed] = values
    return found


def _settings(name: str, data: RankingData, features: FrozenFeatures | None, published: bool) -> SequentialSettings:
    settings: SequentialSettings = getattr(data.settings.ranking, name)
    if not data.settings.ranking.tune_baselines:
        return settings
    return data.once(("tuned", name, published), partial(_tune, name, settings, data, features, published))


def _tune(
    name: str, settings: SequentialSettings, data: RankingData, features: FrozenFeatures | None, published: bool
) -> SequentialSettings:
    """The grid's point with the best AUC on validation targets, for the first seed; ``data.tuned`` has all of them."""
    grid, tried = data.settings.ranking.baseline_grid, points(settings, data.settings.ranking.baseline_grid)
    reached = []
    for one in tried:
        history = _train(name, one, data, features, data.seeds[0], published).validation_auc
        if not history:
            raise DataError("ranking.tune_baselines needs validation targets with a history: there are none")
        reached.append(max(history))
    best = int(np.argmax(reached))
    data.tuned[f"{name} (published)" if published else name] = {
        "seed": data.seeds[0],
        "points": [
            {"knobs": {knob: getattr(one, knob) for knob in grid}, "validation_auc": auc, "chosen": at == best}
            for at, (one, auc) in enumerate(zip(tried, reached, strict=True))
        ],
    }
    return tried[best]


def _train(
    name: str,
    settings: SequentialSettings,
    data: RankingData,
    features: FrozenFeatures | None,
    seed: int,
    published: bool,
) -> SequentialRecommender:
    from notellm2_ray.baselines.ranking.sequential.fit import fit

    log.info("training the baseline %s, seed %d", name, seed)
    split_by = data.settings.candidates.split_by
    sequences, validation = data.once(
        ("training data", published), lambda: training_data(data.workspace, split_by, published=published)
    )
    return fit(settings, sequences, validation, seed=seed, features=features)
