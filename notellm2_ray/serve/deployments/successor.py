"""Bringing the table of a new model up to date with the one that is served, until it can take its place."""

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

_NOTES_AT_ONCE = 16  # a few, so that requests' notes need not wait for long
_BAD_SHARE = 0.05  # of the notes carried, without a vector: above it something is wrong with the model
_PATIENCE_SECONDS = 60.0  # while the encoder has as much to do as it takes
_PAUSE_SECONDS = 0.5

Encode = Callable[[Sequence[Note], Sequence[str], str], Awaitable["Vectors"]]  # notes, vector columns, fingerprint


class Missed(NamedTuple):
    """What a table got after a commit group."""

    rows: list[tuple[int, str, bool]]  # seq, note, whether it is deleted; in order of seq
    gone: list[str]  # further notes that are deleted
    seq: int  # the last group

    @property
    def notes(self) -> int:
        return len(self.rows) + len(self.gone)


class Successor:
    """A table that was filled from a version of the served one, and follows it by writing what it has missed.

    To write a note or to delete it again changes nothing, so one that was stopped begins anew with what NEXT says.

    Attributes:
        store: its writer.
        seq: the served table's commit group up to which it has everything.
        carried: notes written.
        without_vector: of them, those that the new model made nothing of, with the reason; they are left out.
    """

    def __init__(self, following: Served, encode: Encode) -> None:
        self.following, self.store = following, LiveStore.open(following.table)
        self.seq = following.holds
        self.carried = 0
        self.without_vector: dict[str, str] = {}
        self._encode = encode

    async def missed(self, table: LiveTable) -> Missed:
        """What there is to be written."""
        return await asyncio.to_thread(missed_after, table, self.seq, self.store.table)

    async def catch_up(self, table: LiveTable) -> int:
        """Write what the table has got meanwhile; how many notes that were.

        Raises:
            NoteLLMError, ApiError: a model or a table fails; what was written stays, and the next call goes on there.
        """
        missed = await self.missed(table)
        for start in range(0, len(missed.rows), _NOTES_AT_ONCE):
            part = missed.rows[start : start + _NOTES_AT_ONCE]
            await self._carry(table, [note_id for _, note_id, deleted in part if not deleted])
            await self.store.delete_async([note_id for _, note_id, deleted in part if deleted])
            after = missed.rows[start + len(part)][0] if start + len(part) < len(missed.rows) else missed.seq + 1
            self.seq = max(self.seq, after - 1)
        await self.store.delete_async(missed.gone)
        self.seq = missed.seq
        return missed.notes

    async def _carry(self, table: LiveTable, note_ids: list[str]) -> None:
        if not note_ids:
            return
        stored = await asyncio.to_thread(newest_if_gone, table, lambda one: one.notes(note_ids))
        found = [note for note in stored if note is not None]  # others are deleted by now: the next round hears of it
        notes = [Note(one.note_id, one.title, one.topics, one.content, one.image) for one in found]
        if not notes:
            return
        vectors = await self._patiently(notes)
        bad = {notes[row].note_id: reason for row, reason in vectors.problems.items()}
        self.carried += len(notes)
        self.without_vector |= bad
        if len(self.without_vector) > 1 + _BAD_SHARE * self.carried:
            note_id, reason = next(iter(self.without_vector.items()))
            raise ModelError(
                f"{len(self.without_vector)} of {self.carried} notes have no vector of the model "
                f"{self.store.model_fingerprint}, as {note_id}: {reason}"
            )
        for note_id, reason in bad.items():
            log.warning("%s: note %s has no vector and is left out: %s", self.store.path, note_id, reason)
        written = vectors.live_notes(notes, {one.note_id: one.created_at for one in found})
        await self.store.upsert_async(written, vectors.fingerprint)
        await self.store.delete_async(bad)

    async def _patiently(self, notes: Sequence[Note]) -> Vectors:
        """Vectors, once the encoder has room: requests go first."""
        until = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                return await self._encode(notes, self.store.columns, self.store.model_fingerprint)
            except OverloadedError:
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(_PAUSE_SECONDS)


def missed_after(table: LiveTable, seq: int, successor: LiveTable) -> Missed:
    """What ``table`` got after the commit group ``seq``, up to which ``successor`` has everything."""

    def read(one: LiveTable) -> tuple[list[tuple[int, str, bool]], set[str] | None]:
        table = one.dataset.to_table(columns=["seq", "note_id", "deleted"], filter=f"seq > {seq}")
        rows = sorted(zip(*(table[name].to_pylist() for name in ("seq", "note_id", "deleted")), strict=True))
        # Where tombstones that were not heard of are removed already, only what is left tells what is gone.
        return rows, _ids(one) if one.purged_seq > seq else None

    rows, left = newest_if_gone(table, read)
    gone = [] if left is None else sorted(_ids(successor) - left - {note_id for _, note_id, _ in rows})
    return Missed(rows, gone, max(seq, rows[-1][0] if rows else seq))


def _ids(table: LiveTable) -> set[str]:
    return set(table.dataset.to_table(columns=["note_id"], filter="NOT deleted")["note_id"].to_pylist())
