"""How the writer switches the service to another model's table, and keeps a copy of the served model."""

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
from notellm2_ray.live.current import (
    Served,
    current,
    forget_upcoming,
    keep_model,
    set_current,
    set_waiting_reason,
    upcoming,
)
from notellm2_ray.live.store import LiveStore
from notellm2_ray.serve.calls import Dependency
from notellm2_ray.serve.deployments.successor import Successor
from notellm2_ray.serve.errors import ApiError
from notellm2_ray.serve.spec import ServiceSpec

if TYPE_CHECKING:
    from notellm2_ray.serve.deployments.loaded_model import Vectors

log = logging.getLogger("notellm2_ray.serve")

_FEW = 64  # changed notes that may be left before the last round, for which writes have to wait
_MANY = 512  # more changed notes than this would make writes wait too long
_MOST_ROUNDS = 50


class TableWriter(Protocol):
    """The part of the writer that a take-over uses.

    Attributes:
        store: the served table's; a take-over replaces it.
        opening: held while ``store`` may be replaced.
    """

    spec: ServiceSpec
    store: LiveStore
    opening: asyncio.Lock

    def exclusive_store(self) -> AbstractAsyncContextManager[LiveStore]:
        """The store, with all writes waiting."""

    def recent_reports(self) -> dict[str, dict[str, Any]]:
        """The last report of every replica, by name."""


class TakeOver:
    """Switches a writer to the next table, in the background and in steps.

    Attributes:
        task: the running step, or the last one.
        waits: why the next table is not served yet; None if there is no next table.
    """

    def __init__(self, writer: TableWriter, encoder: Any) -> None:
        self.writer = writer
        self.encoder = None if encoder is None else Dependency(encoder, "encoder", 1)
        self.task: asyncio.Task[None] | None = None
        self.waits: str | None = None
        self._successor: Successor | None = None
        self._may_keep = True

    def step(self) -> None:
        """Start the next step, unless one is running."""
        if self.task is None or self.task.done():
            self.task = asyncio.get_running_loop().create_task(self._step())

    def claim(self, path: Path) -> LiveStore | None:
        """The next table's store if it is open and at this path; it then belongs to the caller."""
        if self._successor is None or self._successor.store.path != path:
            return None
        store, self._successor = self._successor.store, None
        return store

    async def _step(self) -> None:
        """Copy the served model if needed; switch to the table that NEXT names if it is ready."""
        await self._keep_model()
        try:
            reason = await self._serve_next()
        except Exception as error:  # any kind: the served table stays, and the next step tries again
            reason = (error.message if isinstance(error, ApiError) else str(error)) or type(error).__name__
        if reason != self.waits:
            self.waits = reason
            if reason is not None:
                log.warning("the next table is not served yet: %s", reason)
            await asyncio.to_thread(set_waiting_reason, self.writer.spec.directory, reason)

    async def _serve_next(self) -> str | None:
        """Bring the next table up to date, then switch to it.

        Writes wait while the last few notes are copied.

        Returns:
            Why the table is not served yet; None if it is now, or if there is none.
        """
        next_served = upcoming(self.writer.spec.directory)
        if self._successor is not None and self._successor.next_served != next_served:
            await asyncio.to_thread(self._successor.store.close)
            self._successor = None
        if next_served is None or self.encoder is None:
            return None
        if next_served.table == self.writer.store.path:  # an earlier writer was stopped after setting CURRENT
            forget_upcoming(self.writer.spec.directory)
            return None
        self._check_source(next_served)
        if self._successor is None:
            self._successor = await asyncio.to_thread(Successor, next_served, self._encode)
        successor = self._successor
        if reason := await self._not_ready(successor):
            return reason
        for _ in range(_MOST_ROUNDS):  # each copies what was written during the one before
            if await successor.catch_up(self.writer.store.table) <= _FEW:
                break
        if reason := self._still_loading(next_served):
            return reason
        async with self.writer.exclusive_store() as before:
            self._check_source(next_served)
            if upcoming(self.writer.spec.directory) != next_served:
                return "the swap was given up"
            if (await successor.missed(before.table)).notes > _MANY:
                return "more notes are written than the encoder can embed a second time, with the next model"
            await successor.catch_up(before.table)
            successor.store.skip_to(before.seq)
            await asyncio.to_thread(set_current, self.writer.spec.directory, next_served.table, next_served.model)
            self.writer.store, self._successor = successor.store, None
        forget_upcoming(self.writer.spec.directory)
        log.info("%s is served from now on instead of %s", next_served.table, before.path)
        await asyncio.to_thread(before.close)
        return None

    def _check_source(self, next_served: Served) -> None:
        served = self.writer.store.path.name
        if next_served.source != served:
            raise OutputError(
                f"{next_served.table.name} was filled from {next_served.source}, but {served} is served now: run "
                "`notellm2 swap-embedder` again"
            )

    async def _not_ready(self, successor: Successor) -> str | None:
        """Why the encoder cannot embed notes for the next table; None if it can."""
        wanted, model = successor.store.model_fingerprint, successor.next_served.model
        there = (await self._ask_encoder("describe", self.writer.store.model_fingerprint))["models"]
        found = {one["fingerprint"] for one in there if Path(one["path"]) == model}
        if wanted in found:
            return None
        if found:
            return (
                f"{successor.next_served.table.name} was made with the model {wanted}, which the service has loaded "
                f"as {', '.join(found)}: its embed.precision or embed.dimensions is another; start it with the "
                "same, or swap with its own"
            )
        return f"the encoder has not loaded the model {wanted} yet; if it fails to, its log says why"

    def _still_loading(self, next_served: Served) -> str | None:
        """Replicas that have not loaded the next table, by their last reports; None if all have."""
        states = {name: one.get("state", {}) for name, one in self.writer.recent_reports().items()}
        ahead = {name: state["freshness"]["ahead"] for name, state in states.items() if "freshness" in state}
        loading = [name for name, table in ahead.items() if table != next_served.table.name]
        return f"{', '.join(sorted(loading))}: still loading {next_served.table.name}" if loading else None

    async def _keep_model(self) -> None:
        """Copy the served model once: its own directory may be overwritten by another training."""
        if not self._may_keep:
            return
        try:
            await self._copy_model()
        except ApiError:  # the encoder is not available or busy: try again in the next step
            pass
        except Exception:  # any kind, for example a full disk: the model is served from its own directory
            self._may_keep = False  # do not try to copy gigabytes in every step
            log.warning("%s could not be copied and is served from there", self.writer.spec.model, exc_info=True)

    async def _copy_model(self) -> None:
        spec = self.writer.spec
        served = current(spec.directory)
        if served.model is not None or self.encoder is None or served.table != self.writer.store.path:
            return
        there = (await self._ask_encoder("describe", self.writer.store.model_fingerprint))["models"]
        loaded = next((one for one in there if Path(one["path"]) == spec.model), None)
        if loaded is None or loaded["fingerprint"] != self.writer.store.model_fingerprint:
            return
        if files_fingerprint(str(spec.model)) != loaded["files"]:  # trained again since it was loaded
            return
        kept = await asyncio.to_thread(keep_model, spec.directory, spec.model, loaded["fingerprint"])
        if files_fingerprint(str(kept)) != loaded["files"]:  # trained again while it was copied
            await asyncio.to_thread(shutil.rmtree, kept)
            return
        async with self.writer.opening:
            if current(spec.directory) == served:
                await asyncio.to_thread(set_current, spec.directory, served.table, kept)

    async def _encode(self, notes: Sequence[Note], columns: Sequence[str], fingerprint: str) -> Vectors:
        return await self._ask_encoder("encode", list(notes), tuple(columns), fingerprint)

    async def _ask_encoder(self, method: str, *arguments: Any) -> Any:
        seconds = self.writer.spec.serve.encode.timeout_seconds
        assert self.encoder is not None  # without one there is no step
        return await self.encoder.ask(method, *arguments, seconds=seconds)
