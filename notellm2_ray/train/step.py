"""One training step: from a step's notes to the loss, as one module that an engine can wrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from notellm2_ray.models.embedder.losses import Negatives
from notellm2_ray.models.embedder.vectors import NoteVectors, join_vectors
from notellm2_ray.train.distributed import gather_rows
from notellm2_ray.train.objectives import Loss


class StepOutput(NamedTuple):
    """The result of a training step."""

    loss: torch.Tensor  # scalar, of this rank; its mean over ranks is the loss of the batch
    temperature: torch.Tensor  # scalar, tau before the update
    finite: torch.Tensor  # (n,) bool: notes whose vectors are finite


class EmbedderStep(nn.Module):
    """An embedder's network and its loss in one forward pass, however many groups of notes a step has.

    ZeRO-3 and DDP expect one forward pass per step of the module that they wrap.
    """

    def __init__(self, model: Any, *, loss: Loss, bf16: bool, cache_casts: bool = True) -> None:
        """Wrap ``model``.

        Args:
            model: a :class:`~notellm2_ray.models.embedder.kinds.Network`.
            loss: what is minimised.
            bf16: whether matrix products are computed in bfloat16; weights, similarity and loss are always float32.
            cache_casts: whether weights that were cast to bfloat16 are kept for the next group.
        """
        super().__init__()
        self.model = model
        self._loss, self._bf16, self._cache = loss, bf16, cache_casts

    def forward(
        self,
        groups: Sequence[Any],
        positions: torch.Tensor,
        note_keys: torch.Tensor | None = None,
        negatives: Negatives | None = None,
    ) -> StepOutput | NoteVectors:
        """The :class:`StepOutput` of a step; without ``note_keys`` the NoteVectors of the notes, in their order.

        Args:
            groups: collated batches, each of which is copied to the device of ``positions`` when its turn comes.
            positions: (n,) int64, each note's position in the concatenated groups.
            note_keys: (n,) int64, equal for equal notes: b queries, then their b targets, then any hard negatives.
            negatives: of the step, on any device; None: there are none, and n = 2b.
        """
        device = positions.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16, cache_enabled=self._bf16 and self._cache):
            parts = [self.model(batch.to(device, non_blocking=True)) for batch in groups]
        vectors = join_vectors(parts, positions)
        return vectors if note_keys is None else self.output(vectors, note_keys, negatives)

    def output(self, vectors: NoteVectors, note_keys: torch.Tensor, negatives: Negatives | None = None) -> StepOutput:
        """The result of a step whose notes have these vectors."""
        device = vectors.multimodal.device
        with torch.autocast(device.type, enabled=False):
            if negatives is None:  # an objective without hard negatives need not know of them
                loss = self._loss(vectors, note_keys, gather_rows)
            else:
                own = negatives._replace(related=negatives.related.to(device))
                loss = self._loss(vectors, note_keys, gather_rows, negatives=own)
        finite = torch.isfinite(vectors.multimodal).all(dim=-1)
        return StepOutput(loss, vectors.temperature.detach().float().clone(), finite)
