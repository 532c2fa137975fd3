"""What must not be a negative of a query: notes related to it, their copies, and notes that its users clicked too."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from notellm2_ray.core.note_store import NoteStore

_QUERIES_AT_ONCE = 256  # each with all notes that it shares a user with
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def copies_among(store: NoteStore, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) int64 each: the first note with the same text, and with the same image; itself where it has none."""
    texts: list[bytes] = []
    images: list[bytes] = []
    for batch in store.batches(ids.tolist()):
        columns = [batch.column(name).to_pylist() for name in ("title", "topics", "content", "image")]
        for title, topics, content, image in zip(*columns, strict=True):
            parts = [" ".join(part.split()).casefold() for part in (title, *topics, content)]
            texts.append(_digest("\n".join(parts).encode("utf-8", "surrogatepass")) if any(parts) else b"")
            images.append(_digest(image) if image else b"")
    return _first_equal(texts), _first_equal(images)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _first_equal(values: list[bytes]) -> np.ndarray:
    first: dict[bytes, int] = {}
    return np.array([first.setdefault(value, row) if value else row for row, value in enumerate(values)], np.int64)


class Related:
    """Which notes are a query, related to it, or copies of any of these.

    Args:
        copies: as of :func:`copies_among`.
        ends: (P, 2) int64, the notes of each pair; -1 for one that is not among the N notes.
    """

    def __init__(self, copies: Sequence[np.ndarray], ends: np.ndarray) -> None:
        ends = ends[(ends >= 0).all(axis=1)]
        own = np.arange(len(copies[0]))
        heads = np.concatenate([own, ends[:, 0], ends[:, 1]])
        tails = np.concatenate([own, ends[:, 1], ends[:, 0]])
        self._copies = copies
        self._banned = [np.unique(heads * len(own) + group[tails]) for group in copies]

    def __call__(self, queries: np.ndarray, notes: np.ndarray) -> np.ndarray:
        """(Q, K) bool, for (Q,) queries and (Q, K) notes."""
        size = len(self._copies[0])
        hits = np.zeros(notes.shape, bool)
        for group, banned in zip(self._copies, self._banned, strict=True):
            codes = queries[:, None] * size + group[notes]
            place = np.minimum(np.searchsorted(banned, codes), len(banned) - 1)
            hits |= banned[place] == codes
        return hits


class CommonClicks:
    """How many users clicked both of two notes.

    Args:
        events: Parquet directory (EVENT_SCHEMA).
        ids: (N,) note ids.
        actions: that count as a click.
        start, end: of the log, in microseconds since 1970; the end is exclusive.
    """

    def __init__(self, events: Path, ids: np.ndarray, actions: Sequence[str], start: int, end: int) -> None:
        from scipy.sparse import csr_matrix

        first, last = (pa.scalar(_EPOCH + timedelta(microseconds=at), pa.timestamp("us", "UTC")) for at in (start, end))
        when = (ds.field("timestamp") >= first) & (ds.field("timestamp") < last)
        clicks = ds.dataset(str(events), format="parquet").to_table(
            ["note_id", "user_id"], filter=when & ds.field("action").isin(list(actions))
        )
        clicks = clicks.group_by(["note_id", "user_id"]).aggregate([])  # a user counts once
        notes = pc.index_in(clicks["note_id"], value_set=pa.array(ids, pa.string()))
        users = clicks["user_id"].combine_chunks().dictionary_encode()
        known = notes.is_valid()
        rows = notes.filter(known).to_numpy(), users.indices.filter(known.combine_chunks()).to_numpy()
        self._clicks: Any = csr_matrix((np.ones(len(rows[0]), np.int32), rows), (len(ids), len(users.dictionary)))

    def __call__(self, queries: np.ndarray, notes: np.ndarray) -> np.ndarray:
        """(Q, K) int32: the users that clicked both, for (Q,) queries and (Q, K) notes, as places in ``ids``."""
        found = np.zeros(notes.shape, np.int32)
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            some = slice(start, start + _QUERIES_AT_ONCE)
            common = self._clicks[queries[some]] @ self._clicks.T
            places = np.broadcast_to(np.arange(common.shape[0])[:, None], notes[some].shape)
            found[some] = np.asarray(common[places.ravel(), notes[some].ravel()]).reshape(notes[some].shape)
        return found
