"""A trained sequential baseline: scores of any candidates after any history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from notellm2_ray.baselines.ranking.sequential.model import PAD, UNKNOWN, SequentialModel

_ROWS = 256  # histories in a forward batch


@dataclass(frozen=True)
class FrozenFeatures:
    """Frozen vectors of notes.

    Attributes:
        ids: N note ids.
        matrix: (N, F) float32.
    """

    ids: Sequence[str]
    matrix: np.ndarray


class SequentialRecommender:
    """A trained baseline.

    Notes that it has no vector for are all one "unknown note": by id, those in no training sequence; by features, those
    without features. The unknown note has one learned vector when it is read. When it is scored it is a class that was
    never a target, so unknown notes tie, about where notes without clicks belong.
    """

    def __init__(self, model: SequentialModel, numbers: dict[str, int], max_length: int, history: list[float]) -> None:
        self._model, self._numbers, self._max_length = model.eval(), numbers, max_length
        self.validation_auc = history  # one value per epoch

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
                # Score each item once: a matrix product can give equal rows different last digits, which breaks ties.
                numbers = np.array([self._numbers.get(name, UNKNOWN) for name in names], dtype=np.int64)
                items, place = np.unique(numbers, return_inverse=True)
                logits = self._model.embedding(torch.from_numpy(items).to(device)) @ state
                found.append(logits.float().cpu().numpy()[place])
        return found

    def _encode(self, history: Sequence[str]) -> list[int]:
        return encode(history, self._numbers, self._max_length)


def last_states(model: SequentialModel, rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """(B, D) states after the last item of each row."""
    items = pad(rows).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return model(items)[torch.arange(len(rows), device=device), lengths - 1]


def encode(sequence: Sequence[str], numbers: dict[str, int], length: int) -> list[int]:
    """The numbers of a sequence's last notes; an empty sequence is one unknown note."""
    return [numbers.get(name, UNKNOWN) for name in sequence[-length:]] or [UNKNOWN]


def pad(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """(B, L) item numbers, padded on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows])
