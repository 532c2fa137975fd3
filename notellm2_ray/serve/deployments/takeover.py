"""How the writer lets another model's table take the place of the one that is served, and keeps the model it has."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from notellm2_ray.core.errors import OutputError
from notellm2_ray.core.run import files_fingerprint
from notellm2_ray.core.schema import Note
from notellm2_ray.live.current import Served, current, forget_upcoming, keep_model, set_current, tell, upcoming
from notellm2_ray.live.store import LiveStore
from notellm2_ray.serve.calls import call
from notellm2_ray.serve.deployments.successor import Successor
from notellm2_ray.serve.errors import ApiError
from notellm2_ray.serve.plan import Plan

if TYPE_CHECKING:
    from notellm2_ray.serve.deployments.loaded_model import Vectors

log = logging.getLogger("notellm2_ray.serve")

_FEW = 64  # notes that calls may wait for while another table takes over
_MANY = 512  # notes that would be too many to wait for
_MOST_ROUNDS = 50


class TableWriter(Protocol):
    """What a take-over needs of the writer.

    Attributes:
        store: the table that is served; a take-over replaces it.
        opening: held while the table that is served may change.
    """

    plan: Plan
    store: LiveStore
    opening: asyncio.Lock

    def alone(self) -> AbstractAsyncContextManager[LiveStore]:
        """The store, while no call writes to it."""

    def recent_reports(self) -> dict[str, dict[str, Any]]:
        """The last report of every replica, by name."""


class TakeOver:
    """Work beside the calls of a writer, a little at every look.

    Attributes:
        task: the look under way, or the last one.
        waits: why the table that is to be served next is not served yet; None where there is none.
    """

    def __init__(self, writer: TableWriter, encoder: Any) -> None:
        self.writer, self.encoder = writer, encoder
        self.task: asyncio.Task[None] | None = None
        self.waits: str | None = None
        self._successor: Successor | None = None
        self._may_keep = True

    def look(self) -> None:
        """Go on, unless it is under way."""
        if self.task is None or self.task.done():
            self.task = asyncio.get_running_loop().create_task(self._go_on())

    def claim(self, path: Path) -> LiveStore | None:
        """The store of the next table, if it is open and that one: it is the caller's from now on."""
        if self._successor is None or self._successor.store.path != path:
            return None
        store, self._successor = self._successor.store, None
        return store

    async def _go_on(self) -> None:
        """Keep the model that is served; serve the table that NEXT names, if there is one."""
        await self._keep_model()
        try:
            reason = await self._serve_next()
        except Exception as error:  # of any kind: the table that is there goes on, and the next look tries again
            reason = (error.message if isinstance(error, ApiError) else str(error)) or type(error).__name__
        if reason != self.waits:
            self.waits = reason
            if reason is not None:
                log.warning("the next table is not served yet: %s", reason)
            await asyncio.to_thread(tell, self.writer.plan.directory, reason)

    async def _serve_next(self) -> str | None:
        """Bring the next table up to date, then let it take the place of the one that is served.

        Calls wait from the last of its notes until it is served: as long as a few notes take.

        Returns:
            Why it is not served yet; None where it is, and where there is none.
        """
        following = upcoming(self.writer.plan.directory)
        if self._successor is not None and self._successor.following != following:
            await asyncio.to_thread(self._successor.store.close)
            self._successor = None
        if following is None or self.encoder is None:
            return None
        if following.table == self.writer.store.path:  # a writer before this one was stopped just here
            forget_upcoming(self.writer.plan.directory)
            return None
        self._check_source(following)
        if self._successor is None:
            self._successor = await asyncio.to_thread(Successor, following, self._encode)
        successor = self._successor
        if reason := await self._not_ready(successor):
            return reason
        for _ in range(_MOST_ROUNDS):  # each has what came during the one before
            if await successor.catch_up(self.writer.store.table) <= _FEW:
                break
        if reason := self._still_loading(following):
            return reason
        async with self.writer.alone() as before:
            self._check_source(following)
            if upcoming(self.writer.plan.directory) != following:
                return "it was given up"
            if (await successor.missed(before.table)).notes > _MANY:
                return "more notes come than the encoder can also embed with the next model"
            await successor.catch_up(before.table)
            successor.store.skip_to(before.seq)
            await asyncio.to_thread(set_current, self.writer.plan.directory, following.table, following.model)
            self.writer.store, self._successor = successor.store, None
        forget_upcoming(self.writer.plan.directory)
        log.info("%s is served from now on, and %s no more", following.table, before.path)
        await asyncio.to_thread(before.close)
        return None

    def _check_source(self, following: Served) -> None:
        served = self.writer.store.path.name
        if following.source != served:
            raise OutputError(
                f"{following.table.name} was filled from {following.source}, and {served} is served by now: run "
                "`notellm2 swap-embedder` again"
            )

    async def _not_ready(self, successor: Successor) -> str | None:
        """Why the encoder cannot make the next table's vectors; None if it can."""
        wanted, model = successor.store.model_fingerprint, successor.following.model
        there = (await self._ask_encoder("describe", self.writer.store.model_fingerprint))["models"]
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
        states = {name: one.get("state", {}) for name, one in self.writer.recent_reports().items()}
        ahead = {name: state["freshness"]["ahead"] for name, state in states.items() if "freshness" in state}
        loading = [name for name, table in ahead.items() if table != following.table.name]
        return f"{', '.join(sorted(loading))}: still loading {following.table.name}" if loading else None

    async def _keep_model(self) -> None:
        """Copy the model that is served, the first time: the embedder's directory may be trained anew meanwhile."""
        if not self._may_keep:
            return
        try:
            await self._copy_model()
        except ApiError:  # the encoder is away or busy: at the next look
            pass
        except Exception:  # of any kind, as a full disk: the model is served from where it lies, as it was before
            self._may_keep = False  # not a copy of gigabytes at every look
            log.warning("%s could not be copied; it is served from there", self.writer.plan.model, exc_info=True)

    async def _copy_model(self) -> None:
        plan = self.writer.plan
        served = current(plan.directory)
        if served.model is not None or self.encoder is None or served.table != self.writer.store.path:
            return
        there = (await self._ask_encoder("describe", self.writer.store.model_fingerprint))["models"]
        loaded = next((one for one in there if Path(one["path"]) == plan.model), None)
        if loaded is None or loaded["fingerprint"] != self.writer.store.model_fingerprint:
            return
        if files_fingerprint(str(plan.model)) != loaded["files"]:  # trained anew since it was loaded
            return
        kept = await asyncio.to_thread(keep_model, plan.directory, plan.model, loaded["fingerprint"])
        if files_fingerprint(str(kept)) != loaded["files"]:  # while it was copied
            await asyncio.to_thread(shutil.rmtree, kept)
            return
        async with self.writer.opening:
            if current(plan.directory) == served:
                await asyncio.to_thread(set_current, plan.directory, served.table, kept)

    async def _encode(self, notes: Sequence[Note], columns: Sequence[str], fingerprint: str) -> Vectors:
        return await self._ask_encoder("encode", list(notes), tuple(columns), fingerprint)

    async def _ask_encoder(self, method: str, *arguments: Any) -> Any:
        seconds = self.writer.plan.serve.encode.timeout_seconds
        return await call(getattr(self.encoder, method), *arguments, what="encoder", seconds=seconds)
