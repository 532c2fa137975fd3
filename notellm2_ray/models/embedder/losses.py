"""The contrastive losses (Eqs. 1, 8 and 9) over in-batch negatives of all ranks, and hard negatives beside them.

This module has no distributed code: rows of other ranks come from the injected ``gather``. Each rank computes the loss
of its own notes against the notes of all ranks. The mean over ranks is the loss of the whole batch. The same holds for
the gradients if the backward pass of ``gather`` sums each row's gradients over ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from notellm2_ray.models.embedder.vectors import NoteVectors

Gather = Callable[[torch.Tensor], tuple[torch.Tensor, int]]
"""This rank's rows (n, ...) -> all ranks' rows in rank order (world * n, ...), and the offset of this rank's rows.

It gets float vectors, which must keep their gradient, and integer and boolean rows. Every rank has n rows.
"""

_MAX_SIMILARITIES = (
    2**20
)  # held at once; more are computed in blocks of rows, so that memory does not grow with the batch
PADDING = -1  # key of a note that only fills up a rank's negatives: no row sees it


class Negatives(NamedTuple):
    """Hard negatives of a step: notes after the b queries and b targets.

    Every row of every rank is compared with them. They are no rows of the loss themselves.
    """

    num_notes: int  # m, this rank's last m notes; every rank has as many
    related: torch.Tensor  # (K, 2) int64: a row of this rank, and a column of all ranks that is known to be related


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
    negatives: Negatives | None = None,
    false_negative_margin: float | None = None,
) -> EmbedderLoss:
    """Eq. 9: (L^v + alpha L^m) / (1 + alpha); L^m alone for a variant without a visual vector.

    Args:
        vectors: of n notes: b queries, then their b targets, then any hard negatives. One with an image is a negative
            of L^v too.
        note_keys: (n,) int64, equal for equal notes.
        alpha: weight of L^m.
        gather: see :data:`Gather`; None on a single rank.
        mask_duplicates: whether further copies of the row's note and of its target are left out of the negatives.
        negatives: the hard negatives, if there are any.
        false_negative_margin: see :func:`contrastive_loss`.
    """

    def one(of: torch.Tensor, present: torch.Tensor | None = None) -> torch.Tensor:
        return contrastive_loss(
            of,
            vectors.temperature,
            note_keys,
            gather,
            mask_duplicates,
            present=present,
            negatives=negatives,
            false_negative_margin=false_negative_margin,
        )

    multimodal = one(vectors.multimodal)
    if vectors.visual is None:
        return EmbedderLoss(multimodal, multimodal, None)
    visual = one(vectors.visual, vectors.has_visual)
    return EmbedderLoss((visual + alpha * multimodal) / (1 + alpha), multimodal, visual)


def contrastive_loss(
    vectors: torch.Tensor,
    temperature: torch.Tensor,
    note_keys: torch.Tensor,
    gather: Gather | None = None,
    mask_duplicates: bool = True,
    *,
    present: torch.Tensor | None = None,
    negatives: Negatives | None = None,
    false_negative_margin: float | None = None,
) -> torch.Tensor:
    """Eq. 1: the mean over notes of -log softmax of the similarity to the related note, among all other notes.

    The other notes are those of all pairs, and all hard negatives. A hard negative is left out for a row if it is the
    row's note, its related note, or known to be related to the row's note.

    Args:
        vectors: (n, D), any length: of 2b notes, of which row i and row i + b are related, and then of hard negatives.
        temperature: tau, one number; e^tau multiplies the cosine.
        note_keys: (n,) int64; :data:`PADDING` for a hard negative that is to be ignored.
        gather: see :data:`Gather`.
        mask_duplicates: see :func:`embedder_loss`.
        present: (n,) bool, the notes that have a vector (default: all). A note without one is never a negative, and
            neither it nor its related note counts in the mean.
        negatives: the hard negatives, if there are any; n = 2b + their number.
        false_negative_margin: a note whose cosine with the row exceeds that of the related note by more than this is
            left out too, as probably related; None: none is. (Solatorio, GISTEmbed, arXiv 2402.16829, where another
            model judges; here it is the trained one.)

    Returns:
        Scalar, in float32 (float64 if the vectors are). With several ranks, the mean over ranks is Eq. 1.
    """
    num_rows = len(vectors) - (negatives.num_notes if negatives is not None else 0)
    if num_rows % 2 or len(vectors) != len(note_keys):
        raise ValueError(
            f"{len(vectors)} vectors and {len(note_keys)} keys do not fit: b queries and b targets have 2b keys"
        )
    if present is None:
        present = torch.ones(len(vectors), dtype=torch.bool, device=vectors.device)
    if negatives is not None:
        present = present & (note_keys != PADDING)
    gather = gather or (lambda rows: (rows, 0))
    with torch.autocast(vectors.device.type, enabled=False):
        unit = F.normalize(vectors if vectors.dtype == torch.float64 else vectors.float(), dim=-1)
        others, offset = gather(unit)
        scale = temperature.to(unit.dtype).exp()
    related = _related(num_rows, vectors.device) + offset
    all_keys, all_present = gather(note_keys)[0], gather(present)[0]
    counted = present[:num_rows] & all_present[related]

    def losses(begin: int, end: int) -> torch.Tensor:
        """-log softmax of rows ``begin`` to ``end``."""
        block = slice(begin, end)
        with torch.autocast(vectors.device.type, enabled=False):
            cosines = unit[block] @ others.T
            logits = cosines * scale
        excluded = _copies(note_keys[block], all_keys, related[block])
        if not mask_duplicates:  # only copies among the hard negatives
            excluded &= torch.arange(len(all_keys), device=excluded.device) % len(vectors) >= num_rows
        if negatives is not None:
            row, column = negatives.related[(negatives.related[:, 0] >= begin) & (negatives.related[:, 0] < end)].T
            excluded[row - begin, column] = True
        if false_negative_margin is not None:
            known = cosines.detach()
            excluded |= known > known.gather(1, related[block, None]) + false_negative_margin
        rows = torch.arange(len(excluded), device=excluded.device)
        excluded[rows, rows + begin + offset] = True
        excluded[rows, related[block]] = False
        # Only in rows that count. The others keep these columns: a row of only -inf would have a NaN gradient.
        excluded |= ~all_present & counted[block, None]
        return F.cross_entropy(logits.masked_fill(excluded, -torch.inf), related[block], reduction="none")

    per_row = _in_blocks(losses, num_rows, max(1, _MAX_SIMILARITIES // len(others)))
    # Divide by the mean count per rank, so that the mean over ranks is the mean over all rows that count.
    num_counted = gather(counted)[0].sum() * (len(vectors) / len(all_present))
    return torch.where(counted, per_row, 0.0).sum() / num_counted.clamp(min=1e-9)


def _in_blocks(losses: Callable[[int, int], torch.Tensor], num_rows: int, size: int) -> torch.Tensor:
    """``losses`` of all rows, for ``size`` rows at a time; the backward pass computes each block again."""
    if num_rows <= size:
        return losses(0, num_rows)
    blocks = [(begin, min(begin + size, num_rows)) for begin in range(0, num_rows, size)]
    return torch.cat([checkpoint(losses, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks])


def _related(num_notes: int, device: torch.device) -> torch.Tensor:
    """Index of each row's related note: i + b for a query, i - b for a target."""
    return (torch.arange(num_notes, device=device) + num_notes // 2) % num_notes


def _copies(keys: torch.Tensor, all_keys: torch.Tensor, related: torch.Tensor) -> torch.Tensor:
    """(rows, world * n) bool: columns with a copy of the row's note or of its related note."""
    return (all_keys == keys[:, None]) | (all_keys == all_keys[related][:, None])
