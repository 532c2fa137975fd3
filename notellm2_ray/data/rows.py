"""Raw rows of any source converted to our columns and types; a value that cannot be converted is the row's ``_error``.

An error is ``category: detail``. Rows are counted by category.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from notellm2_ray.core.times import Unit
from notellm2_ray.data.columns import (
    TIMESTAMP,
    TOPICS,
    Column,
    Times,
    flat,
    to_text,
    to_timestamps,
    to_topics,
)
from notellm2_ray.data.pictures import PICTURE, to_pictures

FATAL = "unreadable file"  # the one category that stops the job: how many rows are lost is not known
UNREADABLE_ROW = "unreadable row"
WRONG_VALUE = "wrong value"
UNPARSABLE_TIMESTAMP = "unparsable timestamp"

UNKNOWN_SOURCE = "unknown source"


def raw_notes(
    table: pa.Table, *, unit: Unit = "auto", zone: str | None = None, separator: str | None = None
) -> pa.Table:
    """Notes with our columns, ``_local``, ``_source`` and ``_error``; converting them again changes nothing.

    Args:
        table: any of our note columns, of any type; missing ones become null. ``image`` becomes a struct
            (:mod:`notellm2_ray.data.pictures`).
        unit: of numeric times.
        zone: of times without one; None: UTC, and ``_local`` says which times they are.
        separator: splits topics that are given as one string; see :func:`notellm2_ray.data.literals.split_topics`.
    """
    columns = {
        "note_id": _convert(table, "note_id", pa.string(), to_text),
        "title": _convert(table, "title", pa.string(), to_text),
        "topics": _convert(table, "topics", TOPICS, lambda array: to_topics(array, separator)),
        "content": _convert(table, "content", pa.string(), to_text),
        "image": _convert(table, "image", PICTURE, to_pictures),
        "created_at": _convert(table, "created_at", TIMESTAMP, lambda array: to_timestamps(array, unit, zone)),
    }
    return _with_errors(table, columns)


def raw_events(table: pa.Table, *, unit: Unit = "auto", zone: str | None = None) -> pa.Table:
    """Events with our columns, ``_local``, ``_source`` and ``_error``; converting them again changes nothing."""
    columns = {
        "user_id": _convert(table, "user_id", pa.string(), to_text),
        "note_id": _convert(table, "note_id", pa.string(), to_text),
        "timestamp": _convert(table, "timestamp", TIMESTAMP, lambda array: to_timestamps(array, unit, zone)),
        "action": _convert(table, "action", pa.string(), to_text),
        "session_id": _convert(table, "session_id", pa.string(), to_text),
    }
    return _with_errors(table, columns)


def failed_row(source: str, error: str) -> pa.Table:
    """A row that could not be read: only its source and its error are known."""
    return pa.table({"_source": pa.array([source]), "_error": pa.array([error])})


def category(reason: str) -> str:
    """The part of a reason that rows are counted by."""
    return reason.partition(":")[0]


def _convert(table: pa.Table, name: str, kind: pa.DataType, convert) -> Column:
    if name not in table.column_names:
        return Column(pa.nulls(table.num_rows, kind), {})
    return convert(table.column(name))


def _with_errors(table: pa.Table, columns: Mapping[str, Column | Times]) -> pa.Table:
    errors = _own(table, "_error")
    found: dict[int, str] = {}
    for name, column in columns.items():
        is_time = column.values.type == TIMESTAMP
        kind = UNPARSABLE_TIMESTAMP if is_time else WRONG_VALUE
        for row, problem in column.problems.items():
            found.setdefault(row, f"{kind}: {name} {problem}")
    if found:
        errors = pa.array([old or found.get(row) for row, old in enumerate(errors.to_pylist())], pa.string())
    source = _own(table, "_source").fill_null(UNKNOWN_SOURCE)
    values = {name: column.values for name, column in columns.items()}
    return pa.table({**values, "_local": _local(table, columns), "_source": source, "_error": errors})


def _local(table: pa.Table, columns: Mapping[str, Column | Times]) -> pa.Array:
    """Whether neither a row's time nor a setting names a time zone."""
    if "_local" in table.column_names:  # converted before: its times are in UTC by now
        return flat(table.column("_local"))
    found = [column.local for column in columns.values() if isinstance(column, Times)]
    return pa.array(found[0] if found else np.zeros(table.num_rows, bool))


def _own(table: pa.Table, name: str) -> pa.Array:
    if name not in table.column_names:
        return pa.nulls(table.num_rows, pa.string())
    return flat(table.column(name)).cast(pa.string())
