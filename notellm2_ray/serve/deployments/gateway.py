"""The gateway: answers HTTP requests, with a copy of the index in the same process.

A search by note id needs only the index. A call to another deployment takes about a millisecond and lowers the peak
rate (measured: 1,744 requests a second with the index in this process, 1,047 with the index in a deployment of its
own). HTTP and the index therefore scale together, which fits: the load of both is the number of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from notellm2_ray.core.errors import DataError, ModelError
from notellm2_ray.core.schema import Note
from notellm2_ray.live.index import LiveIndex
from notellm2_ray.live.rows import StoredCard, StoredNote
from notellm2_ray.live.search import Filter, Hits
from notellm2_ray.live.table import LiveTable, newest_if_gone
from notellm2_ray.serve.calls import Dependency
from notellm2_ray.serve.deployments.readiness import Readiness, Status
from notellm2_ray.serve.errors import ApiError, NotFoundError, UnavailableError
from notellm2_ray.serve.figures import Figures
from notellm2_ray.serve.http.checks import Images
from notellm2_ray.serve.http.fetch import ImageFetcher
from notellm2_ray.serve.keys import KeyRing
from notellm2_ray.serve.spec import ServiceSpec

log = logging.getLogger("notellm2_ray.serve")

_INLINE_SECONDS = 0.003  # if searches take longer, they run in a thread, so that other requests are answered meanwhile


class Gateway:
    """One replica without its HTTP routes, which :class:`~notellm2_ray.serve.deployments.ingress.Ingress` adds.

    Attributes:
        follower: follows the live table and keeps the index.
        encoder, writer, users, ranker: the other deployments; ``ranker`` is None if there is none.
        optional: those among all others without which requests are still answered.
        readiness: what this replica knows of the other deployments.
    """

    def __init__(
        self, spec: ServiceSpec, encoder: Any, writer: Any, users: Any, ranker: Any = None, preferences: Any = None
    ) -> None:
        from ray import serve

        self.spec, self.settings, self.limits = spec, spec.serve, spec.serve.limits
        most = self.settings.gateway.slots_of_one
        self.encoder, self.writer = Dependency(encoder, "encoder", most), Dependency(writer, "writer", most)
        self.users = Dependency(users, "users", most)
        self.ranker = None if ranker is None else Dependency(ranker, "ranker", most)
        writes = None if preferences is None else Dependency(preferences, "preferences", most)
        self.optional = [one for one in (self.ranker, writes) if one is not None]
        self.name = f"gateway-{serve.get_replica_context().replica_id.unique_id}"
        self.figures = Figures(self.name)
        self.guard: Any = None  # set by build_api
        self.images = Images(self.limits)
        self.fetcher = ImageFetcher(self.settings.fetch, self.limits.image_bytes)
        self.keys = KeyRing(spec.keys_file) if self.settings.needs_key else None
        self._search_seconds = 0.0
        self._tasks: set[asyncio.Task[Any]] = set()
        self.follower = _follow(spec)
        peers = serve.get_deployment_handle("Gateway", serve.get_replica_context().app_name)
        needed = self.encoder, self.writer, self.users
        self.readiness = Readiness(self.name, self.follower, *needed, self.optional, self.report, peers)

    async def start(self) -> None:
        """Start the background tasks; no request arrives before this ends.

        The first round is waited for: a handle that has not been used yet may still lead to a replica that died.
        """
        await self.readiness.ask_needed()
        self.background(self.readiness.exchange_forever())

    def background(self, coroutine: Any) -> None:
        """Run a coroutine that no answer waits for; a failure is logged."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)  # the loop itself keeps no strong reference
        task.add_done_callback(self._ended)

    async def search(
        self,
        query: np.ndarray | str,
        k: int,
        exclude: Sequence[str] = (),
        where: Filter | None = None,
        *,
        index: LiveIndex | None = None,
        model: str | None = None,
    ) -> Hits:
        """The nearest notes in ``index`` (None: the current one).

        Args:
            query: (D,) unit vector, or a note id.
            model: fingerprint of the model that made the query vector.

        Raises:
            NotFoundError: the query is an id that is not in the index.
            UnavailableError: the query vector is of another model, because the service is switching models.
        """
        index = index or self.follower.index
        if isinstance(query, str) and query not in index:
            raise NotFoundError(f"note {query!r} is not in the index", "note_id")
        started = time.perf_counter()
        try:
            if where is None and self._search_seconds < _INLINE_SECONDS:
                return index.search(query, k, exclude=exclude, model_fingerprint=model)
            return await asyncio.to_thread(
                index.search, query, k, exclude=exclude, where=where, model_fingerprint=model
            )
        except ModelError as error:
            raise UnavailableError(str(error)) from None
        except DataError:
            if isinstance(query, str) and query not in index:  # deleted meanwhile
                raise NotFoundError(f"note {query!r} is not in the index", "note_id") from None
            raise
        finally:
            seconds = time.perf_counter() - started
            if where is None:
                self._search_seconds += 0.05 * (seconds - self._search_seconds)
            self.figures.took("search", seconds)

    @property
    def index(self) -> LiveIndex:
        """The current index."""
        return self.follower.index

    async def encode(self, notes: Sequence[Note], columns: Sequence[str] = ("embedding",), model: str = "") -> Any:
        """Vectors of notes (:class:`~notellm2_ray.serve.deployments.encoder.Vectors`).

        Args:
            model: fingerprint of the model to embed with; "": the index's.

        Raises:
            ApiError: the encoder is busy, not available, or does not have the model.
        """
        with self.figures.timing("encode"):
            seconds, wanted = self.settings.encode.timeout_seconds, model or self.index.model_fingerprint
            return await self.encoder.call("encode", list(notes), tuple(columns), wanted, seconds=seconds)

    async def notes(self, note_ids: Sequence[str]) -> list[StoredNote | None]:
        """Notes as stored; None for an unknown note."""
        with self.figures.timing("read_notes"):
            return await asyncio.to_thread(self.follower.notes, list(note_ids))

    async def cards(self, note_ids: Sequence[str]) -> dict[str, StoredCard]:
        """Cards by note id; unknown notes are left out."""
        with self.figures.timing("read_cards"):
            return await asyncio.to_thread(self.follower.cards, list(note_ids))

    async def unknown(self, note_ids: Sequence[str]) -> set[str]:
        """The ids among these that are not notes. Notes that were just committed count, even if not indexed yet."""
        missing = list(dict.fromkeys(note_id for note_id in note_ids if note_id not in self.index))
        if not missing:
            return set()
        return set(missing) - await asyncio.to_thread(self._existing, missing)

    async def wait_until_applied(self, seq: int, seconds: float = 1.0) -> None:
        """Wait a moment until a commit is in this replica's index, so that a client finds the note it has written."""
        until = time.monotonic() + seconds
        if self.follower.reading.path != self.follower.state.table.path:
            return  # the commit is in a table that this replica has not loaded yet
        while self.follower.state.seq < seq and time.monotonic() < until:
            await asyncio.sleep(0.005)

    def _existing(self, note_ids: list[str]) -> set[str]:
        """The ids among these that are notes in the table's newest version."""
        newest = LiveTable(self.follower.reading.path)
        return newest_if_gone(newest, lambda table: table.existing(note_ids))

    async def other_figures(self) -> list[Any]:
        """Figures of the deployments that send no reports, from one replica of each."""
        found = []
        for one in (self.encoder, self.users, *self.optional):
            with contextlib.suppress(ApiError):
                found.append(await one.ask("report", seconds=2))
        return found

    async def status(self) -> Status:
        """What this replica misses at the moment; other gateways ask for it."""
        return await self.readiness.status()

    def check_health(self) -> None:
        """Ray Serve restarts the replica if this raises."""
        if not self.follower.alive:
            raise RuntimeError("the thread that follows the live table has ended")

    def report(self) -> dict[str, Any]:
        """This replica's figures and the state of its index."""
        index, freshness = self.index.info(), self.follower.freshness()
        self.figures.state(
            notes=index["notes"],
            fresh=index["fresh"],
            tombstones=index["tombstones"],
            rebuilds=index["rebuilds"],
            seq=freshness["seq"],
            follow_delay_seconds=freshness["delay_seconds"],
        )
        return {"families": self.figures.snapshot(), "state": {"index": index, "freshness": freshness}}

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.warning("a background task failed: %s", type(task.exception()).__name__, exc_info=task.exception())


def _follow(spec: ServiceSpec) -> Any:
    """A started follower. At the first start it waits until the writer has made the table.

    Raises:
        DataError: there is no table in time.
    """
    import faiss

    from notellm2_ray.live.follower import StoreFollower

    # Requests run in parallel already; more threads within one search would only compete.
    faiss.omp_set_num_threads(1)
    serve = spec.serve
    until = time.monotonic() + serve.ready_seconds
    while True:
        follower = StoreFollower(
            spec.directory,
            spec.index,
            poll_seconds=serve.poll_ms / 1000,
            saved_index=spec.saved_index,
            index_arguments={
                "seed": spec.seed,
                "rebuild_share": serve.rebuild_share,
                "rebuild_rows": serve.rebuild_rows,
            },
        )
        try:
            return follower.start()
        except DataError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
