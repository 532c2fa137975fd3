"""Bringing the table of a new model up to date with the served table, which it is to replace."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.schema import Note
from notellm2_ray.live.current import Served
from notellm2_ray.live.store import LiveStore
from notellm2_ray.live.table import LiveTable, newest_if_gone
from notellm2_ray.serve.errors import OverloadedError

if TYPE_CHECKING:
    from notellm2_ray.serve.deployments.loaded_model import Vectors

log = logging.getLogger("notellm2_ray.serve")

_NOTES_AT_ONCE = 16  # few, so that the notes of requests do not have to wait long
_BAD_SHARE = 0.05  # if more of the copied notes have no vector, something is wrong with the model
_PATIENCE_SECONDS = 60.0  # while the encoder refuses notes because it is busy
_PAUSE_SECONDS = 0.5

Encode = Callable[[Sequence[Note], Sequence[str], str], Awaitable["Vectors"]]  # notes, vector columns, fingerprint


class Missed(NamedTuple):
    """The changes of a table since a commit group."""

    rows: list[tuple[int, str, bool]]  # seq, note id, whether it was deleted; in order of seq
    gone: list[str]  # other deleted notes, whose tombstones were removed already
    seq: int  # the last commit group

    @property
    def notes(self) -> int:
        return len(self.rows) + len(self.gone)


class Successor:
    """A table that was filled from a version of the served table and is updated with the changes since then.

    Writing or deleting a note twice does no harm, so after a stop the update starts again from the seq in NEXT.

    Attributes:
        store: the table's writer.
        seq: the last commit group of the served table that this table contains.
        copied: notes copied from the served table.
        without_vector: those among them without a vector by the new model, with the reason; they are left out.
    """

    def __init__(self, next_served: Served, encode: Encode) -> None:
        self.next_served, self.store = next_served, LiveStore.open(next_served.table)
        self.seq = next_served.source_seq
        self.copied = 0
        self.without_vector: dict[str, str] = {}
        self._encode = encode

    async def missed(self, table: LiveTable) -> Missed:
        """The changes that this table does not contain yet."""
        return await asyncio.to_thread(missed_after, table, self.seq, self.store.table)

    async def catch_up(self, table: LiveTable) -> int:
        """Write the changes of the served table; the number of changed notes.

        Raises:
            NoteLLMError, ApiError: a model or a table fails. What was written stays; the next call continues there.
        """
        missed = await self.missed(table)
        for start in range(0, len(missed.rows), _NOTES_AT_ONCE):
            part = missed.rows[start : start + _NOTES_AT_ONCE]
            await self._copy(table, [note_id for _, note_id, deleted in part if not deleted])
            await self.store.delete_async([note_id for _, note_id, deleted in part if deleted])
            after = missed.rows[start + len(part)][0] if start + len(part) < len(missed.rows) else missed.seq + 1
            self.seq = max(self.seq, after - 1)
        await self.store.delete_async(missed.gone)
        self.seq = missed.seq
        return missed.notes

    async def _copy(self, table: LiveTable, note_ids: list[str]) -> None:
        if not note_ids:
            return
        stored = await asyncio.to_thread(newest_if_gone, table, lambda one: one.notes(note_ids))
        found = [note for note in stored if note is not None]  # others were deleted meanwhile: the next round sees it
        notes = [Note(one.note_id, one.title, one.topics, one.content, one.image) for one in found]
        if not notes:
            return
        vectors = await self._embed(notes)
        bad = {notes[row].note_id: reason for row, reason in vectors.problems.items()}
        self.copied += len(notes)
        self.without_vector |= bad
        if len(self.without_vector) > 1 + _BAD_SHARE * self.copied:
            note_id, reason = next(iter(self.without_vector.items()))
            raise ModelError(
                f"{len(self.without_vector)} of {self.copied} notes have no vector by the model "
                f"{self.store.model_fingerprint}, for example {note_id}: {reason}"
            )
        for note_id, reason in bad.items():
            log.warning("%s: note %s has no vector and is left out: %s", self.store.path, note_id, reason)
        written = vectors.live_notes(notes, {one.note_id: one.created_at for one in found})
        await self.store.upsert_async(written, vectors.fingerprint)
        await self.store.delete_async(bad)

    async def _embed(self, notes: Sequence[Note]) -> Vectors:
        """Vectors of notes; while the encoder is busy with requests, waits and tries again."""
        until = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return await self._encode(notes, self.store.columns, self.store.model_fingerprint)
            except OverloadedError:
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(_PAUSE_SECONDS)


def missed_after(table: LiveTable, seq: int, successor: LiveTable) -> Missed:
    """The changes of ``table`` after the commit group ``seq``, the last that ``successor`` contains."""

    def read(one: LiveTable) -> tuple[list[tuple[int, str, bool]], set[str] | None]:
        table = one.dataset.to_table(columns=["seq", "note_id", "deleted"], filter=f"seq > {seq}")
        rows = sorted(zip(*(table[name].to_pylist() for name in ("seq", "note_id", "deleted")), strict=True))
        # If tombstones after seq were removed already, deletions show only in the notes that are left.
        return rows, _ids(one) if one.purged_seq > seq else None

    rows, left = newest_if_gone(table, read)
    gone = [] if left is None else sorted(_ids(successor) - left - {note_id for _, note_id, _ in rows})
    return Missed(rows, gone, max(seq, rows[-1][0] if rows else seq))


def _ids(table: LiveTable) -> set[str]:
    return set(table.dataset.to_table(columns=["note_id"], filter="NOT deleted")["note_id"].to_pylist())
