"""A version of the live table with an index of exactly its notes: loading it, and advancing it to a newer version."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from notellm2_ray.core.errors import ConfigError, DataError, ModelError, OutputError
from notellm2_ray.core.settings.retrieval import IndexSettings
from notellm2_ray.index.ann import AnnIndex
from notellm2_ray.live.index import LiveIndex
from notellm2_ray.live.rows import to_batch
from notellm2_ray.live.table import LiveTable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexedTable:
    """A version of the table and the index of exactly its notes."""

    table: LiveTable
    index: LiveIndex
    seq: int  # last commit group that is in the index
    committed_at: float  # when the writer wrote that group, seconds since 1970
    fragments: set[int]


class Change(NamedTuple):
    """The argument of ``on_change``: the notes of new commit groups, or a newly loaded table."""

    written: list[str]
    deleted: list[str]
    seq: int
    reloaded: bool  # a table was loaded: any note may have changed


def load(table: LiveTable, settings: IndexSettings, saved: str | Path | None, **arguments: Any) -> IndexedTable:
    """Read a version of the table and build its index.

    Args:
        saved: directory of an :class:`AnnIndex` to use if it fits the table; a damaged one is ignored with a warning.
        arguments: further arguments of :class:`LiveIndex`.
    """
    parts = [pa.Table.from_batches([part]) for part in table.scan()]
    rows = pa.concat_tables(parts) if parts else table.dataset.schema.empty_table()
    index = LiveIndex(
        to_batch(rows, table.columns),
        settings,
        model_fingerprint=table.model_fingerprint,
        others=table.columns[1:],
        main=None if saved is None else _read_saved(saved, table.model_fingerprint),
        **arguments,
    )
    seq, committed_at = last_group(rows) if len(rows) else (-1, 0.0)
    return IndexedTable(table, index, max(seq, table.purged_seq), committed_at, table.fragment_ids())


def _read_saved(directory: str | Path, model_fingerprint: str) -> AnnIndex | None:
    try:
        saved = AnnIndex.load(directory)
    except (ConfigError, OutputError) as error:  # damaged, or made for a GPU that this machine does not have
        log.warning("%s; the index is built anew", error)
        return None
    return saved if saved.model_fingerprint == model_fingerprint else None


def advanced(state: IndexedTable, table: LiveTable) -> tuple[IndexedTable, Change | None] | None:
    """Bring the state's index to a newer version of its table; None if the table has to be loaded anew.

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
        return None  # tombstones that the index has not seen yet were removed
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
    return IndexedTable(table, state.index, seq, committed_at, fragments), change


def last_group(rows: pa.Table) -> tuple[int, float]:
    """Seq and time of the last commit group among rows.

    Raises:
        DataError: a row has no time, so the table was not written by :class:`~notellm2_ray.live.store.LiveStore`.
    """
    seqs = rows["seq"].to_numpy()
    last = int(np.argmax(seqs))
    committed_at = rows["committed_at"][last].as_py()
    if committed_at is None:
        raise DataError("a row has no committed_at: the table was not written by this program")
    return int(seqs[last]), committed_at.timestamp()
