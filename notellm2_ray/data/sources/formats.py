"""Parquet, JSON lines and CSV files as batches of rows, each with the file and row it comes from.

Every batch has the wanted columns in the types of the file, ``_source`` ("file:row"; the header of a CSV file is row 1)
and ``_error``: null, or why the row could not be read. A bad line costs one row, not the whole file.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from pyarrow import fs

from notellm2_ray.core.errors import DataError
from notellm2_ray.data.columns import Column, json_text, to_text
from notellm2_ray.data.rows import FATAL, UNREADABLE_ROW, WRONG_VALUE
from notellm2_ray.data.sources.files import TableFile, ending

_CSV_BLOCK = 16 << 20  # a row must fit into one block
_CSV_MAX_LINES = 1000  # a malformed row of more lines is taken for an unclosed quote that swallows good rows
_PEEK_LINES = 100
Converters = Mapping[str, Callable[[Sequence[object]], Column]]


def column_names(file: TableFile) -> list[str]:
    """The columns of a file; for JSON lines, the keys in its first hundred lines.

    Raises:
        DataError: the file cannot be read in its format.
    """
    try:
        if file.format == "parquet":
            with _parquet(file) as parquet:
                return list(parquet.schema_arrow.names)
        with _stream(file) as stream:
            if file.format == "csv":
                return _header(file, stream)
            return _keys(file, itertools.islice(stream, _PEEK_LINES))
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{file.path}: cannot be read as {file.format}: {error}") from error


def _header(file: TableFile, stream: io.BufferedReader) -> list[str]:
    options = pa_csv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK)
    return list(pa_csv.open_csv(stream, options, _csv_dialect(file, lambda row: "skip")).schema.names)


def _keys(file: TableFile, lines: Iterable[bytes]) -> list[str]:
    names: dict[str, None] = {}
    for number, line in enumerate(lines):
        if number == 0 and line.lstrip().startswith(b"["):
            raise DataError(f"{file.path}: holds a JSON array; JSON lines have one object on each line")
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue  # reported when its row is read
        names |= dict.fromkeys(value if isinstance(value, dict) else ())
    return list(names)


def read_batches(
    file: TableFile, columns: Sequence[str], batch_rows: int, converters: Converters | None = None
) -> Iterator[pa.Table]:
    """The rows of one file.

    Args:
        file: what to read.
        columns: the file's own names of the columns to read; missing ones are left out.
        batch_rows: most rows in a batch.
        converters: column name -> function that makes a column from JSON values of several types; default: text.

    Raises:
        DataError: the rest of the file cannot be read, and how many rows it has is not known.
    """
    try:
        if file.format == "parquet":
            yield from _read_parquet(file, columns, batch_rows)
        elif file.format == "csv":
            yield from _read_csv(file, columns, batch_rows)
        else:
            yield from _read_jsonl(file, columns, batch_rows, converters or {})
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file.path}: the rest cannot be read as {file.format}: {error}") from error


def _open(file: TableFile, compression: str | None) -> Any:
    system, path = fs.FileSystem.from_uri(file.path) if "://" in file.path else (fs.LocalFileSystem(), file.path)
    if file.format == "parquet":
        return system.open_input_file(path)
    return system.open_input_stream(path, compression=compression)


def _parquet(file: TableFile) -> pq.ParquetFile:
    return pq.ParquetFile(_open(file, None))


def _stream(file: TableFile) -> io.BufferedReader:
    return io.BufferedReader(_open(file, "detect"), 1 << 20)


def _with_source(columns: Mapping[str, Any], path: str, rows: pa.Array, errors: pa.Array | None = None) -> pa.Table:
    source = pc.binary_join_element_wise(pa.scalar(path), rows.cast(pa.string()), ":")
    errors = pa.nulls(len(rows), pa.string()) if errors is None else errors
    return pa.table({**columns, "_source": source, "_error": errors})


def _failed(path: str, problems: Mapping[int, str]) -> pa.Table:
    return _with_source({}, path, pa.array(problems, pa.int64()), pa.array(problems.values(), pa.string()))


def _read_parquet(file: TableFile, columns: Sequence[str], batch_rows: int) -> Iterator[pa.Table]:
    start = 1
    with _parquet(file) as parquet:
        present = [name for name in parquet.schema_arrow.names if name in columns]
        for batch in parquet.iter_batches(batch_rows, columns=present, use_threads=False):
            rows = pa.array(np.arange(start, start + batch.num_rows))
            yield _with_source({name: batch.column(name) for name in present}, file.path, rows)
            start += batch.num_rows


def _csv_dialect(file: TableFile, on_bad_row: Callable[[Any], str]) -> pa_csv.ParseOptions:
    delimiter = "\t" if ending(file.path) == ".tsv" else ","
    return pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=on_bad_row)


def _read_csv(file: TableFile, columns: Sequence[str], batch_rows: int) -> Iterator[pa.Table]:
    bad: dict[int, str] = {}

    def on_bad_row(row: Any) -> str:
        lines = row.text.count("\n") + 1
        bad[row.number] = f"{UNREADABLE_ROW}: {row.actual_columns} values for {row.expected_columns} columns"
        if lines > _CSV_MAX_LINES:
            bad[row.number] = f"{FATAL}: {file.path}:{row.number} spans {lines:,} lines: its quote is not closed"
        return "skip"

    present = [name for name in column_names(file) if name in columns]
    convert = pa_csv.ConvertOptions(
        include_columns=present, column_types={name: pa.binary() for name in present}, strings_can_be_null=False
    )
    last: pa.RecordBatch | None = None
    next_row = 2
    with _stream(file) as stream:
        options = pa_csv.ReadOptions(use_threads=False, block_size=_CSV_BLOCK)
        for batch in pa_csv.open_csv(stream, options, _csv_dialect(file, on_bad_row), convert):
            if not batch.num_rows:
                continue
            numbers = np.arange(next_row, next_row + batch.num_rows + len(bad))
            numbers = numbers[~np.isin(numbers, list(bad))][: batch.num_rows]
            for start in range(0, batch.num_rows, batch_rows):
                rows = pa.array(numbers[start : start + batch_rows])
                yield _decoded(batch.slice(start, batch_rows), file.path, rows)
            last, next_row = batch, int(numbers[-1]) + 1
    if bad:
        yield _failed(file.path, bad)
    if last is not None and _ends_in_quote(file, last):
        raise DataError(f"{file.path}: the last row, {next_row - 1}, ends inside a quoted value: a quote is not closed")


def _decoded(batch: pa.RecordBatch, path: str, rows: pa.Array) -> pa.Table:
    columns = {name: to_text(batch.column(name)) for name in batch.schema.names}
    errors: dict[int, str] = {}
    for name, column in columns.items():
        for row, problem in column.problems.items():
            errors.setdefault(row, f"{WRONG_VALUE}: {name} {problem}")
    reasons = pa.array([errors.get(row) for row in range(len(rows))], pa.string()) if errors else None
    return _with_source({name: column.values for name, column in columns.items()}, path, rows, reasons)


def _ends_in_quote(file: TableFile, last: pa.RecordBatch) -> bool:
    # An unclosed quote swallows all lines to the end of the file without an error: the last value then holds them.
    values = [column[-1].as_py() for column in last.columns]
    if not any(b"\n" in value or b"\r" in value for value in values):
        return False
    with _stream(file) as stream:
        return sum(block.count(b'"') for block in iter(lambda: stream.read(1 << 20), b"")) % 2 == 1


def _read_jsonl(file: TableFile, columns: Sequence[str], batch_rows: int, converters: Converters) -> Iterator[pa.Table]:
    with _stream(file) as stream:
        lines = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
        for batch in _batched(lines, batch_rows):
            yield _json_table(file, batch, columns, converters)


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _json_table(
    file: TableFile, lines: Sequence[tuple[int, bytes]], columns: Sequence[str], converters: Converters
) -> pa.Table:
    objects: list[dict[str, object]] = []
    errors: dict[int, str] = {}
    for row, (_, line) in enumerate(lines):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            value, errors[row] = {}, f"{UNREADABLE_ROW}: not JSON: {error}"
        if not isinstance(value, dict):
            value, errors[row] = {}, f"{UNREADABLE_ROW}: a JSON {type(value).__name__}, not an object"
        objects.append(value)
    arrays = {}
    for name in columns:
        arrays[name], problems = _json_column([value.get(name) for value in objects], converters.get(name, json_text))
        for row, problem in problems.items():
            errors.setdefault(row, f"{WRONG_VALUE}: {name} {problem}")
    rows = pa.array([number for number, _ in lines], pa.int64())
    return _with_source(arrays, file.path, rows, pa.array([errors.get(row) for row in range(len(lines))], pa.string()))


def _json_column(values: list[object], convert: Callable[[Sequence[object]], Column]) -> Column:
    try:
        return Column(pa.array(values), {})
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
        return convert(values)
