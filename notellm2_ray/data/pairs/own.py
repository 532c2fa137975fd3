"""Pairs of related notes from a table of one's own (``pairs.table``), in place of mined ones.

Its columns are ``query_id`` and ``target_id``, and perhaps ``score`` (1 where it is missing) and ``negatives``: ids of
notes that are not related to the query, as a list or in one string.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.schema import NEGATIVES, PAIR_SCHEMA
from notellm2_ray.core.settings import PairSettings
from notellm2_ray.data.arrays import offsets_of
from notellm2_ray.data.columns import json_text, to_text, to_topics, topic_lists
from notellm2_ray.data.event_log import parquet_files
from notellm2_ray.data.pairs.related import MinedPairs
from notellm2_ray.data.pairs.split import Split
from notellm2_ray.data.sources.files import TableFile, list_files
from notellm2_ray.data.sources.formats import column_names, read_batches

log = logging.getLogger("notellm2_ray")

SETTING = "pairs.table"
_ENDS = ["query_id", "target_id"]
_WITH_NEGATIVES = PAIR_SCHEMA.append(pa.field(NEGATIVES, pa.list_(pa.string()), nullable=False))
_ROWS_AT_ONCE = 1 << 16
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def own_pairs(prepared: Path, parted: Split, settings: PairSettings) -> tuple[MinedPairs, MinedPairs]:
    """The pairs of ``settings.table`` for training, with ``negatives``, and for testing.

    A pair trains if both of its notes are training notes, and tests if both are in the test pool. Others are left out,
    as are rows without an id or with an id that no note has, and negatives that are no training notes. Clicks are
    counted as for mined pairs.

    Raises:
        DataError: the table cannot be read, lacks a column, or leaves one side without a pair.
    """
    table, lost = _read(str(settings.table), parted.notes)
    if lost:
        log.warning("%s: %d row(s) are left out: an id is missing, is no note's, or is there twice", SETTING, lost)
    known = parted.notes.filter(pa.array(~parted.is_test))
    train = _within(table, known, "training")
    train = train.set_column(3, _WITH_NEGATIVES.field(3), _known(train[NEGATIVES], known))
    test = _within(table, parted.notes.filter(pa.array(parted.in_pool)), "test").select(PAIR_SCHEMA.names)
    log.info("%s: %d training and %d test pairs of %d", SETTING, len(train), len(test), len(table))
    sides = (train, known, parted.train_window), (test, parted.notes, parted.test_window)
    mined = [
        MinedPairs(pairs, _clicks(prepared, notes, settings.click_actions, *window), _counts(pairs, lost))
        for pairs, notes, window in sides
    ]
    return mined[0], mined[1]


def _read(pattern: str, notes: pa.Array) -> tuple[pa.Table, int]:
    """Pairs of known notes, each once, by query (in the order of ``notes``) and score; and how many rows are lost."""
    table = pa.concat_tables(_typed(raw) for file in list_files(pattern, "auto", SETTING) for raw in _batches(file))
    query, target = (pc.fill_null(pc.index_in(table[name], value_set=notes), -1).to_numpy() for name in _ENDS)
    order = np.lexsort((target, -table["score"].to_numpy(), query))
    order = order[(query[order] >= 0) & (target[order] >= 0) & (query[order] != target[order])]
    _, first = np.unique(query[order].astype(np.int64) * len(notes) + target[order], return_index=True)
    order = order[np.sort(first)]
    return table.take(pa.array(order)).cast(_WITH_NEGATIVES), len(table) - len(order)


def _batches(file: TableFile) -> Iterator[pa.Table]:
    names = column_names(file)
    if missing := [name for name in _ENDS if name not in names]:
        raise DataError(f"{file.path}: missing column(s) {', '.join(missing)}; its columns are {', '.join(names)}")
    converters = {**dict.fromkeys(PAIR_SCHEMA.names, json_text), NEGATIVES: lambda values: topic_lists(values, None)}
    return read_batches(file, _WITH_NEGATIVES.names, _ROWS_AT_ONCE, converters)


def _typed(raw: pa.Table) -> pa.Table:
    """The columns in our types. An id is null where it is missing or wrong, and a list is empty."""

    def column(name: str) -> pa.Array:
        return raw[name] if name in raw.column_names else pa.nulls(len(raw), pa.string())

    ends = [to_text(column(name)).values for name in _ENDS]
    lists = pc.fill_null(to_topics(column(NEGATIVES)).values, pa.scalar([], pa.list_(pa.string())))
    return pa.table([*ends, _scores(column("score")), lists], names=_WITH_NEGATIVES.names)


def _scores(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    if pa.types.is_string(column.type):
        column = pc.if_else(pc.equal(pc.utf8_trim_whitespace(column), ""), None, column)
    try:
        return pc.fill_null(column.cast(pa.float64()), 1.0)
    except pa.ArrowInvalid as error:
        raise DataError(f"{SETTING}: a score is no number ({error})") from error


def _within(table: pa.Table, notes: pa.Array, side: str) -> pa.Table:
    inside = pc.and_(*(pc.is_in(table[name], value_set=notes) for name in _ENDS))
    if not pc.any(inside).as_py():
        raise DataError(
            f"{SETTING}: none of its {len(table)} usable pairs joins two {side} notes: change split.test_share or "
            "split.by, or give further pairs"
        )
    return table.filter(inside)


def _known(lists: pa.ChunkedArray, notes: pa.Array) -> pa.Array:
    """The lists without ids that are not among ``notes``."""
    whole = lists.combine_chunks()
    values = pc.list_flatten(whole)
    kept = pc.is_in(values, value_set=notes)
    if left_out := len(values) - (pc.sum(kept).as_py() or 0):
        log.warning("%s: %d of %d negatives are left out: they are no training notes", SETTING, left_out, len(values))
    parents = pc.list_parent_indices(whole).filter(kept).to_numpy()
    offsets = offsets_of(np.bincount(parents, minlength=len(whole)))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values.filter(kept))


def _clicks(prepared: Path, notes: pa.Array, actions: tuple[str, ...], start: int, end: int) -> np.ndarray:
    """(N,) int64, the users who clicked each note in [start, end), microseconds since 1970."""
    events = ds.dataset([str(path) for path in parquet_files(prepared / "events")], format="parquet")
    first, last = (pa.scalar(_EPOCH + timedelta(microseconds=at), pa.timestamp("us", "UTC")) for at in (start, end))
    when = (ds.field("timestamp") >= first) & (ds.field("timestamp") < last)
    clicked = events.to_table(["note_id", "user_id"], filter=when & ds.field("action").isin(list(actions)))
    counted = (
        clicked.group_by(["note_id", "user_id"]).aggregate([]).group_by("note_id").aggregate([("user_id", "count")])
    )
    places = pc.index_in(notes, value_set=counted["note_id"].combine_chunks())
    return pc.fill_null(counted["user_id_count"].combine_chunks().take(places), 0).to_numpy(zero_copy_only=False)


def _counts(pairs: pa.Table, lost: int) -> dict[str, int]:
    return {"pairs": len(pairs), "left_out": lost, "queries": len(pc.unique(pairs["query_id"])), "tied_cuts": 0}
