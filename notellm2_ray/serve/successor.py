"""Bringing the table of a new model up to date with the one that is served, until it can take its place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import pyarrow.compute as pc

from notellm2_ray.core.schema import Note
from notellm2_ray.serve.current import Served
from notellm2_ray.serve.live_table import LiveTable, newest_if_gone
from notellm2_ray.serve.store import LiveStore

if TYPE_CHECKING:
    from notellm2_ray.serve.loaded_model import Vectors

log = logging.getLogger("notellm2_ray.serve")

_NOTES_AT_ONCE = 64

Encode = Callable[[Sequence[Note], Sequence[str], str], Awaitable["Vectors"]]  # notes, vector columns, fingerprint


class Missed(NamedTuple):
    """What a table got after a commit group."""

    written: list[str]
    deleted: list[str]
    seq: int  # the last group


class Successor:
    """A table that was filled from a version of the served one, and follows it by writing what it has missed.

    To write a note or to delete it again changes nothing, so one that was stopped begins anew with what NEXT says.

    Attributes:
        store: its writer.
        seq: the served table's commit group up to which it has everything.
        without_vector: notes that the new model could make nothing of, with the reason.
    """

    def __init__(self, served_next: Served, encode: Encode) -> None:
        self.store = LiveStore.open(served_next.table)
        self.seq = served_next.holds
        self.without_vector: dict[str, str] = {}
        self._encode = encode

    async def catch_up(self, table: LiveTable) -> int:
        """Write what the table has got meanwhile; how many notes that were.

        Raises:
            NoteLLMError: a model or a table fails; what was written stays, and it can be tried again.
        """
        missed = await asyncio.to_thread(missed_after, table, self.seq, self.store.table)
        for start in range(0, len(missed.written), _NOTES_AT_ONCE):
            await self._carry(table, missed.written[start : start + _NOTES_AT_ONCE])
        await self.store.delete_async(missed.deleted)
        self.seq = missed.seq
        return len(missed.written) + len(missed.deleted)

    async def _carry(self, table: LiveTable, note_ids: list[str]) -> None:
        stored = await asyncio.to_thread(newest_if_gone, table, lambda one: one.notes(note_ids))
        found = [note for note in stored if note is not None]  # others are deleted by now: the next round hears of it
        notes = [Note(one.note_id, one.title, one.topics, one.content, one.image) for one in found]
        if not notes:
            return
        vectors = await self._encode(notes, self.store.columns, self.store.model_fingerprint)
        self.without_vector |= {notes[row].note_id: reason for row, reason in vectors.problems.items()}
        for row, reason in vectors.problems.items():
            log.warning("%s: note %s has no vector and is left out: %s", self.store.path, notes[row].note_id, reason)
        await self.store.upsert_async(vectors.live_notes(notes, {one.note_id: one.created_at for one in found}))
        await self.store.delete_async([notes[row].note_id for row in vectors.problems])


def missed_after(table: LiveTable, seq: int, successor: LiveTable) -> Missed:
    """What ``table`` got after the commit group ``seq``, up to which ``successor`` has everything."""
    rows = newest_if_gone(
        table, lambda one: one.dataset.to_table(columns=["note_id", "deleted", "seq"], filter=f"seq > {seq}")
    )
    last = max(seq, pc.max(rows["seq"]).as_py() or seq)
    gone = rows["deleted"]
    written = rows.filter(pc.invert(gone))["note_id"].to_pylist()
    deleted = rows.filter(gone)["note_id"].to_pylist()
    if table.purged_seq > seq:  # tombstones that it has not heard of are removed already
        deleted += sorted(set(_ids(successor)) - set(_ids(table)) - set(deleted))
    return Missed(written, deleted, last)


def _ids(table: LiveTable) -> list[str]:
    rows = newest_if_gone(table, lambda one: one.dataset.to_table(columns=["note_id"], filter="NOT deleted"))
    return rows["note_id"].to_pylist()
