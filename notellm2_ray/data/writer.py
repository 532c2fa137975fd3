"""Parquet files whose bytes do not depend on the blocks in which rows arrive."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_ROW_GROUP = 65_536


class RollingWriter:
    """Writes rows into ``PREFIX-00000.parquet`` and so on, ``rows_per_file`` rows each and fewer in the last.

    Row groups have a fixed size too. Use it as a context manager. If there were no rows it writes one empty file, so
    that a reader finds the columns.
    """

    def __init__(
        self, directory: Path, prefix: str, schema: pa.Schema, *, rows_per_file: int, row_group: int = _ROW_GROUP
    ) -> None:
        self.directory, self.prefix, self.schema = directory, prefix, schema
        self.rows_per_file, self.row_group = rows_per_file, min(row_group, rows_per_file)
        self._waiting: list[pa.Table] = []
        self._waiting_rows = self._file_rows = self._files = 0
        self._file: pq.ParquetWriter | None = None

    def __enter__(self) -> RollingWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        self._flush(everything=True)
        if self._file is None and not self._files:
            self._open()
        self._close()

    def write(self, table: pa.Table) -> None:
        """Add rows; columns beyond the schema's are left out.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        if table.num_rows:
            self._waiting.append(table.select(self.schema.names).cast(self.schema))
            self._waiting_rows += table.num_rows
            self._flush()

    def _group_rows(self) -> int:
        return min(self.row_group, self.rows_per_file - self._file_rows)

    def _flush(self, everything: bool = False) -> None:
        if not self._waiting_rows or (self._waiting_rows < self._group_rows() and not everything):
            return
        rows = pa.concat_tables(self._waiting)
        while rows.num_rows >= self._group_rows() or (everything and rows.num_rows):
            size = self._group_rows()
            self._write_group(rows.slice(0, size))
            rows = rows.slice(size)
        self._waiting, self._waiting_rows = [rows], rows.num_rows

    def _write_group(self, rows: pa.Table) -> None:
        file = self._file or self._open()
        file.write_table(rows, row_group_size=rows.num_rows)
        self._file_rows += rows.num_rows
        if self._file_rows == self.rows_per_file:
            self._close()

    def _open(self) -> pq.ParquetWriter:
        self.directory.mkdir(parents=True, exist_ok=True)
        # Statistics and dictionaries would store images a second time.
        small = [field.name for field in self.schema if not pa.types.is_binary(field.type)]
        path = self.directory / f"{self.prefix}-{self._files:05d}.parquet"
        self._file = pq.ParquetWriter(path, self.schema, use_dictionary=small, write_statistics=small)
        self._files += 1
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._file_rows = None, 0


def write_parquet(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write tables of one schema, at least one, as one Parquet file with row groups of a fixed size.

    The file appears complete or not at all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    arriving = iter(tables)
    waiting = next(arriving)
    with pq.ParquetWriter(temporary, waiting.schema) as writer:
        for table in arriving:
            waiting = pa.concat_tables([waiting, table])
            whole = waiting.num_rows // _ROW_GROUP * _ROW_GROUP
            if whole:
                writer.write_table(waiting.slice(0, whole), row_group_size=_ROW_GROUP)
                waiting = waiting.slice(whole)
        writer.write_table(waiting, row_group_size=_ROW_GROUP)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
