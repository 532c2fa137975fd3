"""The deployment that alone writes the live table; it also keeps what the other replicas measure of themselves."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from notellm2_ray.core.errors import DataError, OutputError
from notellm2_ray.core.run import files_fingerprint
from notellm2_ray.core.schema import Note
from notellm2_ray.serve.calls import call
from notellm2_ray.serve.current import (
    FIRST_TABLE,
    Served,
    current,
    current_table,
    forget_upcoming,
    keep_model,
    set_current,
    tell,
    upcoming,
)
from notellm2_ray.serve.errors import ApiError
from notellm2_ray.serve.figures import Figures
from notellm2_ray.serve.files import manifests
from notellm2_ray.serve.live_rows import LiveNote
from notellm2_ray.serve.plan import Plan, common_options
from notellm2_ray.serve.store import LiveStore
from notellm2_ray.serve.successor import Successor

if TYPE_CHECKING:
    from notellm2_ray.serve.loaded_model import Vectors

log = logging.getLogger("notellm2_ray.serve")

_FORGET_SECONDS = 30.0  # figures of a replica that is gone
_FEW = 64  # notes that calls may wait for while another table takes over
_MANY = 512  # notes that would be too many to wait for
_MOST_ROUNDS = 50


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
    """One replica, around one :class:`~notellm2_ray.serve.store.LiveStore`, that of the table which CURRENT names.

    Serve starts the next replica only after the last one's process is gone, and the store's lock, which the system
    releases with the process, keeps a straggler out. At the very first start the table is made from the bulk outputs.
    A table that NEXT names is brought up to date with the notes that came since it was filled, and takes over then.
    """

    def __init__(self, plan: Plan, encoder: Any = None) -> None:
        path = ensure_table(plan)
        self.plan, self.encoder = plan, encoder
        self.store: LiveStore = _opened(lambda: self._open(path))
        self.opening = asyncio.Lock()  # held while one table takes another's place
        self.calls = 0  # in hand; none is while another table takes over
        self.figures = Figures("writer")
        self.pending: dict[str, int] = {}  # ids on their way to the disk, counted
        self.reports: dict[str, tuple[float, dict[str, Any]]] = {}
        self.taking_over: asyncio.Task[None] | None = None
        self.successor: Successor | None = None
        self.waits: str | None = None  # why the table that is to be served next is not served yet

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
        self._look_ahead()
        now = time.monotonic()
        self.reports[replica] = (now, report)
        self.reports["writer"] = (
            now,
            {"families": self.figures.snapshot(), "state": {**self.store.info(), "waits": self.waits}},
        )
        self.reports = {name: entry for name, entry in self.reports.items() if now - entry[0] < _FORGET_SECONDS}
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
                self.store = await asyncio.to_thread(self._open, path)
        except DataError as error:
            raise OutputError(str(error)) from error
        if self.store is not before:
            log.info("writing %s from now on, and %s no more", path, before.path)
            await asyncio.to_thread(before.close)

    async def _none_in_hand(self) -> None:
        """Wait for the calls that began before ``opening`` was taken."""
        while self.calls:
            await asyncio.sleep(0.002)

    def _look_ahead(self) -> None:
        """Go on with what takes over beside the calls, unless it is under way."""
        if self.taking_over is None or self.taking_over.done():
            self.taking_over = asyncio.get_running_loop().create_task(self._take_over())

    async def _take_over(self) -> None:
        """Keep the model that is served; serve the table that NEXT names, if there is one."""
        try:
            await self._keep_model()
            reason = await self._serve_next()
        except Exception as error:  # of any kind: the table that is there goes on, and the next look tries again
            reason = (error.message if isinstance(error, ApiError) else str(error)) or type(error).__name__
        if reason != self.waits:
            self.waits = reason
            if reason is not None:
                log.warning("the next table is not served yet: %s", reason)
            await asyncio.to_thread(tell, self.plan.directory, reason)

    async def _serve_next(self) -> str | None:
        """Bring the next table up to date, then let it take the place of the one that is served.

        Calls wait from the last of its notes until it is served: as long as a few notes take.

        Returns:
            Why it is not served yet; None where it is, and where there is none.
        """
        following = upcoming(self.plan.directory)
        if self.successor is not None and self.successor.following != following:
            await asyncio.to_thread(self.successor.store.close)
            self.successor = None
        if following is None or self.encoder is None:
            return None
        if following.table == self.store.path:  # a writer before this one was stopped just here
            forget_upcoming(self.plan.directory)
            return None
        self._check_source(following)
        if self.successor is None:
            self.successor = await asyncio.to_thread(Successor, following, self._encode)
        successor = self.successor
        if reason := await self._not_ready(successor):
            return reason
        for _ in range(_MOST_ROUNDS):  # each has what came during the one before
            if await successor.catch_up(self.store.table) <= _FEW:
                break
        if reason := self._still_loading(following):
            return reason
        async with self.opening:
            await self._follow_current()
            await self._none_in_hand()
            before = self.store
            self._check_source(following)
            if upcoming(self.plan.directory) != following:
                return "it was given up"
            if (await successor.missed(before.table)).notes > _MANY:
                return "more notes come than the encoder can also embed with the next model"
            await successor.catch_up(before.table)
            successor.store.skip_to(before.seq)
            await asyncio.to_thread(set_current, self.plan.directory, following.table, following.model)
            self.store, self.successor = successor.store, None
        forget_upcoming(self.plan.directory)
        log.info("%s is served from now on, and %s no more", following.table, before.path)
        await asyncio.to_thread(before.close)
        return None

    def _check_source(self, following: Served) -> None:
        if following.source != self.store.path.name:
            raise OutputError(
                f"{following.table.name} was filled from {following.source}, and {self.store.path.name} is served by "
                "now: run `notellm2 swap-embedder` again"
            )

    async def _not_ready(self, successor: Successor) -> str | None:
        """Why the encoder cannot make the next table's vectors; None if it can."""
        wanted, model = successor.store.model_fingerprint, successor.following.model
        there = (await self._ask_encoder("describe", self.store.model_fingerprint))["models"]
        found = {one["fingerprint"] for one in there if Path(one["path"]) == model}
        if wanted in found:
            return None
        if found:
            return (
                f"the model of {successor.following.table.name} is {wanted}, and {', '.join(found)} as the service "
                "loads it: embed.precision and serve.encode.precision must be the same"
            )
        return f"the encoder has not loaded the model {wanted} yet; if it cannot, its log says why"

    def _still_loading(self, following: Served) -> str | None:
        """Which replicas of the index have not loaded the next table, as they said last; None: they all have."""
        late = time.monotonic() - _FORGET_SECONDS
        states = {name: one.get("state", {}) for name, (at, one) in self.reports.items() if at > late}
        ahead = {name: state["freshness"]["ahead"] for name, state in states.items() if "freshness" in state}
        loading = [name for name, table in ahead.items() if table != following.table.name]
        return f"{', '.join(sorted(loading))}: still loading {following.table.name}" if loading else None

    async def _keep_model(self) -> None:
        """Copy the model that is served, the first time: the embedder's directory may be trained anew meanwhile."""
        served = current(self.plan.directory)
        if served.model is not None or self.encoder is None or served.table != self.store.path:
            return
        there = (await self._ask_encoder("describe", self.store.model_fingerprint))["models"]
        loaded = next((one for one in there if Path(one["path"]) == self.plan.model), None)
        if loaded is None or loaded["fingerprint"] != self.store.model_fingerprint:
            return
        kept = await asyncio.to_thread(keep_model, self.plan.directory, self.plan.model, loaded["fingerprint"])
        if files_fingerprint(str(kept)) != loaded["files"]:  # trained anew since it was loaded
            await asyncio.to_thread(shutil.rmtree, kept)
            return
        async with self.opening:
            if current(self.plan.directory) == served:
                await asyncio.to_thread(set_current, self.plan.directory, served.table, kept)

    async def _encode(self, notes: Sequence[Note], columns: Sequence[str], fingerprint: str) -> Vectors:
        return await self._ask_encoder("encode", list(notes), tuple(columns), fingerprint)

    async def _ask_encoder(self, method: str, *arguments: Any) -> Any:
        seconds = self.plan.serve.encode.timeout_seconds
        return await call(getattr(self.encoder, method), *arguments, what="encoder", seconds=seconds)

    def _open(self, path: Path) -> LiveStore:
        serve = self.plan.serve
        return LiveStore.open(path, gather_seconds=serve.commit_wait_ms / 1000, max_group_rows=serve.commit_rows)


def ensure_table(plan: Plan) -> Path:
    """The current live table, made from the bulk outputs where there is none yet.

    Raises:
        DataError: the bulk outputs are missing or empty.
    """
    from notellm2_ray.serve.seed import seed_from_bulk

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
