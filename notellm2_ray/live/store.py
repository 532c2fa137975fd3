"""The one writer of the live notes on disk.

Used as::

    store = LiveStore.open("runs/world/serving/live.lance")
    seq = await store.submit_upsert(notes)     # or store.upsert(notes), from a thread
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from notellm2_ray.core.errors import DataError, ModelError, OutputError
from notellm2_ray.live import durability
from notellm2_ray.live.group_commit import GroupCommitter
from notellm2_ray.live.rows import LiveNote, StoredNote, check_note, now, to_table
from notellm2_ray.live.table import LiveTable, newest_if_gone
from notellm2_ray.live.upkeep import Upkeep

log = logging.getLogger(__name__)

Changes = dict[str, LiveNote | None]  # None: deleted


class LiveStore:
    """The one writer of a live table.

    Calls from any threads or coroutines are gathered for a few milliseconds and committed as one Lance merge. A call
    returns the number of its commit group (seq) when the rows are on the disk
    (:mod:`~notellm2_ray.live.durability`). If a note is written more than once, the last write to arrive counts. A
    deleted note leaves a tombstone row, so that followers notice the deletion. Old tombstones, small files and old
    versions are removed between groups.

    Attributes:
        path: of the table.
        model_fingerprint: of the model whose vectors it holds.
        dim: length of a vector.
        columns: the vector columns.
    """

    def __init__(self, path: Path, upkeep: Upkeep, gather_seconds: float, max_group_rows: int):
        self.path, self._upkeep = path, upkeep
        self._counts = {"commits": 0, "rows": 0}
        self._seq = -1
        self._lock = durability.WriterLock(path)
        try:
            torn = durability.set_aside_torn_versions(path)
            if torn:
                log.warning("%s: set %d damaged version(s) aside, none of them acknowledged", path, torn)
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
            upkeep: when to compact, purge and clean up; None: the defaults of :class:`Upkeep`.
            gather_seconds: how long the first call of a group waits for others.
            max_group_rows: a group is closed at so many rows.

        Raises:
            DataError: there is no table, or no version of it is sound.
            OutputError: another process writes the table, or it cannot be read at the moment.
        """
        path = Path(path)
        if not (path / durability.VERSIONS).is_dir():
            raise DataError(f"{path} holds no live notes: seed it first")
        return cls(path, upkeep or Upkeep(), gather_seconds, max_group_rows)

    def submit_upsert(self, notes: Iterable[LiveNote], model_fingerprint: str | None = None) -> Future[int]:
        """Queue notes for the writer; the future gives the seq of their commit when it is durable.

        Raises:
            DataError: a note is not valid for this table (the message names it); nothing of the call is written then.
            ModelError: the vectors are of another model.
            OutputError: the store is closed.
        """
        if model_fingerprint is not None and model_fingerprint != self.model_fingerprint:
            raise ModelError(
                f"{self.path} holds vectors of the model {self.model_fingerprint}, and these are of the model "
                f"{model_fingerprint}. They cannot be mixed: `notellm2 swap-embedder` makes a new table for a new model"
            )
        extra = self.columns[1:]
        return self._submit({note.note_id: check_note(note, self.dim, extra) for note in notes})

    def submit_delete(self, note_ids: Iterable[str]) -> Future[int]:
        """As :meth:`submit_upsert`, to remove notes; unknown ids are ignored."""
        return self._submit(dict.fromkeys(note_ids))

    def upsert(self, notes: Iterable[LiveNote], model_fingerprint: str | None = None) -> int:
        """Write notes and wait until they are durable; the seq of their commit."""
        return self.submit_upsert(notes, model_fingerprint).result()

    def delete(self, note_ids: Iterable[str]) -> int:
        """Remove notes and wait until that is durable; the seq of the commit."""
        return self.submit_delete(note_ids).result()

    async def upsert_async(self, notes: Iterable[LiveNote], model_fingerprint: str | None = None) -> int:
        """:meth:`upsert` for coroutines. The notes are written even if the caller is cancelled."""
        return await asyncio.shield(asyncio.wrap_future(self.submit_upsert(notes, model_fingerprint)))

    async def delete_async(self, note_ids: Iterable[str]) -> int:
        """:meth:`delete` for coroutines."""
        return await asyncio.shield(asyncio.wrap_future(self.submit_delete(note_ids)))

    def notes(self, note_ids: Sequence[str]) -> list[StoredNote | None]:
        """Notes as last committed, in this order; None for an unknown note."""
        return newest_if_gone(self._table, lambda table: table.notes(note_ids))

    def existing(self, note_ids: Sequence[str]) -> set[str]:
        """The ids among these that are notes, as last committed."""
        return newest_if_gone(self._table, lambda table: table.existing(note_ids))

    def skip_to(self, seq: int) -> None:
        """Give the next commit group a number above ``seq``; only while no call is in hand."""
        self._seq = max(self._seq, seq)

    @property
    def table(self) -> LiveTable:
        """The table as last committed."""
        return self._table

    @property
    def alive(self) -> bool:
        """Whether its thread still runs."""
        return self._committer.alive

    @property
    def seq(self) -> int:
        """Number of the last commit group."""
        return self._seq

    def info(self) -> dict[str, Any]:
        """JSON values: seq, version, fragments, counts of commits and rows, and the figures of upkeep."""
        return {
            "seq": self._seq,
            "version": self._table.version,
            "fragments": self._fragments,
            "model_fingerprint": self.model_fingerprint,
            **self._counts,
            **self._upkeep.info(),
        }

    def close(self) -> None:
        """Write what was submitted, then release the table."""
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
        except BaseException as error:  # a panic inside Lance is not an Exception
            self._load()  # the failed commit may or may not be in the table; its callers get the error
            raise durability.write_error(error, self.path) from error
        self._counts["commits"] += 1
        self._counts["rows"] += len(changes)
        return [self._seq] * len(group)

    def _merge(self, changes: Changes) -> None:
        import lance

        dataset, seq = self._table.dataset, self._seq + 1
        table = to_table(changes, dataset.schema, seq, now())
        merge = dataset.merge_insert("note_id").when_matched_update_all().when_not_matched_insert_all()
        transaction, _ = merge.execute_uncommitted(table)
        durability.sync_transaction(self.path, transaction)
        committed = lance.LanceDataset.commit(dataset, transaction)
        durability.sync_version(self.path, committed.version)
        self._table, self._seq = LiveTable(self.path, committed), seq
        self._fragments = len(committed.get_fragments())

    def _check_alone(self) -> None:
        if self._table.newest_version != self._table.version:
            raise OutputError(
                f"{self.path} was changed by another writer, and it may have one only: stop the other one. Nothing of "
                "this call was written"
            )

    def _tidy(self, idle: bool) -> None:
        if self._upkeep.due(self._fragments, idle=idle):
            self._check_alone()
            try:
                self._upkeep.run(self._table, self._seq)
            finally:
                self._table = LiveTable(self.path)
                self._fragments = len(self._table.fragment_ids())
