"""Notices a contrastive training that does not learn: its loss stays where all vectors are alike."""

from __future__ import annotations

import math
from collections import deque

_STEPS = 50  # when it is judged; a shorter run is judged at its end
_LAST = 10  # steps of the mean
_NEAR = 0.02  # of the plateau's loss: what vectors that are all nearly alike are below it


class Plateau:
    """The losses of a run's first steps against the plateau: ln(2B - 1), the loss of B pairs of equal vectors."""

    def __init__(self, batch_pairs: int, total_steps: int, negatives: int = 0) -> None:
        """For batches of ``batch_pairs`` pairs with ``negatives`` further notes each."""
        self.level = math.log(max(1, batch_pairs * (2 + negatives) - 1))
        self._judged_at = min(_STEPS, total_steps)
        self._losses: deque[float] = deque(maxlen=_LAST)

    def warning(self, step: int, loss: float) -> str | None:
        """What to tell the user after ``step`` (counted from 0): once, if the run sits on the plateau."""
        self._losses.append(loss)
        if step + 1 != self._judged_at or self.level == 0:
            return None
        mean = sum(self._losses) / len(self._losses)
        if mean < (1 - _NEAR) * self.level:
            return None
        return (
            f"after {step + 1} steps the loss is {mean:.3f}, and that of vectors that are all alike is "
            f"{self.level:.3f}: the model has learned next to nothing. Its learning rate may be too low for so "
            "few steps (train.learning_rate, train.connector_learning_rate), its softmax too sharp for vectors "
            "that start close together (model.initial_temperature), or the notes of a pair too unlike each other"
        )
