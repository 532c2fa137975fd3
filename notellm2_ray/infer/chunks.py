"""Cutting a Parquet table of notes into chunks: the units that are embedded and, after a kill, embedded again.

A chunk is a range of rows of one file. The cut follows the row groups in the files' footers, so that reading a chunk
reads little else. It depends only on the files and ``chunk_rows``: a later run finds the same chunks.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from notellm2_ray.core.errors import DataError
from notellm2_ray.core.run import fingerprint
from notellm2_ray.core.schema import NOTE_SCHEMA, Note, iter_notes, require_columns

# What the encoder reads: a vector does not depend on the creation time.
NOTE_COLUMNS = pa.schema([NOTE_SCHEMA.field(name) for name in Note._fields])
IDS = pa.schema([NOTE_COLUMNS.field("note_id")])


class NoteFile(NamedTuple):
    """One Parquet file of notes, as its footer describes it."""

    path: str
    row_groups: tuple[int, ...]  # rows in each
    version: str  # changes with the file's name, size or time of writing


class Chunk(NamedTuple):
    """A range of rows of a notes file."""

    part_id: str  # names the resumable part that is made of the chunk
    file: str
    start: int  # first row, within the file
    rows: int
    wanted: int  # how many of the rows are to be embedded

    @property
    def rows_of_file(self) -> str:
        """The file and the range, in words."""
        return f"{self.file}, rows {self.start} to {self.start + self.rows}"


class ChunkPlan(NamedTuple):
    """All chunks of a job, in the order of the table."""

    chunks: tuple[Chunk, ...]
    notes: int  # to embed, in all
    unknown_ids: tuple[str, ...]  # requested by only_ids, but in no file


def list_note_files(notes: Path | str) -> list[NoteFile]:
    """The Parquet files of a directory, a glob, a single file or an object-store URI, sorted by name.

    Raises:
        DataError: there are none, or one is damaged, lacks a column or has a column of another type. The message names
            the file and the column.
    """
    text = str(notes)
    filesystem, root = _filesystem(text)
    infos = _file_infos(filesystem, root, text)
    if not infos:
        raise DataError(
            f"{text}: no Parquet file of notes found (give a directory, a file, or a glob ending in .parquet)"
        )
    return [_note_file(filesystem, info, text) for info in sorted(infos, key=lambda info: info.path)]


def plan_chunks(files: Sequence[NoteFile], chunk_rows: int, made_by: str, only: pa.Array | None = None) -> ChunkPlan:
    """Cut ``files`` into chunks of at most ``chunk_rows`` rows.

    Only the footers and the ``note_id`` column are read; memory holds the ids.

    Args:
        files: from :func:`list_note_files`.
        chunk_rows: the most rows in a chunk. Whole row groups are joined up to it; a larger group is divided.
        made_by: fingerprint of everything that shapes a chunk's vectors besides its rows; it is part of the chunk's id.
        only: ids to embed; None for all. A chunk without any of them is left out.

    Raises:
        DataError: there are no notes, an id is null, or an id is repeated (the message names some with their files).
    """
    ids = [note_ids(file) for file in files]
    if not sum(map(len, ids)):
        raise DataError(f"{files[0].path}: there are no notes to embed: all {len(files)} file(s) are empty")
    _check_unique(files, ids)
    unknown = () if only is None else tuple(pc.filter(only, pc.invert(_is_in(only, ids))).to_pylist())
    chunks: list[Chunk] = []
    for file, file_ids in zip(files, ids, strict=True):
        wanted = np.ones(len(file_ids), bool) if only is None else np.asarray(pc.is_in(file_ids, value_set=only))
        for start, rows in _ranges(file.row_groups, chunk_rows):
            if count := int(wanted[start : start + rows].sum()):
                digest = fingerprint(made_by, file.version, start, rows)[:12]
                chunks.append(Chunk(f"{len(chunks):06d}-{digest}", file.path, start, rows, count))
    if not chunks:
        raise DataError(
            f"none of the {len(only or ())} requested ids is in the {len(files)} file(s) of notes ({files[0].path})"
        )
    return ChunkPlan(tuple(chunks), sum(chunk.wanted for chunk in chunks), unknown)


def read_chunk(chunk: Chunk, only: frozenset[str] | None = None) -> list[Note]:
    """The notes of a chunk, in the file's order; with ``only``, just the notes with these ids.

    Raises:
        DataError: the file is gone, damaged, or shorter than when the chunks were planned.
    """
    filesystem, path = _filesystem(chunk.file)
    notes: list[Note] = []
    try:
        with pq.ParquetFile(path, filesystem=filesystem, memory_map=True) as file:
            for batch in _rows(file, chunk.start, chunk.rows):
                columns = [pc.cast(batch.column(field.name), field.type) for field in NOTE_COLUMNS]
                notes += iter_notes(pa.RecordBatch.from_arrays(columns, schema=NOTE_COLUMNS))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{chunk.rows_of_file}: {error}") from error
    if len(notes) != chunk.rows:
        raise DataError(f"{chunk.file} became shorter during the run: run the command again")
    return notes if only is None else [note for note in notes if note.note_id in only]


def read_ids(path: Path | str) -> pa.Array:
    """The distinct ids in the ``note_id`` column of a Parquet file (or directory).

    Raises:
        DataError: the file or the column is missing, or holds no id.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: the ids to embed cannot be read: {error}") from error
    require_columns(table.schema, IDS, str(path), "give a table of ids with a column note_id")
    ids = pc.unique(table.column("note_id").cast(pa.string())).drop_null()
    if not len(ids):
        raise DataError(f"{path} holds no ids, so there is nothing to embed")
    return ids


def _filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    return pafs.FileSystem.from_uri(path) if "://" in path else (pafs.LocalFileSystem(), path)


def _file_infos(filesystem: pafs.FileSystem, root: str, text: str) -> list[pafs.FileInfo]:
    if "://" not in text and glob.has_magic(text):
        return [info for info in filesystem.get_file_info(glob.glob(text)) if info.type == pafs.FileType.File]
    info = filesystem.get_file_info(root)
    if info.type == pafs.FileType.NotFound:
        raise DataError(f"{text}: there is no such file or directory of notes")
    if info.type == pafs.FileType.File:
        return [info]
    inside = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    return [info for info in inside if info.path.endswith(".parquet") and not info.base_name.startswith((".", "_"))]


def _note_file(filesystem: pafs.FileSystem, info: pafs.FileInfo, text: str) -> NoteFile:
    scheme = text.partition("://")[0] + "://" if "://" in text else ""
    path = scheme + info.path
    try:
        with pq.ParquetFile(info.path, filesystem=filesystem) as file:
            metadata, schema = file.metadata, file.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is not a readable Parquet file ({error}): repair or remove it") from error
    require_columns(schema, NOTE_COLUMNS, path, "give prepared notes, or a table with these columns")
    for field in NOTE_COLUMNS:
        try:
            pa.array([], schema.field(field.name).type).cast(field.type)
        except pa.ArrowException:
            found = schema.field(field.name).type
            raise DataError(f"{path}: column {field.name} is of type {found}; it must be {field.type}") from None
    groups = tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
    return NoteFile(path, groups, fingerprint(info.base_name, info.size, info.mtime_ns))


def _ranges(row_groups: Sequence[int], chunk_rows: int) -> Iterator[tuple[int, int]]:
    """(start, rows) of the chunks of one file."""
    start = rows = 0
    for group in row_groups:
        if rows and rows + group > chunk_rows:
            yield start, rows
            start, rows = start + rows, 0
        rows += group
        while rows > chunk_rows:
            yield start, chunk_rows
            start, rows = start + chunk_rows, rows - chunk_rows
    if rows:
        yield start, rows


def _rows(file: pq.ParquetFile, start: int, rows: int) -> Iterator[pa.RecordBatch]:
    """Rows ``start`` to ``start + rows``; only the row groups that hold them are read."""
    groups: list[int] = []
    first = position = 0
    for index in range(file.metadata.num_row_groups):
        end = position + file.metadata.row_group(index).num_rows
        if end > start and position < start + rows:
            first = position if not groups else first
            groups.append(index)
        position = end
    skip = start - first
    for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=NOTE_COLUMNS.names):
        part = batch.slice(min(skip, batch.num_rows), rows)
        skip, rows = max(0, skip - batch.num_rows), rows - part.num_rows
        yield part
        if not rows:
            return


def note_ids(file: NoteFile) -> pa.ChunkedArray:
    """The ids of a file, in its order.

    Raises:
        DataError: an id is null.
    """
    filesystem, path = _filesystem(file.path)
    ids = pq.read_table(path, filesystem=filesystem, columns=["note_id"]).column(0).cast(pa.string())
    if ids.null_count:
        raise DataError(
            f"{file.path}: {ids.null_count} row(s) have no note_id; give each note one, or prepare the table"
        )
    return ids


def _is_in(values: pa.Array, ids: Sequence[pa.ChunkedArray]) -> Any:
    return pc.is_in(values, value_set=pa.chunked_array([chunk for part in ids for chunk in part.chunks], pa.string()))


def _check_unique(files: Sequence[NoteFile], ids: Sequence[pa.ChunkedArray]) -> None:
    joined = pa.chunked_array([chunk for part in ids for chunk in part.chunks], pa.string())
    if pc.count_distinct(joined).as_py() == len(joined):
        return
    counts = pc.value_counts(joined)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    some = [
        f"{note_id!r} in "
        + ", ".join(Path(file.path).name for file, part in zip(files, ids, strict=True) if _has(part, note_id))
        for note_id in repeated[:5].to_pylist()
    ]
    raise DataError(
        f"{len(repeated)} note_id(s) are repeated: {'; '.join(some)}. Ids must be unique: keep one row of each"
    )


def _has(ids: pa.ChunkedArray, note_id: str) -> bool:
    return pc.index(ids, note_id).as_py() >= 0
