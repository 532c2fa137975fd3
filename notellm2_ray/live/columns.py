"""The columns of a live index. They only ever grow, so that readers of the first N rows need no lock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from notellm2_ray.core.errors import DataError
from notellm2_ray.index.vectors import check_unit

NO_TIME = np.iinfo(np.int64).min  # a note whose creation time is not known
_SPARE = 1024


class NoteBatch(NamedTuple):
    """Changes in order of arrival: each row writes a note, or deletes it if ``deleted`` says so.

    If a batch changes a note twice, the later change counts.
    """

    ids: Sequence[str]  # (N,)
    vectors: np.ndarray  # (N, D) float32, unit length; rows of deleted notes are ignored
    deleted: np.ndarray | None = None  # (N,) bool; None: no row deletes
    topics: Sequence[Sequence[str]] | None = None  # (N,)
    created_at: np.ndarray | None = None  # (N,) int64, microseconds since 1970, NO_TIME if unknown
    others: Mapping[str, np.ndarray] = {}  # further vector columns, (N, D) float32; NaN if a note has none

    def last_of_each(self) -> np.ndarray:
        """The last row of each note, ascending: the rows that count."""
        last = {note_id: row for row, note_id in enumerate(self.ids)}
        return np.fromiter(sorted(last.values()), dtype=np.int64, count=len(last))

    def take(self, rows: np.ndarray) -> NoteBatch:
        """Some of the rows."""
        return NoteBatch(
            [self.ids[row] for row in rows.tolist()],
            self.vectors[rows],
            None if self.deleted is None else self.deleted[rows],
            None if self.topics is None else [self.topics[row] for row in rows.tolist()],
            None if self.created_at is None else self.created_at[rows],
            {name: matrix[rows] for name, matrix in self.others.items()},
        )


class NoteColumns:
    """Append-only columns of notes.

    One thread appends; others may read the arrays up to a count that they were given afterwards. A full column is
    copied into a larger one, so that arrays handed out before do not change.

    Attributes:
        count: rows in use.
        ids: (capacity,) object array of str.
        vectors: (capacity, D) float32.
        created_at: (capacity,) int64 microseconds, :data:`NO_TIME` if unknown.
        others: further vector columns, (capacity, D) float32, NaN if a note has none.
        topics: the rows of each topic, ascending.
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
    def holding(cls, batch: NoteBatch, dim: int, others: Sequence[str]) -> NoteColumns:
        """Columns filled with a batch, with some spare capacity."""
        rows = cls(dim, others, len(batch.ids) + len(batch.ids) // 8 + _SPARE)
        rows.append(batch)
        return rows

    def append(self, batch: NoteBatch) -> slice:
        """Add a batch (without deletions) at the end; the slice that it fills."""
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

    def read(self, rows: np.ndarray) -> NoteBatch:
        """Some rows as a batch."""
        return NoteBatch(
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


def check_batch(batch: NoteBatch, dim: int, where: str) -> None:
    """Refuse a batch whose columns differ in length, or a vector without unit length or with other than ``dim`` values.

    Raises:
        DataError: names the notes.
    """
    vectors = batch.vectors
    if vectors.ndim != 2 or len(vectors) != len(batch.ids) or vectors.shape[1] != dim:
        raise DataError(f"{where}: vectors have the shape {vectors.shape}, ({len(batch.ids)}, {dim}) is needed")
    for name, matrix in batch.others.items():
        if matrix.shape != vectors.shape:
            raise DataError(f"{where}: {name} has the shape {matrix.shape}, but the vectors have {vectors.shape}")
    kept = np.arange(len(batch.ids)) if batch.deleted is None else np.flatnonzero(~batch.deleted)
    check_unit(vectors[kept], [batch.ids[row] for row in kept.tolist()], where)
