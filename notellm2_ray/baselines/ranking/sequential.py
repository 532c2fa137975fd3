"""Sequential recommenders as baselines of the ranker: GRU4Rec and SASRec, by note id or on frozen note features.

Trained to tell the next note of a sequence from all others (cross-entropy); scores any candidates after any history.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from notellm2_ray.baselines.ranking.sequential_model import (
    FIRST_NOTE,
    PAD,
    UNKNOWN,
    Architecture,
    FeatureEmbedding,
    IdEmbedding,
    SequentialModel,
)
from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import stream_seed

log = logging.getLogger(__name__)

_LEARNING_RATES: dict[Architecture, float] = {"gru4rec": 3e-3, "sasrec": 1e-3}
_ROWS = 256  # histories in a forward batch without gradients


@dataclass(frozen=True)
class SequentialSettings:
    """How a baseline is trained: RecBole's defaults where not said otherwise.

    Attributes:
        max_length: only so many of a sequence's last notes are read.
        learning_rate: Adam's; None: RecBole's 1e-3 for SASRec, and 3e-3 for GRU4Rec, which stopped lower with less
            (validation AUC .894 against .925; one drawn set of 600 users, one seed, 1e-3, 3e-3 and 5e-3 tried).
        max_epochs: passes over the sequences at most (RecBole: 300, of far more than a small set needs).
        patience: epochs without a better validation before stopping (RecBole: 10; on small sets GRU4Rec gets worse for
            a while after it has learned what is popular, before it learns more).
        min_batch, max_batch: sequences in an update; in between, a twentieth of all, so that a small set has some
            updates in an epoch too (RecBole: 2,048 prefixes).
        unknown_share: share of the read notes that are hidden, so that an unknown note in a history means something.
        max_classes: with more notes than this, so many are drawn to stand against the targets of an update.
    """

    max_length: int = 50
    learning_rate: float | None = None
    max_epochs: int = 100
    patience: int = 20
    min_batch: int = 32
    max_batch: int = 512
    unknown_share: float = 0.02
    max_classes: int = 20_000


@dataclass(frozen=True)
class NoteFeatures:
    """Frozen vectors of notes.

    Attributes:
        ids: N note ids.
        matrix: (N, F) float32.
    """

    ids: Sequence[str]
    matrix: np.ndarray


class SequentialRecommender:
    """A trained baseline.

    A note that it has no vector for (by id: one that is in no training sequence; by features: one without features) is
    the unknown note: read as one learned vector, scored as one class that was never a target, so that it stands about
    where a note without clicks belongs, and all of them tie.
    """

    def __init__(self, model: SequentialModel, numbers: dict[str, int], max_length: int, history: list[float]) -> None:
        self._model, self._numbers, self._max_length = model.eval(), numbers, max_length
        self.validation_auc = history  # after each epoch

    @torch.no_grad()
    def scores(self, histories: Sequence[Sequence[str]], candidates: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Logit of each candidate as the next note after its history.

        Args:
            histories: N lists of note ids, oldest first; an empty one is read as one unknown note.
            candidates: N lists of note ids.

        Returns:
            N float32 arrays, one value per candidate.
        """
        device = next(self._model.parameters()).device
        found: list[np.ndarray] = []
        for start in range(0, len(histories), _ROWS):
            rows = [self._encode(history) for history in histories[start : start + _ROWS]]
            states = last_states(self._model, rows, device)
            for state, names in zip(states, candidates[start : start + _ROWS], strict=True):
                # Each item once: a matrix product can give equal rows different last digits, and so break a tie.
                numbers = np.array([self._numbers.get(name, UNKNOWN) for name in names], dtype=np.int64)
                items, place = np.unique(numbers, return_inverse=True)
                logits = self._model.embedding(torch.from_numpy(items).to(device)) @ state
                found.append(logits.float().cpu().numpy()[place])
        return found

    def _encode(self, history: Sequence[str]) -> list[int]:
        return _encode(history, self._numbers, self._max_length)


def fit(
    architecture: Architecture,
    sequences: Sequence[Sequence[str]],
    validation: Sequence[tuple[Sequence[str], str]],
    *,
    seed: int,
    features: NoteFeatures | None = None,
    settings: SequentialSettings | None = None,
) -> SequentialRecommender:
    """Train a baseline, and keep it as it was when it ranked the validation targets best.

    Args:
        architecture: "gru4rec" or "sasrec".
        sequences: note ids, oldest first. They must hold no validation or test target, and nothing later of that user.
        validation: (history, target); after every epoch the targets are ranked among all notes of the sequences. Empty:
            all epochs are trained.
        seed: of the initial weights, the order and the dropout; the process's own random state is left as it is.
        features: frozen vectors; None: by note id.

    Raises:
        DataError: no sequence of two notes, or no feature of any note in them.
    """
    chosen = settings or SequentialSettings()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seen = dict.fromkeys(note for sequence in sequences for note in sequence)
    names = list(seen) if features is None else list(features.ids)
    numbers = {name: at for at, name in enumerate(names, start=FIRST_NOTE)}
    rows = [_encode(sequence, numbers, chosen.max_length + 1) for sequence in sequences if len(sequence) > 1]
    classes = [UNKNOWN, *(numbers[name] for name in seen if name in numbers)]
    if not rows or len(classes) == 1:
        raise DataError(
            f"{architecture}: {len(rows)} training sequences of two notes or more, {len(classes) - 1} usable notes in "
            "them: leave it out of ranking.baselines, or use more events"
        )
    targets = [(_encode(history, numbers, chosen.max_length), numbers.get(target)) for history, target in validation]
    learned = set(classes)
    known = [(history, target) for history, target in targets if target in learned]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(stream_seed(seed, architecture))
        embedding = IdEmbedding(len(names) + FIRST_NOTE) if features is None else _embedding(features)
        model = SequentialModel(architecture, embedding, chosen.max_length).to(device)
        rate = chosen.learning_rate or _LEARNING_RATES[architecture]
        history = _train(model, rate, rows, torch.tensor(classes, device=device), known, chosen, seed)
    return SequentialRecommender(model, numbers, chosen.max_length, history)


def last_states(model: SequentialModel, rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """(B, D) states after the last item of each row."""
    items = _pad(rows).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return model(items)[torch.arange(len(rows), device=device), lengths - 1]


def _train(
    model: SequentialModel,
    learning_rate: float,
    rows: Sequence[Sequence[int]],
    classes: torch.Tensor,
    validation: Sequence[tuple[list[int], Any]],
    settings: SequentialSettings,
    seed: int,
) -> list[float]:
    """Early-stopped training; the model ends with its best weights. The validation AUC after each epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
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
        log.info("stopped after %d epochs, best at %d: AUC %.4f", len(history), best_epoch + 1, max(history))
    return history


def _loss(
    model: SequentialModel, rows: Sequence[Sequence[int]], classes: torch.Tensor, settings: SequentialSettings
) -> torch.Tensor:
    """Mean cross-entropy of every next note; an unknown next note (one without features) is no target."""
    items = _pad(rows).to(classes.device)
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
    # a batch of unknown notes alone has no target: its loss is nothing, not NaN
    return functional.cross_entropy(logits, place[targets], reduction="sum") / max(len(targets), 1)


@torch.no_grad()
def _validation_auc(
    model: SequentialModel, validation: Sequence[tuple[list[int], int]], classes: torch.Tensor
) -> float:
    """Mean share of the training notes that each target stands above, ties counted against us.

    Of the usual figures this is the steadiest on some tens of users: by MRR@10, RecBole's choice, a baseline stopped
    at the popular notes, before it had learned anything of sequences.
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
    return total * len(classes) / max(len(classes) - 1, 1) / len(validation)  # the target is no note above itself


def _embedding(features: NoteFeatures) -> FeatureEmbedding:
    if not len(features.ids):
        raise DataError("no note has features: leave this baseline out of ranking.baselines")
    return FeatureEmbedding(torch.from_numpy(np.ascontiguousarray(features.matrix, dtype=np.float32)))


def _encode(sequence: Sequence[str], numbers: dict[str, int], length: int) -> list[int]:
    return [numbers.get(name, UNKNOWN) for name in sequence[-length:]] or [UNKNOWN]


def _pad(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows])
