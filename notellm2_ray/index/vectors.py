"""Checks on every matrix of note vectors before it is stored or searched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from notellm2_ray.core.errors import DataError

UNIT_TOLERANCE = 1e-3  # float32 normalisation errs by 1e-7, bfloat16 by 4e-3
SHOWN = 5


def name_some(ids: Sequence[str] | np.ndarray) -> str:
    """At most :data:`SHOWN` of ``ids`` for an error message, and how many more there are."""
    shown = ", ".join(repr(str(note_id)) for note_id in ids[:SHOWN])
    return shown + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")


def first_numbers(vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
    """Unit vectors (N, D) cut to their first ``dimensions`` numbers, and of unit length again; None: as they are."""
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    cut = vectors[:, :dimensions]
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), np.float32(1e-12))


def check_unit(vectors: np.ndarray, ids: Sequence[str] | np.ndarray, where: str) -> None:
    """Refuse vectors that are not finite or not of unit length.

    Args:
        vectors: (N, D) float32.
        ids: (N,) note ids, for the message.
        where: what holds the vectors, for the message.

    Raises:
        DataError: names the notes.
    """
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    finite = np.isfinite(lengths)
    if not finite.all():
        bad = [ids[row] for row in np.flatnonzero(~finite)]
        raise DataError(
            f"{where}: NaN or infinite values in the vector of note {name_some(bad)}; "
            "the embedder is broken for these notes (look at its training loss); they must be embedded again"
        )
    wrong = np.flatnonzero(np.abs(lengths - 1) > UNIT_TOLERANCE)
    if len(wrong):
        raise DataError(
            f"{where}: the vector of note {name_some([ids[row] for row in wrong])} is not of unit length "
            f"(the first has length {lengths[wrong[0]]:.4g}); divide each vector by its length"
        )


def check_ids(ids: Sequence[str] | np.ndarray, vectors: np.ndarray, where: str) -> None:
    """Refuse ids that are not distinct, or not exactly one per row of ``vectors``.

    Raises:
        DataError: names the repeated notes.
    """
    if vectors.ndim != 2 or len(ids) != len(vectors):
        raise DataError(
            f"{where}: {len(ids)} note ids for vectors of shape {vectors.shape}; (N, D) with N ids is needed"
        )
    if len(set(ids)) != len(ids):
        repeated = [note_id for note_id, count in Counter(ids).items() if count > 1]
        raise DataError(f"{where}: note {name_some(repeated)} appears more than once; keep one vector per note")
