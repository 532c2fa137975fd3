"""The live notes on disk and their one writer.

Used as::

    store = LiveStore.open("runs/world/serving/live.lance")
    seq = await store.submit_upsert(notes)     # or store.upsert(notes), from a thread
"""

from __future__ import annotations

import asyncio
import errno
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pyarrow as pa

from notellm2_ray.core.errors import DataError, ModelError, OutputError
from notellm2_ray.index.vectors import name_some
from notellm2_ray.live import durability as files
from notellm2_ray.live.group_commit import GroupCommitter
from notellm2_ray.live.rows import LiveNote, StoredNote, check_note, now, to_table
from notellm2_ray.live.table import LiveTable, newest_if_gone
from notellm2_ray.live.upkeep import FRAGMENT_ROWS, Upkeep

log = logging.getLogger(__name__)

Changes = dict[str, LiveNote | None]  # None: deleted


class LiveStore:
    """The one writer of a live table.

    Calls from any threads or coroutines are gathered for a few milliseconds and committed as one Lance merge; a call
    returns when its rows are on the disk (:mod:`~notellm2_ray.live.durability`), with the number of that commit group.
    Of several writes of a note the last to arrive wins, within a group and between them. A deleted note leaves a
    tombstone row, so that followers see it; old tombstones, small files and old versions are cleared away between
    groups.

    Attributes:
        path: where the table lies.
        model_fingerprint: of the model whose vectors it holds.
        dim: length of a vector.
        columns: the vector columns.
    """

    def __init__(self, path: Path, upkeep: Upkeep, gather_seconds: float, max_group_rows: int):
        self.path, self._upkeep = path, upkeep
        self._counts = {"commits": 0, "rows": 0}
        self._seq = -1
        self._lock = files.WriterLock(path)
        try:
            torn = files.set_aside_torn_versions(path)
            if torn:
                log.warning("%s: %d damaged version(s) that were never acknowledged were set aside", path, torn)
            self._table = LiveTable(path)
            upkeep.index(self._table)
            self._load()
        except BaseException:
            self._lock.release()
            raise
        self.model_fingerprint, self.dim = self._table.model_fingerprint, self._table.dim
        self.columns = self._table.columns
        self._committer: GroupCommitter[Changes] = GroupCommitter(
            f"writer of {path.name}",
            self._commit,
            size=len,
            gather_seconds=gather_seconds,
            max_size=max_group_rows,
            upkeep=self._tidy,
        )

    @staticmethod
    def create(
        path: str | Path,
        batches: Iterable[pa.RecordBatch],
        schema: pa.Schema,
        *,
        fragment_rows: int = FRAGMENT_ROWS,
        seq: int = 0,
    ) -> int:
        """Make a table from rows as they stream in; it is there at the end, whole, or not at all.

        Args:
            path: where; on a local or shared file system. Nothing may be there but what a killed creation left.
            batches: the note's and the vector columns of ``schema``, without seq, deleted and committed_at.
            schema: as :func:`~notellm2_ray.live.rows.live_schema` makes it; names the model.
            fragment_rows: rows of a file: what upkeep has to write again at most, so fewer where images are large.
            seq: number of the commit group that the rows count as.

        Returns:
            The number of notes.

        Raises:
            DataError: a note comes twice.
            OutputError: something is there already.
        """
        import lance

        path = Path(path)
        if files.manifests(path):
            raise OutputError(f"{path} is there already: open it, or remove it to seed it again")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = files.WriterLock(path)
        try:
            shutil.rmtree(path, ignore_errors=True)
            stream = _FirstRows(batches, schema, str(path), seq)
            try:
                reader = pa.RecordBatchReader.from_batches(schema, stream)
                lance.write_dataset(reader, str(path), schema=schema, max_rows_per_file=fragment_rows)
            except Exception as error:
                shutil.rmtree(path, ignore_errors=True)
                raise stream.failure or _disk_error(error, path) from None
            files.sync_new(path, set())
            files.sync([path.parent])
        finally:
            lock.release()
        return stream.rows

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        upkeep: Upkeep | None = None,
        gather_seconds: float = 0.003,
        max_group_rows: int = 4096,
    ) -> LiveStore:
        """Open a table for writing.

        Args:
            path: the table.
            upkeep: when to compact, purge and clean up; None: as :class:`Upkeep` does.
            gather_seconds: how long the first call of a group waits for others.
            max_group_rows: a group is closed at so many rows.

        Raises:
            DataError: there is none, or no version of it is sound.
            OutputError: another process writes it, or it cannot be read for the moment.
        """
        path = Path(path)
        if not (path / files.VERSIONS).is_dir():
            raise DataError(f"{path} holds no live notes: seed it first")
        return cls(path, upkeep or Upkeep(), gather_seconds, max_group_rows)

    def submit_upsert(self, notes: Iterable[LiveNote], model_fingerprint: str | None = None) -> Future[int]:
        """Hand notes to the writer; the future gives the seq of their commit once it is durable.

        Raises:
            DataError: a note that does not fit, named; nothing of the call is written then.
            ModelError: vectors of another model.
            OutputError: the store is closed.
        """
        if model_fingerprint is not None and model_fingerprint != self.model_fingerprint:
            raise ModelError(
                f"vectors of the model {model_fingerprint} for {self.path}, which holds those of "
                f"{self.model_fingerprint}: vectors of two models cannot be mixed; `notellm2 swap-embedder` makes a "
                "new table for a new model"
            )
        extra = self.columns[1:]
        return self._submit({note.note_id: check_note(note, self.dim, extra) for note in notes})

    def submit_delete(self, note_ids: Iterable[str]) -> Future[int]:
        """As :meth:`submit_upsert`, for notes to be removed; unknown ids are fine."""
        return self._submit(dict.fromkeys(note_ids))

    def upsert(self, notes: Iterable[LiveNote], model_fingerprint: str | None = None) -> int:
        """Write notes and wait until they are durable; the seq of their commit."""
        return self.submit_upsert(notes, model_fingerprint).result()

    def delete(self, note_ids: Iterable[str]) -> int:
        """Remove notes and wait until that is durable; the seq of the commit."""
        return self.submit_delete(note_ids).result()

    async def upsert_async(self, notes: Iterable[LiveNote], model_fingerprint: str | None = None) -> int:
        """:meth:`upsert` for coroutines. If the caller is cancelled the notes are written all the same."""
        return await asyncio.shield(asyncio.wrap_future(self.submit_upsert(notes, model_fingerprint)))

    async def delete_async(self, note_ids: Iterable[str]) -> int:
        """:meth:`delete` for coroutines."""
        return await asyncio.shield(asyncio.wrap_future(self.submit_delete(note_ids)))

    def notes(self, note_ids: Sequence[str]) -> list[StoredNote | None]:
        """Notes as last committed, in this order; None where there is none."""
        return newest_if_gone(self._table, lambda table: table.notes(note_ids))

    def existing(self, note_ids: Sequence[str]) -> set[str]:
        """Those of the ids that are notes, as last committed."""
        return newest_if_gone(self._table, lambda table: table.existing(note_ids))

    def skip_to(self, seq: int) -> None:
        """Number the next commit group above ``seq``; only while no call is in hand."""
        self._seq = max(self._seq, seq)

    @property
    def table(self) -> LiveTable:
        """The table as last committed."""
        return self._table

    @property
    def alive(self) -> bool:
        """Whether its thread still writes."""
        return self._committer.alive

    @property
    def seq(self) -> int:
        """Number of the last commit group."""
        return self._seq

    def info(self) -> dict[str, Any]:
        """JSON values: seq, version, fragments, commits, rows committed, upkeep and its longest pause."""
        return {
            "seq": self._seq,
            "version": self._table.version,
            "fragments": self._fragments,
            "model_fingerprint": self.model_fingerprint,
            **self._counts,
            **self._upkeep.info(),
        }

    def close(self) -> None:
        """Write what was submitted, then give the table up."""
        self._committer.close()
        self._upkeep.wait()
        self._lock.release()

    def __enter__(self) -> LiveStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _submit(self, changes: Changes) -> Future[int]:
        if not changes:
            done: Future[int] = Future()
            done.set_result(self._seq)
            return done
        return self._committer.submit(changes)

    def _load(self) -> None:
        self._table = LiveTable(self.path)
        self._seq = self._table.last_seq()
        self._fragments = len(self._table.fragment_ids())

    def _commit(self, group: list[Changes]) -> list[int]:
        changes: Changes = {}
        for part in group:
            changes.update(part)
        try:
            self._check_alone()
            self._merge(changes)
        except BaseException as error:  # a panic inside Lance is no Exception
            self._load()  # the failed commit may be there or not; its callers are told that it failed
            raise _disk_error(error, self.path) from error
        self._counts["commits"] += 1
        self._counts["rows"] += len(changes)
        return [self._seq] * len(group)

    def _merge(self, changes: Changes) -> None:
        import lance

        dataset, seq = self._table.dataset, self._seq + 1
        table = to_table(changes, dataset.schema, seq, now())
        merge = dataset.merge_insert("note_id").when_matched_update_all().when_not_matched_insert_all()
        transaction, _ = merge.execute_uncommitted(table)
        files.sync_transaction(self.path, transaction)
        committed = lance.LanceDataset.commit(dataset, transaction)
        files.sync_version(self.path, committed.version)
        self._table, self._seq = LiveTable(self.path, committed), seq
        self._fragments = len(committed.get_fragments())

    def _check_alone(self) -> None:
        if self._table.newest_version != self._table.version:
            raise OutputError(
                f"{self.path} was changed by somebody else: it may have one writer only. Stop the other one; nothing "
                "of this call was written"
            )

    def _tidy(self, idle: bool) -> None:
        if self._upkeep.due(self._fragments, idle=idle):
            self._check_alone()
            try:
                self._upkeep.run(self._table, self._seq)
            finally:
                self._table = LiveTable(self.path)
                self._fragments = len(self._table.fragment_ids())


class _FirstRows(Iterator[pa.RecordBatch]):
    """Rows of a new table with their seq; remembers the error that ended them, which Lance turns into text."""

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
            raise DataError(f"{self._where}: note {name_some(sorted(repeated))} comes more than once")
        self._seen |= fresh
        stamps = {
            "seq": pa.repeat(pa.scalar(self._seq, pa.int64()), len(ids)),
            "deleted": pa.repeat(pa.scalar(False), len(ids)),
            "committed_at": pa.repeat(pa.scalar(now(), pa.timestamp("us", tz="UTC")), len(ids)),
        }
        columns = [stamps[field.name] if field.name in stamps else batch.column(field.name) for field in self._schema]
        cast = [column.cast(field.type) for column, field in zip(columns, self._schema, strict=True)]
        return pa.RecordBatch.from_arrays(cast, schema=self._schema)


def _disk_error(error: BaseException, path: Path) -> Exception:
    text = str(error)
    if "No space left" in text or getattr(error, "errno", None) == errno.ENOSPC:
        return OutputError(f"no space left while writing {path}: nothing of this call is acknowledged; free some")
    if isinstance(error, (DataError, OutputError, ModelError)):
        return error
    return OutputError(f"{path} could not be written: {text.splitlines()[0] if text else type(error).__name__}")
