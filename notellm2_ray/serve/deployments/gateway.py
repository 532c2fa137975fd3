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
from typing import Any, NamedTuple

import numpy as np

from notellm2_ray.core.errors import DataError, ModelError
from notellm2_ray.core.schema import Note
from notellm2_ray.live.index import LiveIndex
from notellm2_ray.live.rows import StoredCard, StoredNote
from notellm2_ray.live.search import Filter, Hits
from notellm2_ray.live.table import LiveTable, newest_if_gone
from notellm2_ray.serve.calls import Dependency
from notellm2_ray.serve.errors import ApiError, NotFoundError, OverloadedError, UnavailableError
from notellm2_ray.serve.figures import Figures
from notellm2_ray.serve.http.checks import Images
from notellm2_ray.serve.http.fetch import ImageFetcher
from notellm2_ray.serve.keys import KeyRing
from notellm2_ray.serve.spec import ServiceSpec

log = logging.getLogger("notellm2_ray.serve")

_EXCHANGE_SECONDS = 2.0
_ASK_SECONDS = 5.0  # for another deployment's answer about itself
_PEERS_SECONDS = 12.0  # more than two rounds of questions to the other deployments may take
_READY_SECONDS = 0.25  # how long the answer that this replica is ready stays valid
_INLINE_SECONDS = 0.003  # if searches take longer, they run in a thread, so that other requests are answered meanwhile


class Status(NamedTuple):
    """What is not available, each with its reason: ``NAME: why``."""

    problems: list[str]  # of parts that requests need
    missing: list[str]  # of parts that they can do without


class Gateway:
    """One replica without its HTTP routes, which :class:`~notellm2_ray.serve.deployments.ingress.Ingress` adds.

    Attributes:
        follower: follows the live table and keeps the index.
        encoder, writer, users, ranker: the other deployments; ``ranker`` is None if there is none.
        optional: those among all others without which requests are still answered.
        reports: the last report of every replica, by name.
        writing_model: fingerprint of the writer's model, as last reported; "": the same as the index's.
        problems: why this replica is not ready.
        peers: handle of all gateways, this one included.
        missing: what is not available but not needed either.
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
        self.reports: dict[str, dict[str, Any]] = {}
        self.writing_model = ""
        self.problems = ["the other deployments have not been asked yet"]
        self.missing: list[str] = []
        self.peers = serve.get_deployment_handle("Gateway", serve.get_replica_context().app_name)
        self._asking = asyncio.Lock()
        self._asked = float("-inf")  # when the other deployments were last asked
        self._last_problems: dict[str, list[str]] = {}  # of each deployment, when it last answered or failed
        self._search_seconds = 0.0
        self._tasks: set[asyncio.Task[Any]] = set()
        self.follower = _follow(spec)

    async def start(self) -> None:
        """Start the background tasks; no request arrives before this ends.

        The first round is waited for: a handle that has not been used yet may still lead to a replica that died.
        """
        await self._ask_needed()
        self.background(self._exchange_forever())

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

    async def problems_now(self) -> list[str]:
        """Why this replica is not ready at the moment.

        If there was no problem at the last exchange, the other deployments are asked again, because one may have died
        since, and the next requests would wait for it in vain. Simultaneous callers share one such round.
        """
        if not self.problems:
            await self._ask_needed(not_before=time.monotonic() - _READY_SECONDS)
        return self.problems

    async def status(self) -> Status:
        """What this replica misses at the moment."""
        problems = await self.problems_now()
        if not self.missing:  # one that was missing is asked by the exchange alone: that may take until it is back
            await self._ask_optional()
        return Status(problems, self.missing)

    async def status_of_all(self) -> Status:
        """What any of the gateways misses, since any of them may get the next request.

        Each has handles of its own, and learns later or earlier than others that a replica was replaced.
        """
        try:
            answers = self.peers.broadcast("status").results_async(timeout_s=_PEERS_SECONDS)
            found = await asyncio.gather(self.status(), answers)
        except Exception as error:  # any kind: a gateway that does not answer would not answer a request either
            log.info("a gateway does not answer: %s", type(error).__name__)
            return Status([*self.problems, "gateway: one of its replicas does not answer"], self.missing)
        statuses = [found[0], *found[1]]
        merged = [list(dict.fromkeys(one for status in statuses for one in status[part])) for part in range(2)]
        return Status(*merged)

    def lacks(self, name: str) -> bool:
        """Whether a part is known to be away, so that a request need not wait for it."""
        return any(one.startswith(f"{name}:") for one in self.missing)

    def check_health(self) -> None:
        """Ray Serve restarts the replica if this raises."""
        if not self.follower.alive:
            raise RuntimeError("the thread that follows the live table has ended")

    async def _exchange_forever(self) -> None:
        while True:
            await asyncio.gather(self._ask_needed(), self._ask_optional())
            await asyncio.sleep(0.5 if self.problems or self.missing else _EXCHANGE_SECONDS)

    async def _ask_needed(self, not_before: float = float("inf")) -> None:
        """Update ``problems``, unless the other deployments were asked after ``not_before``."""
        async with self._asking:
            if self._asked < not_before:
                began = time.monotonic()
                self.problems = await self._find_problems()
                self._asked = began

    async def _ask_optional(self) -> None:
        """Update ``missing``: without the ranker, answers come from recall and say so."""
        asked = await asyncio.gather(*(self._ask(one, "describe") for one in self.optional))
        self.missing = [problem for _, problems in asked for problem in problems]

    async def _find_problems(self) -> list[str]:
        """Exchange reports with the writer and ask the other required deployments; why this replica is not ready."""
        needed = self.index.model_fingerprint
        (reports, problems), (described, away), (_, without_users) = await asyncio.gather(
            self._ask(self.writer, "exchange", self.name, self._report()),
            self._ask(self.encoder, "describe", needed),
            self._ask(self.users, "describe"),
        )
        self.reports = reports or self.reports
        written = self.reports.get("writer", {}).get("state", {})
        self.writing_model = written.get("model_fingerprint", self.writing_model)
        problems += away + without_users
        if self.follower.problem is not None:
            problems.append(f"index: {self.follower.problem}")
        there = [] if described is None else [one["fingerprint"] for one in described["models"]]
        if described is not None and needed not in there:
            problems.append(
                f"encoder: it runs {' and '.join(there)}, but the index was made with {needed}: if the embedder was "
                "trained again, run `notellm2 swap-embedder`"
            )
        return problems

    async def _ask(self, other: Dependency, method: str, *arguments: Any) -> tuple[Any, list[str]]:
        """The answer or None, and the problem if there is one.

        If the deployment's queue is full, nothing has changed since it last answered: a running one is busy, and calls
        to a dead one queue up.
        """
        answer, problems = None, []
        try:
            # Without Dependency.call's bound: a deployment with many calls in hand is running.
            answer = await other.ask(method, *arguments, seconds=_ASK_SECONDS)
        except OverloadedError:
            return None, self._last_problems.get(other.name, [])
        except Exception as error:  # any kind: this replica is not ready and reports the reason
            problems = [f"{other.name}: {error.message if isinstance(error, ApiError) else error}"]
        self._last_problems[other.name] = problems
        return answer, problems

    def _report(self) -> dict[str, Any]:
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
