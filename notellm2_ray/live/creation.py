"""Making a live table, as a whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa

from notellm2_ray.core.errors import DataError, OutputError
from notellm2_ray.index.vectors import name_some
from notellm2_ray.live import durability
from notellm2_ray.live.rows import now
from notellm2_ray.live.upkeep import FRAGMENT_ROWS


def create_table(
    path: str | Path,
    batches: Iterable[pa.RecordBatch],
    schema: pa.Schema,
    *,
    fragment_rows: int = FRAGMENT_ROWS,
    seq: int = 0,
) -> int:
    """Write a live table from a stream of rows; it appears at the end.

    Args:
        path: the table, on a local or shared file system. Nothing may be there except the remains of a killed creation.
        batches: the note columns and vector columns of ``schema``, without seq, deleted and committed_at.
        schema: from :func:`~notellm2_ray.live.rows.live_schema`; names the model.
        fragment_rows: rows of a file. Upkeep rewrites whole files, so choose fewer if images are large.
        seq: number of the commit group that the rows belong to.

    Returns:
        The number of notes.

    Raises:
        DataError: a note appears twice.
        OutputError: there is a table already.
    """
    import lance

    path = Path(path)
    if durability.manifests(path):
        raise OutputError(f"{path} is there already: open it, or remove it to seed it again")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = durability.WriterLock(path)
    try:
        shutil.rmtree(path, ignore_errors=True)
        stream = _NewRows(batches, schema, str(path), seq)
        try:
            reader = pa.RecordBatchReader.from_batches(schema, stream)
            lance.write_dataset(reader, str(path), schema=schema, max_rows_per_file=fragment_rows)
        except Exception as error:
            shutil.rmtree(path, ignore_errors=True)
            raise stream.failure or durability.write_error(error, path) from None
        durability.sync_new(path, set())
        durability.sync([path.parent])
    finally:
        lock.release()
    return stream.rows


class _NewRows(Iterator[pa.RecordBatch]):
    """Rows of a new table with their seq; keeps the error that ended the stream, which Lance reports as text only."""

    def __init__(self, batches: Iterable[pa.RecordBatch], schema: pa.Schema, where: str, seq: int):
        self._batches, self._schema, self._where, self._seq = iter(batches), schema, where, seq
        self._seen: set[str] = set()
        self.failure: Exception | None = None

    @property
    def rows(self) -> int:
        return len(self._seen)

    def __next__(self) -> pa.RecordBatch:
        try:
            return self._stamped(next(self._batches))
        except StopIteration:
            raise
        except Exception as error:
            self.failure = error
            raise

    def _stamped(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        ids = batch.column("note_id").to_pylist()
        fresh = set(ids)
        repeated = self._seen & fresh or {
            note_id for note_id in fresh if len(fresh) != len(ids) and ids.count(note_id) > 1
        }
        if repeated:
            raise DataError(f"{self._where}: note {name_some(sorted(repeated))} appears more than once")
        self._seen |= fresh
        stamps = {
            "seq": pa.repeat(pa.scalar(self._seq, pa.int64()), len(ids)),
            "deleted": pa.repeat(pa.scalar(False), len(ids)),
            "committed_at": pa.repeat(pa.scalar(now(), pa.timestamp("us", tz="UTC")), len(ids)),
        }
        columns = [stamps[field.name] if field.name in stamps else batch.column(field.name) for field in self._schema]
        cast = [column.cast(field.type) for column, field in zip(columns, self._schema, strict=True)]
        return pa.RecordBatch.from_arrays(cast, schema=self._schema)
