"""The deployment that writes the live table, as the only one; it also collects the reports of all replicas."""

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
from notellm2_ray.serve.spec import ServiceSpec, common_options

log = logging.getLogger("notellm2_ray.serve")

_FORGET_SECONDS = 30.0  # how long the last report of a stopped replica is kept


class Deleted(NamedTuple):
    """The result of a deletion."""

    seq: int
    deleted: int
    unknown: list[str]


class Upserted(NamedTuple):
    """The result of an upsert."""

    seq: int | None  # of its commit, now on the disk; None: nothing was written, as the vectors are of another model
    model_fingerprint: str  # of the model whose vectors the table holds


class Writer:
    """The only replica, with the :class:`~notellm2_ray.live.store.LiveStore` of the table that CURRENT names.

    Ray Serve starts a new replica only when the old one's process has ended. The store's lock, which the system
    releases with the process, excludes any other writer. At the very first start the table is made from the bulk
    outputs. A table that NEXT names is brought up to date and then takes over.
    """

    def __init__(self, spec: ServiceSpec, encoder: Any = None) -> None:
        path = ensure_table(spec)
        self.spec = spec
        self.store: LiveStore = _opened(lambda: self._open(path))
        self.opening = asyncio.Lock()  # held while another table takes over
        self.calls = 0  # calls that are writing; none while another table takes over
        self.figures = Figures("writer")
        self.being_written: dict[str, int] = {}  # number of unfinished writes of each note
        self.reports: dict[str, tuple[float, dict[str, Any]]] = {}
        self.takeover = TakeOver(self, encoder)

    async def upsert(self, notes: Sequence[LiveNote], model_fingerprint: str) -> Upserted:
        """Write notes.

        Raises:
            DataError, OutputError: the notes are not valid or the disk fails; nothing of the call was written.
        """
        async with self._writing() as store:
            if model_fingerprint != store.model_fingerprint:
                return Upserted(None, store.model_fingerprint)
            with self.figures.timing("commit"), _Counted(self.being_written, [note.note_id for note in notes]):
                seq = await store.upsert_async(notes, model_fingerprint)
        self.figures.wrote("upserted", len(notes))
        self.figures.batch("upsert", len(notes))
        return Upserted(seq, model_fingerprint)

    async def delete(self, note_ids: Sequence[str]) -> Deleted:
        """Delete notes; the answer names those that do not exist."""
        async with self._writing() as store:
            unfinished = {note_id for note_id in note_ids if note_id in self.being_written}
            found = await asyncio.to_thread(store.existing, note_ids)
            known = dict.fromkeys(note_id for note_id in note_ids if note_id in found or note_id in unfinished)
            with self.figures.timing("commit"):
                seq = await store.delete_async(known)
        self.figures.wrote("deleted", len(known))
        return Deleted(seq, len(known), [note_id for note_id in dict.fromkeys(note_ids) if note_id not in known])

    async def exchange(self, replica: str, report: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Keep a replica's report and return those of all replicas, so that each of them can show all figures."""
        self.takeover.step()
        now = time.monotonic()
        self.reports[replica] = (now, report)
        self.reports["writer"] = (
            now,
            {"families": self.figures.snapshot(), "state": {**self.store.info(), "waits": self.takeover.waits}},
        )
        return self.recent_reports()

    def recent_reports(self) -> dict[str, dict[str, Any]]:
        """The last report of every running replica, by name."""
        late = time.monotonic() - _FORGET_SECONDS
        self.reports = {name: entry for name, entry in self.reports.items() if entry[0] > late}
        return {name: kept for name, (_, kept) in self.reports.items()}

    def check_health(self) -> None:
        """Ray Serve restarts the replica if this raises."""
        if not self.store.alive and not self.opening.locked():
            raise RuntimeError("the thread that writes the live table has ended")

    def __del__(self) -> None:
        store = getattr(self, "store", None)
        if store is not None:
            store.close()

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[LiveStore]:
        """The store of the served table; no other table takes over before the block ends.

        Raises:
            OutputError: the served table is missing. The old one stays open, but followers do not read it any more, so
                a write to it must not be acknowledged.
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
        """Open the table that CURRENT names, if it names another one now."""
        before = self.store
        try:
            path = current_table(self.spec.directory)
            if path != before.path:
                await self._writes_done()
                claimed = self.takeover.claim(path)
                self.store = claimed if claimed is not None else await asyncio.to_thread(self._open, path)
        except DataError as error:
            raise OutputError(str(error)) from error
        if self.store is not before:
            log.info("writing %s from now on instead of %s", path, before.path)
            await asyncio.to_thread(before.close)

    async def _writes_done(self) -> None:
        """Wait for the writes that began before ``opening`` was taken."""
        while self.calls:
            await asyncio.sleep(0.002)

    @asynccontextmanager
    async def exclusive_store(self) -> AsyncIterator[LiveStore]:
        """The store, while all writes wait."""
        async with self.opening:
            await self._follow_current()
            await self._writes_done()
            yield self.store

    def _open(self, path: Path) -> LiveStore:
        serve = self.spec.serve
        return LiveStore.open(path, gather_seconds=serve.commit_wait_ms / 1000, max_group_rows=serve.commit_rows)


def ensure_table(spec: ServiceSpec) -> Path:
    """The current live table, made from the bulk outputs if there is none yet.

    Raises:
        DataError: the bulk outputs are missing or empty.
    """
    from notellm2_ray.live.seed import seed_from_bulk

    path = current_table(spec.directory)
    if path.name == FIRST_TABLE and not manifests(path):
        spec.directory.mkdir(parents=True, exist_ok=True)
        seed_from_bulk(spec.notes, spec.embeddings, path)
    return path


def _opened(open_store: Any, seconds: float = 30.0) -> Any:
    """The store; waits until the process before has released its lock."""
    until = time.monotonic() + seconds
    while True:
        try:
            return open_store()
        except OutputError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


class _Counted:
    """Counts ids up for the time of a ``with`` block."""

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


def writer_deployment(spec: ServiceSpec) -> Any:
    """The deployment, not bound yet."""
    from ray import serve

    return serve.deployment(
        Writer,
        name="Writer",
        num_replicas=1,
        max_ongoing_requests=256,
        max_queued_requests=32,  # during a restart each takes up one of a gateway's requests until its time is up
        **common_options(
            spec.serve.writer_cpus, drain_seconds=spec.serve.drain_seconds, resource=spec.serve.state_resource
        ),
    )
