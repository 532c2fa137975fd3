"""The columns under a live index: they only ever grow, so whoever looks at the first N rows needs no lock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from notellm2_ray.core.errors import DataError
from notellm2_ray.index.vectors import check_unit

NO_TIME = np.iinfo(np.int64).min  # a note whose creation time is not known
_SPARE = 1024


class Batch(NamedTuple):
    """Changes in order of arrival: notes written, or deleted where ``deleted`` says so.

    Of two changes of one note in a batch the later counts.
    """

    ids: Sequence[str]  # (N,)
    vectors: np.ndarray  # (N, D) float32, unit length; rows of deleted notes are not looked at
    deleted: np.ndarray | None = None  # (N,) bool; None: none is
    topics: Sequence[Sequence[str]] | None = None  # (N,)
    created_at: np.ndarray | None = None  # (N,) int64, microseconds since 1970, NO_TIME where unknown
    others: Mapping[str, np.ndarray] = {}  # further vector columns, (N, D) float32; NaN where a note has none

    def last_of_each(self) -> np.ndarray:
        """Rows that count, in order: the last one of each note."""
        last = {note_id: row for row, note_id in enumerate(self.ids)}
        return np.fromiter(sorted(last.values()), dtype=np.int64, count=len(last))

    def take(self, rows: np.ndarray) -> Batch:
        """Some of the rows."""
        return Batch(
            [self.ids[row] for row in rows.tolist()],
            self.vectors[rows],
            None if self.deleted is None else self.deleted[rows],
            None if self.topics is None else [self.topics[row] for row in rows.tolist()],
            None if self.created_at is None else self.created_at[rows],
            {name: matrix[rows] for name, matrix in self.others.items()},
        )


class Rows:
    """Append-only columns of notes.

    One thread appends; others may read the arrays up to a count that they were given afterwards. A column that is full
    is copied into a larger one, so arrays taken before stay as they are.

    Attributes:
        count: rows in use.
        ids: (capacity,) object array of str.
        vectors: (capacity, D) float32.
        created_at: (capacity,) int64 microseconds, :data:`NO_TIME` where unknown.
        others: further vector columns, (capacity, D) float32, NaN where a note has none.
        topics: topic to the rows that carry it, rising.
        topics_of: the topics of each row, as given.
    """

    def __init__(self, dim: int, others: Sequence[str] = (), capacity: int = _SPARE):
        self.count = 0
        self.dim = dim
        self.ids = np.empty(capacity, dtype=object)
        self.vectors = np.empty((capacity, dim), dtype=np.float32)
        self.created_at = np.empty(capacity, dtype=np.int64)
        self.others = {name: np.empty((capacity, dim), dtype=np.float32) for name in others}
        self.topics: dict[str, list[int]] = {}
        self.topics_of: list[Sequence[str]] = []

    @classmethod
    def holding(cls, batch: Batch, dim: int, others: Sequence[str]) -> Rows:
        """Columns filled with a batch, with room for some more."""
        rows = cls(dim, others, len(batch.ids) + len(batch.ids) // 8 + _SPARE)
        rows.append(batch)
        return rows

    def append(self, batch: Batch) -> slice:
        """Add all rows of a batch (none of them deleted) at the end; where they lie."""
        where = slice(self.count, self.count + len(batch.ids))
        if where.stop > len(self.ids):
            self._grow(where.stop)
        self.ids[where] = batch.ids
        self.vectors[where] = batch.vectors
        self.created_at[where] = NO_TIME if batch.created_at is None else batch.created_at
        for name, matrix in self.others.items():
            matrix[where] = batch.others.get(name, np.nan)
        topics = batch.topics if batch.topics is not None else [()] * len(batch.ids)
        self.topics_of.extend(topics)
        for row, names in enumerate(topics, start=where.start):
            for name in set(names):
                self.topics.setdefault(name, []).append(row)
        self.count = where.stop
        return where

    def read(self, rows: np.ndarray) -> Batch:
        """Some rows as a batch."""
        return Batch(
            self.ids[rows].tolist(),
            self.vectors[rows],
            None,
            [self.topics_of[row] for row in rows.tolist()],
            self.created_at[rows],
            {name: matrix[rows] for name, matrix in self.others.items()},
        )

    def _grow(self, needed: int) -> None:
        capacity = max(needed, len(self.ids) + len(self.ids) // 4) + _SPARE

        def larger(old: np.ndarray) -> np.ndarray:
            new = np.empty((capacity, *old.shape[1:]), dtype=old.dtype)
            new[: self.count] = old[: self.count]
            return new

        self.ids, self.vectors, self.created_at = larger(self.ids), larger(self.vectors), larger(self.created_at)
        self.others = {name: larger(matrix) for name, matrix in self.others.items()}


def check_batch(batch: Batch, dim: int, where: str) -> None:
    """Refuse a batch whose columns do not fit together, or with a vector that is not of unit length or ``dim``.

    Raises:
        DataError: names the notes.
    """
    vectors = batch.vectors
    if vectors.ndim != 2 or len(vectors) != len(batch.ids) or vectors.shape[1] != dim:
        raise DataError(f"{where}: vectors of shape {vectors.shape} for {len(batch.ids)} notes of {dim} dimensions")
    for name, matrix in batch.others.items():
        if matrix.shape != vectors.shape:
            raise DataError(f"{where}: {name} has the shape {matrix.shape}, the vectors have {vectors.shape}")
    kept = np.arange(len(batch.ids)) if batch.deleted is None else np.flatnonzero(~batch.deleted)
    check_unit(vectors[kept], [batch.ids[row] for row in kept.tolist()], where)
