"""Who clicked what in the training log: what collaborative filtering may know.

It knows no click of the test log, from which the test pairs are mined: a row that counts those reads off the answer.
Notes without a click in the training log are cold, and have no neighbours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from notellm2_ray.baselines.recall.baseline import Ranks, RecallData
from notellm2_ray.evaluate.recall.metrics import ranks_by_query

if TYPE_CHECKING:
    from scipy import sparse

REMARK = "it knows training clicks alone."


@dataclass(frozen=True)
class TrainClicks:
    """Users and the notes that they clicked.

    Attributes:
        columns: note id to column.
        notes_of: (U, N) CSR matrix of ones, U users and N notes.
        users_of: the same as CSC; the users of a note are in the order of their last click on it.
    """

    columns: dict[str, int]
    notes_of: sparse.csr_matrix
    users_of: sparse.csc_matrix

    @classmethod
    def build(cls, users: np.ndarray, notes: np.ndarray, times: np.ndarray, ids: list[str]) -> TrainClicks:
        """From (E,) numbers of users and notes, and the times of the clicks; ``ids`` names the notes."""
        from scipy import sparse

        shape = (int(users.max(initial=-1)) + 1, len(ids))
        latest = np.lexsort((times, users, notes))
        keys = (notes * max(shape[0], 1) + users)[latest]
        kept = latest[np.append(keys[1:] != keys[:-1], True)[: len(keys)]]  # the last click of a user on a note
        users, notes, times = users[kept], notes[kept], times[kept]
        by_note = np.lexsort((times, notes))
        starts = np.append(0, np.cumsum(np.bincount(notes, minlength=shape[1])))
        users_of = sparse.csc_matrix((np.ones(len(users), np.int64), users[by_note], starts), shape=shape)
        notes_of = sparse.csr_matrix((np.ones(len(users), np.int64), (users, notes)), shape=shape)
        return cls({note: column for column, note in enumerate(ids)}, notes_of, users_of)

    def users(self, column: int) -> np.ndarray:
        """Users who clicked a note, the latest last."""
        return self.users_of.indices[self.users_of.indptr[column] : self.users_of.indptr[column + 1]]


def read_train_clicks(data: RecallData) -> TrainClicks:
    """The clicks of the log that the training pairs were mined from."""
    window = json.loads(data.workspace.train_log.read_text(encoding="utf-8"))
    start, end = (pa.scalar(window[name], pa.timestamp("us", tz="UTC")) for name in ("start", "end"))
    counted = pq.read_table(data.workspace.pair_popularity, columns=["note_id", "train_clicks"])
    known = counted.filter(pc.greater(counted["train_clicks"], 0))["note_id"].combine_chunks()
    clicked = ds.field("action").isin(list(data.settings.pairs.click_actions)) & ds.field("note_id").isin(known)
    inside = (ds.field("timestamp") >= start) & (ds.field("timestamp") < end)
    events = ds.dataset(data.workspace.events).to_table(
        columns=["user_id", "note_id", "timestamp"], filter=clicked & inside
    )
    users = events["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    notes = pc.index_in(events["note_id"], known).combine_chunks().to_numpy()
    times = events["timestamp"].cast(pa.int64()).to_numpy()
    return TrainClicks.build(users.astype(np.int64), notes.astype(np.int64), times, known.to_pylist())


def ranks_by_clicks(data: RecallData, scores_of: Callable[[TrainClicks, int], np.ndarray]) -> Ranks:
    """Ranks by a similarity of notes that is computed from training clicks; a cold note is similar to none.

    Args:
        scores_of: the clicks and a note's column to (N,) similarities with all notes.
    """
    task, clicks = data.task, data.once("training clicks", lambda: read_train_clicks(data))
    places = np.array([clicks.columns.get(note, -1) for note in task.pool_ids], dtype=np.int64)

    def pool_scores(query: str) -> np.ndarray:
        if query not in clicks.columns:
            return np.zeros(len(places))
        return np.where(places >= 0, scores_of(clicks, clicks.columns[query])[places], 0.0)

    return {None: ranks_by_query(pool_scores, task.query_ids, task.query_rows, task.target_rows)}
