"""The table of objectives: what training an embedder minimises. An objective is one file or function, and a row here.

Another package adds one through the entry-point group ``notellm2_ray.objectives``, which every process sees that Ray
starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from notellm2_ray.core.registry import Registry
from notellm2_ray.core.settings.model import ModelSettings
from notellm2_ray.core.settings.train import TrainSettings
from notellm2_ray.models.embedder.losses import Gather, Negatives, embedder_loss
from notellm2_ray.models.embedder.vectors import NoteVectors


class Loss(Protocol):
    """The loss of a step."""

    def __call__(
        self,
        vectors: NoteVectors,
        note_keys: torch.Tensor,
        gather: Gather | None = None,
        *,
        negatives: Negatives | None = None,
    ) -> torch.Tensor:
        """A scalar in float32, whose mean over ranks is the loss of the whole batch.

        Args:
            vectors: of 2b notes, the b queries first and then their b targets, and of any hard negatives after them.
            note_keys: (n,) int64, equal for equal notes.
            gather: gives the rows of all ranks; None on a single rank.
            negatives: given only with ``train.hard_negatives``: how many notes are hard negatives, and what is known of
                them. An objective without this argument works without them.
        """
        ...


Objective = Callable[[ModelSettings, TrainSettings], Loss]


def contrastive(model: ModelSettings, train: TrainSettings) -> Loss:
    """NoteLLM-2's loss over in-batch negatives (Eqs. 1, 8 and 9), and hard negatives beside them."""

    def loss(
        vectors: NoteVectors,
        note_keys: torch.Tensor,
        gather: Gather | None = None,
        *,
        negatives: Negatives | None = None,
    ) -> torch.Tensor:
        return embedder_loss(
            vectors,
            note_keys,
            alpha=model.alpha,
            gather=gather,
            mask_duplicates=train.mask_duplicates,
            negatives=negatives,
            false_negative_margin=train.false_negative_margin,
        ).total

    return loss


OBJECTIVES: Registry[Objective] = Registry(
    "objective", "notellm2_ray.objectives", {"contrastive": "notellm2_ray.train.objectives:contrastive"}
)


def loss_of(model: ModelSettings, train: TrainSettings) -> Loss:
    """The loss that ``train.objective`` names, at the lengths of ``train.dimensions``.

    Raises:
        ConfigError: there is no such objective.
    """
    loss = OBJECTIVES.get(train.objective)(model, train)
    return at_lengths(loss, train.dimensions) if train.dimensions else loss


def at_lengths(loss: Loss, dimensions: Sequence[int]) -> Loss:
    """Matryoshka representation learning: the mean of a loss over vectors cut to their first numbers.

    (Kusupati et al. 2022, Eq. 1, with equal weights.) The loss divides each cut vector by its length anew.
    """

    def mean(vectors: NoteVectors, note_keys: torch.Tensor, gather: Gather | None = None, **more: Any) -> torch.Tensor:
        return torch.stack([loss(vectors.first(one), note_keys, gather, **more) for one in dimensions]).mean()

    return mean
