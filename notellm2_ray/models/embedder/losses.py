"""The contrastive losses (Eqs. 1, 8 and 9) over in-batch negatives of all ranks.

This module has no distributed code: rows of other ranks come from the injected ``gather``. Each rank computes the loss
of its own notes against the notes of all ranks. The mean over ranks is the loss of the whole batch. The same holds for
the gradients if the backward pass of ``gather`` sums each row's gradients over ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from notellm2_ray.models.embedder.vectors import NoteVectors

Gather = Callable[[torch.Tensor], tuple[torch.Tensor, int]]
"""This rank's rows (2b, ...) -> all ranks' rows in rank order (world * 2b, ...), and the offset of this rank's rows.

It gets float vectors, which must keep their gradient, and integer and boolean rows. Every rank has 2b rows.
"""


class EmbedderLoss(NamedTuple):
    """The loss that a training step minimises, and its parts; scalars."""

    total: torch.Tensor  # Eq. 9, or L^m alone for a variant without a visual vector
    multimodal: torch.Tensor  # L^m
    visual: torch.Tensor | None  # L^v


def embedder_loss(
    vectors: NoteVectors,
    note_keys: torch.Tensor,
    *,
    alpha: float,
    gather: Gather | None = None,
    mask_duplicates: bool = True,
) -> EmbedderLoss:
    """Eq. 9: (L^v + alpha L^m) / (1 + alpha); L^m alone for a variant without a visual vector.

    Args:
        vectors: of 2b notes: b queries, then their b targets.
        note_keys: (2b,) int64, equal for equal notes.
        alpha: weight of L^m.
        gather: see :data:`Gather`; None on a single rank.
        mask_duplicates: whether further copies of the row's note and of its target are left out of the negatives.
    """
    temperature = vectors.temperature
    multimodal = contrastive_loss(vectors.multimodal, temperature, note_keys, gather, mask_duplicates)
    if vectors.visual is None:
        return EmbedderLoss(multimodal, multimodal, None)
    visual = contrastive_loss(
        vectors.visual, temperature, note_keys, gather, mask_duplicates, present=vectors.has_visual
    )
    return EmbedderLoss((visual + alpha * multimodal) / (1 + alpha), multimodal, visual)


def contrastive_loss(
    vectors: torch.Tensor,
    temperature: torch.Tensor,
    note_keys: torch.Tensor,
    gather: Gather | None = None,
    mask_duplicates: bool = True,
    *,
    present: torch.Tensor | None = None,
) -> torch.Tensor:
    """Eq. 1: the mean over notes of -log softmax of the similarity to the related note, among all other notes.

    Args:
        vectors: (2b, D), any length; row i and row i + b are related.
        temperature: tau, one number; e^tau multiplies the cosine.
        note_keys: (2b,) int64.
        gather: see :data:`Gather`.
        mask_duplicates: see :func:`embedder_loss`.
        present: (2b,) bool, the rows that have a vector (default: all). A row without one is never a negative, and
            neither it nor its related row counts in the mean.

    Returns:
        Scalar, in float32 (float64 if the vectors are). With several ranks, the mean over ranks is Eq. 1.
    """
    if len(vectors) % 2 or len(vectors) != len(note_keys):
        raise ValueError(
            f"{len(vectors)} vectors and {len(note_keys)} keys do not fit: b queries and b targets have 2b keys"
        )
    if present is None:
        present = torch.ones(len(vectors), dtype=torch.bool, device=vectors.device)
    gather = gather or (lambda rows: (rows, 0))
    with torch.autocast(vectors.device.type, enabled=False):
        unit = F.normalize(vectors if vectors.dtype == torch.float64 else vectors.float(), dim=-1)
        others, offset = gather(unit)
        logits = unit @ others.T * temperature.to(unit.dtype).exp()
    related = _related(len(vectors), vectors.device) + offset
    excluded = _excluded(note_keys, gather(note_keys)[0], related, offset, mask_duplicates)
    all_present, _ = gather(present)
    counted = present & all_present[related]
    # Only in rows that count. The others keep these columns: a row of only -inf would have a NaN gradient.
    excluded |= ~all_present & counted[:, None]
    per_row = F.cross_entropy(logits.masked_fill(excluded, -torch.inf), related, reduction="none")
    # Divide by the mean count per rank, so that the mean over ranks is the mean over all rows that count.
    num_counted = gather(counted)[0].sum() * (len(vectors) / len(all_present))
    return torch.where(counted, per_row, 0.0).sum() / num_counted.clamp(min=1e-9)


def _related(num_notes: int, device: torch.device) -> torch.Tensor:
    """Index of each row's related note: i + b for a query, i - b for a target."""
    return (torch.arange(num_notes, device=device) + num_notes // 2) % num_notes


def _excluded(
    keys: torch.Tensor, all_keys: torch.Tensor, related: torch.Tensor, offset: int, mask_duplicates: bool
) -> torch.Tensor:
    """(2b, world * 2b) bool: columns that are excluded from each row's softmax. The related note never is."""
    rows = torch.arange(len(keys), device=keys.device)
    if mask_duplicates:
        excluded = (all_keys == keys[:, None]) | (all_keys == all_keys[related][:, None])
    else:
        excluded = torch.zeros(len(keys), len(all_keys), dtype=torch.bool, device=keys.device)
    excluded[rows, rows + offset] = True
    excluded[rows, related] = False
    return excluded
