"""The deployment that alone writes the live table; it also keeps what the other replicas measure of themselves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from notellm2_ray.core.errors import DataError, OutputError
from notellm2_ray.live.current import FIRST_TABLE, current_table
from notellm2_ray.live.durability import manifests
from notellm2_ray.live.rows import LiveNote
from notellm2_ray.live.store import LiveStore
from notellm2_ray.serve.deployments.takeover import TakeOver
from notellm2_ray.serve.figures import Figures
from notellm2_ray.serve.plan import Plan, common_options

log = logging.getLogger("notellm2_ray.serve")

_FORGET_SECONDS = 30.0  # figures of a replica that is gone


class Deleted(NamedTuple):
    """What a deletion came to."""

    seq: int
    deleted: int
    unknown: list[str]


class Upserted(NamedTuple):
    """What an upsert came to."""

    seq: int | None  # of its commit, which is on the disk; None: nothing was written, the vectors are another model's
    model_fingerprint: str  # of the model whose vectors the table holds


class Writer:
    """One replica, around one :class:`~notellm2_ray.live.store.LiveStore`, that of the table which CURRENT names.

    Serve starts the next replica only after the last one's process is gone, and the store's lock, which the system
    releases with the process, keeps a straggler out. At the very first start the table is made from the bulk outputs.
    A table that NEXT names is brought up to date with the notes that came since it was filled, and takes over then.
    """

    def __init__(self, plan: Plan, encoder: Any = None) -> None:
        path = ensure_table(plan)
        self.plan = plan
        self.store: LiveStore = _opened(lambda: self._open(path))
        self.opening = asyncio.Lock()  # held while one table takes another's place
        self.calls = 0  # in hand; none is while another table takes over
        self.figures = Figures("writer")
        self.pending: dict[str, int] = {}  # ids on their way to the disk, counted
        self.reports: dict[str, tuple[float, dict[str, Any]]] = {}
        self.takeover = TakeOver(self, encoder)

    async def upsert(self, notes: Sequence[LiveNote], model_fingerprint: str) -> Upserted:
        """Write notes.

        Raises:
            DataError, OutputError: nothing of the call was written.
        """
        async with self._writing() as store:
            if model_fingerprint != store.model_fingerprint:
                return Upserted(None, store.model_fingerprint)
            with self.figures.timing("commit"), _Pending(self.pending, [note.note_id for note in notes]):
                seq = await store.upsert_async(notes, model_fingerprint)
        self.figures.wrote("upserted", len(notes))
        self.figures.batch("upsert", len(notes))
        return Upserted(seq, model_fingerprint)

    async def delete(self, note_ids: Sequence[str]) -> Deleted:
        """Delete those of the notes that there are."""
        async with self._writing() as store:
            pending = {note_id for note_id in note_ids if note_id in self.pending}
            found = await asyncio.to_thread(store.existing, note_ids)
            known = dict.fromkeys(note_id for note_id in note_ids if note_id in found or note_id in pending)
            with self.figures.timing("commit"):
                seq = await store.delete_async(known)
        self.figures.wrote("deleted", len(known))
        return Deleted(seq, len(known), [note_id for note_id in dict.fromkeys(note_ids) if note_id not in known])

    async def exchange(self, replica: str, report: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Keep a replica's report and return everybody's, so that any replica can answer for all."""
        self.takeover.look()
        now = time.monotonic()
        self.reports[replica] = (now, report)
        self.reports["writer"] = (
            now,
            {"families": self.figures.snapshot(), "state": {**self.store.info(), "waits": self.takeover.waits}},
        )
        return self.recent_reports()

    def recent_reports(self) -> dict[str, dict[str, Any]]:
        """The last report of every replica that is there, by name."""
        late = time.monotonic() - _FORGET_SECONDS
        self.reports = {name: entry for name, entry in self.reports.items() if entry[0] > late}
        return {name: kept for name, (_, kept) in self.reports.items()}

    def check_health(self) -> None:
        """Serve restarts the replica when this raises."""
        if not self.store.alive and not self.opening.locked():
            raise RuntimeError("the thread that writes the live table has ended")

    def __del__(self) -> None:
        store = getattr(self, "store", None)
        if store is not None:
            store.close()

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[LiveStore]:
        """The store of the table that is served, which no other takes the place of before the end.

        Raises:
            OutputError: that table is not there; the one before stays open, but what followers no longer read must not
                be acknowledged as written.
        """
        async with self.opening:
            await self._follow_current()
            store = self.store
            self.calls += 1
        try:
            yield store
        finally:
            self.calls -= 1

    async def _follow_current(self) -> None:
        """Open the table that CURRENT names, where somebody made it another one."""
        before = self.store
        try:
            path = current_table(self.plan.directory)
            if path != before.path:
                await self._none_in_hand()
                claimed = self.takeover.claim(path)
                self.store = claimed if claimed is not None else await asyncio.to_thread(self._open, path)
        except DataError as error:
            raise OutputError(str(error)) from error
        if self.store is not before:
            log.info("writing %s from now on, and %s no more", path, before.path)
            await asyncio.to_thread(before.close)

    async def _none_in_hand(self) -> None:
        """Wait for the calls that began before ``opening`` was taken."""
        while self.calls:
            await asyncio.sleep(0.002)

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[LiveStore]:
        """The store, which nobody writes meanwhile: calls wait."""
        async with self.opening:
            await self._follow_current()
            await self._none_in_hand()
            yield self.store

    def _open(self, path: Path) -> LiveStore:
        serve = self.plan.serve
        return LiveStore.open(path, gather_seconds=serve.commit_wait_ms / 1000, max_group_rows=serve.commit_rows)


def ensure_table(plan: Plan) -> Path:
    """The current live table, made from the bulk outputs where there is none yet.

    Raises:
        DataError: the bulk outputs are missing or empty.
    """
    from notellm2_ray.live.seed import seed_from_bulk

    path = current_table(plan.directory)
    if path.name == FIRST_TABLE and not manifests(path):
        plan.directory.mkdir(parents=True, exist_ok=True)
        seed_from_bulk(plan.notes, plan.embeddings, path)
    return path


def _opened(open_store: Any, seconds: float = 30.0) -> Any:
    """The store, after the process before has let go of its lock."""
    until = time.monotonic() + seconds
    while True:
        try:
            return open_store()
        except OutputError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


class _Pending:
    """Counts ids in while they are written."""

    def __init__(self, counts: dict[str, int], ids: Sequence[str]) -> None:
        self.counts, self.ids = counts, ids

    def __enter__(self) -> None:
        for one in self.ids:
            self.counts[one] = self.counts.get(one, 0) + 1

    def __exit__(self, *error: object) -> None:
        for one in self.ids:
            self.counts[one] -= 1
            if not self.counts[one]:
                del self.counts[one]


def writer_deployment(plan: Plan) -> Any:
    """The deployment, not bound yet."""
    from ray import serve

    return serve.deployment(
        Writer,
        name="Writer",
        num_replicas=1,
        max_ongoing_requests=256,
        max_queued_requests=32,  # each waits in a gateway's slot, until the next replica is there or its time is up
        **common_options(
            plan.serve.writer_cpus, drain_seconds=plan.serve.drain_seconds, resource=plan.serve.state_resource
        ),
    )
