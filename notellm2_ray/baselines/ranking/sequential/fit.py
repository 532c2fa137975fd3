"""Training of GRU4Rec and SASRec: cross-entropy of each next note of a sequence against all others."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from notellm2_ray.baselines.ranking.sequential.model import (
    FIRST_NOTE,
    PAD,
    UNKNOWN,
    FeatureEmbedding,
    IdEmbedding,
    SequentialModel,
)
from notellm2_ray.baselines.ranking.sequential.recommender import (
    FrozenFeatures,
    SequentialRecommender,
    encode,
    last_states,
    pad,
)
from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings.baselines import SequentialSettings

log = logging.getLogger(__name__)

_ROWS = 256  # validation histories in a forward batch


def fit(
    settings: SequentialSettings,
    sequences: Sequence[Sequence[str]],
    validation: Sequence[tuple[Sequence[str], str]],
    *,
    seed: int,
    features: FrozenFeatures | None = None,
) -> SequentialRecommender:
    """Train a baseline and keep its weights from the epoch that ranked the validation targets best.

    Args:
        settings: which model, its sizes, and how it is trained.
        sequences: note ids, oldest first. They must hold no validation or test target, and no later event of its user.
        validation: (history, target). After every epoch the targets are ranked among all notes of the sequences. If
            empty, all epochs are trained.
        seed: of the initial weights, the order and the dropout; torch's global random state stays unchanged.
        features: frozen vectors to read instead of note ids.

    Raises:
        DataError: there is no sequence of two notes, or no note in the sequences has features.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seen = dict.fromkeys(note for sequence in sequences for note in sequence)
    names = list(seen) if features is None else list(features.ids)
    numbers = {name: at for at, name in enumerate(names, start=FIRST_NOTE)}
    rows = [encode(sequence, numbers, settings.max_length + 1) for sequence in sequences if len(sequence) > 1]
    classes = [UNKNOWN, *(numbers[name] for name in seen if name in numbers)]
    if not rows or len(classes) == 1:
        raise DataError(
            f"{settings.architecture}: {len(rows)} training sequences of two notes or more, {len(classes) - 1} usable "
            "notes in them: leave it out of ranking.baselines, or use more events"
        )
    targets = [(encode(history, numbers, settings.max_length), numbers.get(target)) for history, target in validation]
    learned = set(classes)
    known = [(history, target) for history, target in targets if target in learned]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(stream_seed(seed, settings.architecture))
        width = settings.width
        embedding = IdEmbedding(len(names) + FIRST_NOTE, width) if features is None else _embedding(features, width)
        model = SequentialModel(settings, embedding).to(device)
        history = _train(model, rows, torch.tensor(classes, device=device), known, settings, seed)
    return SequentialRecommender(model, numbers, settings.max_length, history)


def _train(
    model: SequentialModel,
    rows: Sequence[Sequence[int]],
    classes: torch.Tensor,
    validation: Sequence[tuple[list[int], Any]],
    settings: SequentialSettings,
    seed: int,
) -> list[float]:
    """Train until validation stops improving, and load the best weights; return the validation AUC of each epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    size = min(max(len(rows) // 20, settings.min_batch), settings.max_batch)
    rng = np.random.default_rng(stream_seed(seed, "order of sequences"))
    history: list[float] = []
    best, best_epoch = copy.deepcopy(model.state_dict()), -1
    for epoch in range(settings.max_epochs):
        model.train()
        order = rng.permutation(len(rows))
        for start in range(0, len(rows), size):
            loss = _loss(model, [rows[at] for at in order[start : start + size]], classes, settings)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if not validation:
            continue
        history.append(_validation_auc(model, validation, classes))
        if history[-1] > max(history[:-1], default=-1.0):
            best, best_epoch = copy.deepcopy(model.state_dict()), epoch
        elif epoch - best_epoch >= settings.patience:
            break
    if validation:
        model.load_state_dict(best)
        log.info("stopped after %d epochs; best was epoch %d, AUC %.4f", len(history), best_epoch + 1, max(history))
    return history


def _loss(
    model: SequentialModel, rows: Sequence[Sequence[int]], classes: torch.Tensor, settings: SequentialSettings
) -> torch.Tensor:
    """Mean cross-entropy over all next notes; a next note without features is left out."""
    items = pad(rows).to(classes.device)
    read, wanted = items[:, :-1], items[:, 1:]
    hidden = torch.rand(read.shape, device=read.device) < settings.unknown_share
    read = torch.where(hidden & (read != PAD), UNKNOWN, read)
    at = wanted >= FIRST_NOTE
    states, targets = model(read)[at], wanted[at]
    if len(classes) > settings.max_classes:
        drawn = classes[torch.randint(len(classes), (settings.max_classes,), device=classes.device)]
        classes = torch.unique(torch.cat([drawn, targets]))
    place = torch.zeros(int(classes.max()) + 1, dtype=torch.long, device=classes.device)
    place[classes] = torch.arange(len(classes), device=classes.device)
    logits = states @ model.embedding(classes).T
    # A batch without any target has the loss 0, not NaN.
    return functional.cross_entropy(logits, place[targets], reduction="sum") / max(len(targets), 1)


@torch.no_grad()
def _validation_auc(
    model: SequentialModel, validation: Sequence[tuple[list[int], int]], classes: torch.Tensor
) -> float:
    """Mean share of the training notes that each target scores above; ties count against it.

    RecBole stops by MRR@10. On some tens of users that is less stable: a baseline stopped when it had learned which
    notes are popular, and nothing about sequences.
    """
    model.eval()
    table = model.embedding(classes)
    total = 0.0
    for start in range(0, len(validation), _ROWS):
        part = validation[start : start + _ROWS]
        logits = last_states(model, [history for history, _ in part], classes.device) @ table.T
        targets = torch.tensor([target for _, target in part], device=classes.device)
        own = logits[classes[None, :] == targets[:, None]]
        total += float((logits < own[:, None]).float().mean(dim=1).sum())
    return total * len(classes) / max(len(classes) - 1, 1) / len(validation)  # a target is not among its own negatives


def _embedding(features: FrozenFeatures, width: int) -> FeatureEmbedding:
    if not len(features.ids):
        raise DataError("no note has features: leave this baseline out of ranking.baselines")
    return FeatureEmbedding(torch.from_numpy(np.ascontiguousarray(features.matrix, dtype=np.float32)), width)
