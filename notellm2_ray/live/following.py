"""A table's version with the index that holds exactly it, and going on to a newer version."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from notellm2_ray.core.errors import DataError, ModelError
from notellm2_ray.live.index import LiveIndex
from notellm2_ray.live.rows import to_batch
from notellm2_ray.live.table import LiveTable


@dataclass(frozen=True)
class Following:
    """What a follower has: a table's version and the index that holds exactly it."""

    table: LiveTable
    index: LiveIndex
    seq: int  # last commit group that is in the index
    committed_at: float  # when the writer wrote that group, seconds since 1970
    fragments: set[int]


class Change(NamedTuple):
    """Told to ``on_change``: the notes of new commit groups, or a whole new table."""

    written: list[str]
    deleted: list[str]
    seq: int
    reloaded: bool  # a table was loaded anew: everything may have changed


def applied(state: Following, table: LiveTable) -> tuple[Following, Change | None] | None:
    """A newer version of the table, brought into the state's index; None: it has to be loaded anew.

    Raises:
        ModelError: the table now holds another model's vectors.
    """
    if (table.model_fingerprint, table.dim) != (state.index.model_fingerprint, state.index.dim):
        raise ModelError(
            f"{table.path} now says it holds vectors of the model {table.model_fingerprint}, the index those of "
            f"{state.index.model_fingerprint}: they cannot be mixed. A new model needs a new table, "
            "which `notellm2 swap-embedder` makes"
        )
    if table.purged_seq > state.seq:
        return None  # tombstones that were not seen yet are gone
    rows = table.changes(state.seq, state.fragments)
    fragments = table.fragment_ids()
    if not len(rows):
        return replace(state, table=table, fragments=fragments), None
    batch = to_batch(rows, table.columns)
    state.index.apply(batch)
    seq, committed_at = last_group(rows)
    deleted = batch.deleted if batch.deleted is not None else np.zeros(len(rows), dtype=bool)
    written = [note_id for note_id, gone in zip(batch.ids, deleted, strict=True) if not gone]
    change = Change(written, [batch.ids[row] for row in np.flatnonzero(deleted)], seq, reloaded=False)
    return Following(table, state.index, seq, committed_at, fragments), change


def last_group(rows: pa.Table) -> tuple[int, float]:
    """Seq and time of the last commit group among rows."""
    seqs = rows["seq"].to_numpy()
    last = int(np.argmax(seqs))
    committed_at = rows["committed_at"][last].as_py()
    if committed_at is None:
        raise DataError("a row without committed_at: the table was written by something else")
    return int(seqs[last]), committed_at.timestamp()
