"""The embedding table: a Lance dataset of note ids and unit vectors that says which model made it.

Columns: ``note_id`` (string), ``embedding`` and, where asked for, ``embedding_image`` and ``embedding_text``
(fixed-size lists of float32, all of one length). The schema's metadata carries the model's fingerprint and the length.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from notellm2_ray.core.errors import DataError, OutputError
from notellm2_ray.index.vectors import check_unit, name_some

MODEL_KEY = b"notellm2.model_fingerprint"
DIM_KEY = b"notellm2.embedding_dim"
OLD_VERSIONS_KEPT = timedelta(days=1)  # a process that has an older version open can go on reading it that long


class TableInfo(NamedTuple):
    """What an embedding table says of itself."""

    model_fingerprint: str
    embedding_dim: int
    columns: tuple[str, ...]  # the vector columns
    rows: int


def embedding_schema(dim: int, columns: Iterable[str] = ("embedding",), *, model_fingerprint: str) -> pa.Schema:
    """The table's schema for vectors of ``dim`` float32 in ``columns``."""
    fields = [pa.field("note_id", pa.string(), nullable=False)]
    fields += [pa.field(name, pa.list_(pa.float32(), dim), nullable=False) for name in columns]
    return pa.schema(fields, metadata={MODEL_KEY: model_fingerprint.encode(), DIM_KEY: str(dim).encode()})


def embedding_columns(schema: pa.Schema) -> tuple[str, ...]:
    """The vector columns of a table, in its order."""
    return tuple(name for name in schema.names if name.startswith("embedding"))


def write_table(path: str | Path, batches: Iterable[pa.RecordBatch], *, model_fingerprint: str) -> int:
    """Write (or replace as a whole) an embedding table from a stream of batches.

    Memory holds one batch and the set of ids. The new version becomes visible at the end, as a whole or not at all;
    readers of the old one are not disturbed.

    Args:
        path: directory or object-store URI of the table.
        batches: ``note_id`` and one or more ``embedding*`` columns of fixed-size float32 lists.
        model_fingerprint: of the model that made the vectors.

    Returns:
        The number of rows written.

    Raises:
        DataError: no rows, a column of another type, a repeated note, or a vector that is NaN, infinite or not of unit
            length; names the notes.
        OutputError: the path holds something else.
    """
    import lance

    stream = iter(batches)
    first = next(stream, None)
    if first is None:
        raise DataError(f"{path}: there are no embeddings to write (every note was left out or quarantined)")
    schema = _schema_of(first.schema, str(path), model_fingerprint)
    checked = _Checked(chain([first], stream), schema, str(path))
    exists = _holds_table(path)
    try:
        reader = pa.RecordBatchReader.from_batches(schema, checked)
        table = lance.write_dataset(reader, str(path), schema=schema, mode="overwrite" if exists else "create")
    except OSError as error:
        if not exists:
            shutil.rmtree(path, ignore_errors=True)
        # Lance reports an error of the stream as text only; the stream has kept the original.
        if checked.failure is not None:
            raise checked.failure from None
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(path)) from error
        raise
    table.cleanup_old_versions(older_than=OLD_VERSIONS_KEPT)
    return checked.rows


def table_info(path: str | Path) -> TableInfo:
    """Model, vector length, vector columns and rows of an embedding table.

    Raises:
        DataError: there is no table, or it is of another kind.
    """
    return _info(_open(path), path)


def read_vectors(path: str | Path, column: str = "embedding") -> tuple[np.ndarray, np.ndarray]:
    """All vectors of an embedding table, in the order in which they were written.

    Returns:
        ids: (N,) object array of str.
        vectors: (N, D) float32, unit length.

    Raises:
        DataError: there is no table, it is of another kind, or it has no such column.
    """
    info = table_info(path)
    ids = np.empty(info.rows, dtype=object)
    vectors = np.empty((info.rows, info.embedding_dim), dtype=np.float32)
    row = 0
    for names, matrix in iter_vectors(path, column):
        rows = slice(row, row := row + len(matrix))
        ids[rows], vectors[rows] = names.to_pylist(), matrix
    return ids, vectors


def iter_vectors(path: str | Path, column: str = "embedding") -> Iterator[tuple[pa.StringArray, np.ndarray]]:
    """The ids and (B, D) vectors of batches of an embedding table, in the order in which they were written.

    Raises:
        DataError: as :func:`read_vectors`.
    """
    table = _open_with(path, column)
    for batch in table.scanner(columns=["note_id", column], scan_in_order=True).to_batches():
        yield batch.column(0), _matrix(batch.column(1))


def take_vectors(path: str | Path, rows: np.ndarray, column: str = "embedding") -> np.ndarray:
    """The vectors of some rows of an embedding table: (M,) row numbers to (M, D) float32, in the order asked for.

    Raises:
        DataError: as :func:`read_vectors`.
    """
    order = np.argsort(rows)
    taken = _open_with(path, column).take(rows[order].tolist(), columns=[column]).column(0).combine_chunks()
    vectors = np.empty((len(rows), taken.type.list_size), np.float32)
    vectors[order] = _matrix(taken)
    return vectors


def _open_with(path: str | Path, column: str) -> Any:
    table = _open(path)
    columns = _info(table, path).columns
    if column not in columns:
        raise DataError(
            f"{path} has no column {column!r}, only {', '.join(columns)}: run embed-notes with those inputs first"
        )
    return table


class _Checked(Iterator[pa.RecordBatch]):
    """The batches, checked and given ``schema``; keeps the error that ended the stream."""

    def __init__(self, batches: Iterator[pa.RecordBatch], schema: pa.Schema, where: str):
        self.batches, self.schema, self.where = batches, schema, where
        self.seen: set[str] = set()
        self.failure: Exception | None = None

    @property
    def rows(self) -> int:
        return len(self.seen)

    def __next__(self) -> pa.RecordBatch:
        try:
            return self._check(next(self.batches))
        except StopIteration:
            raise
        except Exception as error:
            self.failure = error
            raise

    def _check(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        if [(field.name, field.type) for field in batch.schema] != [(field.name, field.type) for field in self.schema]:
            raise DataError(f"{self.where}: a batch has the columns {batch.schema}, those before it {self.schema}")
        ids = batch.column("note_id").to_pylist()
        repeated = [note_id for note_id in ids if note_id in self.seen]
        fresh = set(ids)
        if repeated or len(fresh) != len(ids):
            repeated += [note_id for note_id in fresh if ids.count(note_id) > 1]
            raise DataError(
                f"{self.where}: note {name_some(repeated)} appears more than once; note_id must be unique in the source"
            )
        for name in self.schema.names[1:]:
            if batch.column(name).null_count:
                missing = [
                    note_id
                    for note_id, ok in zip(ids, batch.column(name).is_valid().to_pylist(), strict=True)
                    if not ok
                ]
                raise DataError(f"{self.where}: note {name_some(missing)} has no vector in {name!r}")
            check_unit(_matrix(batch.column(name)), ids, f"{self.where}, column {name!r}")
        self.seen |= fresh
        return pa.RecordBatch.from_arrays(batch.columns, schema=self.schema)


def _matrix(column: pa.FixedSizeListArray) -> np.ndarray:
    """(N, D) float32 view of a vector column without nulls."""
    # .flatten() respects a slice's offset, .values does not
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)


def _schema_of(schema: pa.Schema, where: str, model_fingerprint: str) -> pa.Schema:
    names = embedding_columns(schema)
    if not names or schema.names != ["note_id", *names]:
        raise DataError(
            f"{where}: columns note_id, embedding, ... are needed, in this order; got {', '.join(schema.names)}"
        )
    types = [schema.field(name).type for name in names]
    dims = {kind.list_size for kind in types if pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32()}
    if len(dims) != 1 or not all(pa.types.is_fixed_size_list(kind) for kind in types):
        raise DataError(f"{where}: {', '.join(names)} must be fixed-size lists of float32 of one length; got {types}")
    return embedding_schema(dims.pop(), names, model_fingerprint=model_fingerprint)


def _info(table: Any, path: str | Path) -> TableInfo:
    metadata = table.schema.metadata or {}
    if MODEL_KEY not in metadata or DIM_KEY not in metadata:
        raise DataError(
            f"{path} is a Lance table of another kind (columns {', '.join(table.schema.names)}): "
            "it was not written by embed-notes"
        )
    columns = embedding_columns(table.schema)
    return TableInfo(metadata[MODEL_KEY].decode(), int(metadata[DIM_KEY]), columns, table.count_rows())


def _open(path: str | Path) -> Any:
    import lance

    try:
        return lance.dataset(str(path))
    except (ValueError, OSError) as error:
        raise DataError(
            f"{path} holds no embedding table: run embed-notes first ({str(error).splitlines()[0]})"
        ) from error


def _holds_table(path: str | Path) -> bool:
    """Whether there is a table to replace.

    Raises:
        OutputError: something else lies there.
    """
    import lance

    try:
        lance.dataset(str(path))
    except (ValueError, OSError):
        local = Path(path)
        if local.is_file() or (local.is_dir() and any(entry.name not in _LANCE_ENTRIES for entry in local.iterdir())):
            raise OutputError(f"{path} is not an embedding table: choose another name or remove it yourself") from None
        return False
    return True


_LANCE_ENTRIES = {"data", "_versions", "_transactions", "_indices", "_deletions"}  # left by a killed first write
