"""How many users clicked both of two notes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

_QUERIES_AT_ONCE = 256  # each with all notes that it shares a user with
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class CommonClicks:
    """The clicks of a log on some notes.

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
