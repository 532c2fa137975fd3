"""Checks on raw rows, block by block on any worker: a row is good, or gets a reason why not.

A checked block has our columns, ``_local`` (its time has no known zone), ``_source``, ``_key`` (the row's id) and
``_reason`` (``category: detail``; null for a good row). Notes also have ``_dropped``: why a note that is kept lost its
image. Good events have no source and key.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.images import check_image
from notellm2_ray.core.schema import EVENT_SCHEMA, NOTE_SCHEMA
from notellm2_ray.core.settings.data import PrepareSettings
from notellm2_ray.data.columns import is_blank, show
from notellm2_ray.data.rows import raw_events, raw_notes

UNUSABLE_IMAGE = "unusable image"
IMAGE_DROPPED = "image dropped, note kept"
NOTHING_TO_ENCODE = "neither text nor image"
UNKNOWN_NOTE = "unknown note"
ALIKE_NOTE = (
    "note_id differs from a known one only in white space, Unicode form or a final .0: write the ids of both tables in "
    "the same way"
)
FUTURE = "in the future: later than tomorrow, see source.time_unit and source.time_zone"
QUARANTINED_NOTE = "note is quarantined"

_IMAGES_AT_ONCE = 128  # notes in a checked block: their images are in memory together


def _checked(schema: pa.Schema, *more: str) -> pa.Schema:
    fields = [field.with_nullable(True) for field in schema]
    notes = [pa.field(name, pa.string()) for name in ("_source", "_key", "_reason", *more)]
    return pa.schema([*fields, pa.field("_local", pa.bool_()), *notes])


CHECKED_NOTES = _checked(NOTE_SCHEMA, "_dropped")
CHECKED_EVENTS = _checked(EVENT_SCHEMA)


def hash_ids(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """``(N,)`` uint64: a 64-bit hash of each id, the same on every machine; null is hashed as ``""``.

    With 100 million ids, the chance that any two have the same hash is 0.03%.
    """
    from pandas.util import hash_array

    values = pc.fill_null(ids, "").to_numpy(zero_copy_only=False)
    return hash_array(np.asarray(values, dtype=object), categorize=False)


def load_image(value: str | bytes, settings: PrepareSettings) -> bytes:
    """The checked, encoded bytes of an image given as a path, a ``file://`` URI or bytes.

    Raises:
        DataError: why the image cannot be used, with its path.
    """
    if isinstance(value, bytes):
        check_image(value, max_pixels=settings.max_image_pixels, max_bytes=settings.max_image_bytes)
        return value
    try:
        data = _read(_local_path(value), settings.max_image_bytes)
        check_image(data, max_pixels=settings.max_image_pixels, max_bytes=settings.max_image_bytes)
    except DataError as error:
        raise DataError(f"{show(value)}: {error}") from error
    return data


def _local_path(value: str) -> str:
    scheme, mark, _ = value.partition(":")
    if mark and scheme.lower() in ("http", "https"):
        raise DataError("an http(s) address is not fetched: download the images first and give their paths or bytes")
    if mark and scheme.lower() == "file":
        parts = urlsplit(value)
        if parts.netloc not in ("", "localhost"):
            raise DataError(f"a file on another machine ({parts.netloc}): give a path that every worker can read")
        return unquote(parts.path)
    if "://" in value or scheme.lower() == "data":
        raise DataError(f"{scheme}: addresses are not read: give paths, file:// URIs or bytes")
    return value


def _read(path: str, max_bytes: int) -> bytes:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise DataError("not a regular file")
        if found.st_size > max_bytes:
            raise DataError(f"{found.st_size:,} bytes, more than the {max_bytes:,} allowed (prepare.max_image_bytes)")
        with open(path, "rb") as file:
            return file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DataError(getattr(error, "strerror", None) or str(error)) from error


def check_notes(table: pa.Table, settings: PrepareSettings) -> Iterator[pa.Table]:
    """Notes as :data:`CHECKED_NOTES`: every image is read and decoded once. Duplicates are not looked for here."""
    rows = raw_notes(table)
    for start in range(0, max(1, rows.num_rows), _IMAGES_AT_ONCE):
        yield _check_notes(rows.slice(start, _IMAGES_AT_ONCE), settings)


def _check_notes(rows: pa.Table, settings: PrepareSettings) -> pa.Table:
    columns = {name: rows[name].to_pylist() for name in rows.column_names}
    no_id = is_blank(rows["note_id"].combine_chunks())
    no_text = is_blank(rows["title"].combine_chunks()) & is_blank(rows["content"].combine_chunks())
    out: dict[str, list] = {name: [] for name in ("image", "_reason", "_dropped")}
    for row, (value, error) in enumerate(zip(columns["image"], columns["_error"], strict=True)):
        image, reason, dropped = None, error or ("missing note_id" if no_id[row] else None), None
        if reason is None:
            has_text = not no_text[row] or bool(columns["topics"][row])
            image, reason, dropped = _judge_image(value, has_text, settings)
        for name, found in zip(out, (image, reason, dropped), strict=True):
            out[name].append(found)
    columns |= out | {
        "title": [value or "" for value in columns["title"]],
        "topics": [value or [] for value in columns["topics"]],
        "content": [value or "" for value in columns["content"]],
        "_key": columns["note_id"],
    }
    return pa.table({name: columns[name] for name in CHECKED_NOTES.names}, schema=CHECKED_NOTES)


def _judge_image(
    picture: dict[str, Any] | None, has_text: bool, settings: PrepareSettings
) -> tuple[bytes | None, str | None, str | None]:
    """The image, the reason to quarantine its note, and the reason why only the image was dropped."""
    if picture is None:
        return None, None if has_text else NOTHING_TO_ENCODE, None
    try:
        return load_image(picture["path"] if picture["bytes"] is None else picture["bytes"], settings), None, None
    except DataError as error:
        if settings.bad_image == "quarantine":
            return None, f"{UNUSABLE_IMAGE}: {error}", None
        if not has_text:
            return None, f"{NOTHING_TO_ENCODE}: there is no text, and the image is unusable: {error}", None
        return None, None, f"{IMAGE_DROPPED}: {error}"


def without_form(ids: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Ids in one Unicode form, without white space, invisible marks and a final ``.0`` (of a float)."""
    plain = pc.utf8_normalize(pc.fill_null(ids, ""), form="NFKC")
    return pc.replace_substring_regex(plain, pattern=r"[\s\p{Z}\p{Cf}]+|\.0$", replacement="")


def check_events(table: pa.Table, known: np.ndarray, rejected: np.ndarray, alike: np.ndarray | None = None) -> pa.Table:
    """Events as :data:`CHECKED_EVENTS`.

    Args:
        table: raw rows.
        known: ``(N,)`` uint64, ascending: :func:`hash_ids` of the notes that were kept.
        rejected: ``(M,)`` uint64, ascending: the same of the notes that were quarantined.
        alike: ``(N,)`` uint64, ascending: the same of the kept notes' ids :func:`without_form`, to name the ids that
            differ from theirs in nothing else.
    """
    rows = raw_events(table).combine_chunks()
    note = hash_ids(rows["note_id"])
    is_known = _is_in(note, known)
    reason = rows["_error"]
    checks = [
        ("missing user_id", is_blank(rows["user_id"].combine_chunks())),
        ("missing note_id", is_blank(rows["note_id"].combine_chunks())),
        ("missing timestamp", rows["timestamp"].is_null().to_numpy()),
        (FUTURE, _later_than_tomorrow(rows["timestamp"])),
        ("missing action", is_blank(rows["action"].combine_chunks())),
        (QUARANTINED_NOTE, ~is_known & _is_in(note, rejected)),
        (ALIKE_NOTE, _is_alike(rows["note_id"], is_known, alike)),
        (UNKNOWN_NOTE, ~is_known),
    ]
    for name, wrong in checks:
        if wrong.any():
            reason = pc.if_else(pc.and_(pc.is_null(reason), pa.array(wrong)), name, reason)
    bad = pc.is_valid(reason)
    nothing = pa.scalar(None, pa.string())
    ids = [pc.fill_null(rows[name], "") for name in ("user_id", "note_id")]
    key = pc.binary_join_element_wise(*ids, " / ") if pc.any(bad).as_py() else pa.nulls(rows.num_rows, pa.string())
    columns = {name: rows[name] for name in (*EVENT_SCHEMA.names, "_local")} | {
        "_source": pc.if_else(bad, rows["_source"], nothing),
        "_key": pc.if_else(bad, key, nothing),
        "_reason": reason,
    }
    return pa.table(columns, schema=CHECKED_EVENTS)


def _is_alike(ids: pa.Array, is_known: np.ndarray, alike: np.ndarray | None) -> np.ndarray:
    found = np.zeros(len(ids), dtype=bool)
    unknown = np.flatnonzero(~is_known)
    if alike is not None and len(unknown):
        found[unknown] = _is_in(hash_ids(without_form(ids.take(unknown))), alike)
    return found


def _later_than_tomorrow(times: pa.ChunkedArray) -> np.ndarray:
    tomorrow = pa.scalar(datetime.now(UTC) + timedelta(days=1), times.type)
    return pc.fill_null(pc.greater(times, tomorrow), False).to_numpy()


def _is_in(hashes: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    if not len(ascending):
        return np.zeros(len(hashes), dtype=bool)
    place = np.minimum(np.searchsorted(ascending, hashes), len(ascending) - 1)
    return ascending[place] == hashes
