"""The ingress: HTTP, and a copy of the index in the very process that answers.

A search by note id needs the index alone. Every hop between deployments costs about a millisecond and most of the
peak rate (measured: 1,744 requests a second with the index in the ingress, 1,047 with a deployment of its own behind
it), so the index lives here and the hot path is one hop. The price is that replicas of HTTP and of the index scale
together: what they scale by is requests, which is what both are for.
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
from notellm2_ray.serve.calls import Dependency, call
from notellm2_ray.serve.errors import ApiError, NotFoundError, OverloadedError, UnavailableError
from notellm2_ray.serve.figures import Figures
from notellm2_ray.serve.http.checks import Images
from notellm2_ray.serve.http.fetch import ImageFetcher
from notellm2_ray.serve.keys import KeyRing
from notellm2_ray.serve.plan import Plan

log = logging.getLogger("notellm2_ray.serve")

_EXCHANGE_SECONDS = 2.0
_READY_SECONDS = 0.25  # age of an answer that this replica is ready: older ones are asked for again
_INLINE_SECONDS = 0.003  # a search that takes longer than this runs in a thread, so that others are answered meanwhile


class Gateway:
    """One replica, without its HTTP routes: :class:`~notellm2_ray.serve.deployments.ingress.Ingress` has those.

    Attributes:
        follower: the index and the table behind it.
        encoder, writer, users, ranker: the other deployments; ``ranker`` is None where there is none.
        reports: every replica's last figures, by name.
        writing_model: fingerprint of the model that the writer's table is of, as last heard; "": as the index.
        problems: what is missing for this replica to be ready.
        missing: what is not there and can be done without.
    """

    def __init__(self, plan: Plan, encoder: Any, writer: Any, users: Any, ranker: Any = None) -> None:
        from ray import serve

        self.plan, self.settings, self.limits = plan, plan.serve, plan.serve.limits
        most = self.settings.gateway.slots_of_one
        self.encoder, self.writer = Dependency(encoder, "encoder", most), Dependency(writer, "writer", most)
        self.users = Dependency(users, "users", most)
        self.ranker = None if ranker is None else Dependency(ranker, "ranker", most)
        self.name = f"gateway-{serve.get_replica_context().replica_id.unique_id}"
        self.figures = Figures(self.name)
        self.guard: Any = None  # set by build_api
        self.images = Images(self.limits)
        self.fetcher = ImageFetcher(self.settings.fetch, self.limits.image_bytes)
        self.keys = KeyRing(plan.keys_file) if self.settings.needs_key else None
        self.reports: dict[str, dict[str, Any]] = {}
        self.writing_model = ""
        self.problems = ["the other deployments were not asked yet"]
        self.missing: list[str] = []
        self._asking = asyncio.Lock()
        self._asked = float("-inf")  # when the other deployments were last asked
        self._search_seconds = 0.0
        self._tasks: set[asyncio.Task[Any]] = set()
        self.follower = _follow(plan)

    async def start(self) -> None:
        """Begin what runs beside the requests."""
        self.background(self._exchange_forever())

    def background(self, coroutine: Any) -> None:
        """Run something that no answer waits for; a failure is logged."""
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
        """The nearest notes of ``index`` (None: the one there is now).

        Args:
            model: fingerprint that came with a query vector.

        Raises:
            NotFoundError: the query is an id that the index does not have.
            UnavailableError: the query vector is another model's: encoder and index are being changed.
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
        """The index as it is now."""
        return self.follower.index

    async def encode(self, notes: Sequence[Note], columns: Sequence[str] = ("embedding",), model: str = "") -> Any:
        """Vectors of notes (:class:`~notellm2_ray.serve.deployments.encoder.Vectors`).

        Args:
            model: fingerprint of the model that makes them; "": the index's.

        Raises:
            ApiError: the encoder is full, away, or does not have the model.
        """
        with self.figures.timing("encode"):
            seconds, wanted = self.settings.encode.timeout_seconds, model or self.index.model_fingerprint
            return await self.encoder.call("encode", list(notes), tuple(columns), wanted, seconds=seconds)

    async def notes(self, note_ids: Sequence[str]) -> list[StoredNote | None]:
        """Notes as stored; None where there is none."""
        with self.figures.timing("read_notes"):
            return await asyncio.to_thread(self.follower.notes, list(note_ids))

    async def cards(self, note_ids: Sequence[str]) -> dict[str, StoredCard]:
        """Notes as they are shown, by id; without those that are not there."""
        with self.figures.timing("read_cards"):
            return await asyncio.to_thread(self.follower.cards, list(note_ids))

    async def unknown(self, note_ids: Sequence[str]) -> set[str]:
        """Those of the ids that are no notes; what was committed a moment ago counts although no index has it yet."""
        missing = list(dict.fromkeys(note_id for note_id in note_ids if note_id not in self.index))
        if not missing:
            return set()
        return set(missing) - await asyncio.to_thread(self._newest, missing)

    async def applied(self, seq: int, seconds: float = 1.0) -> None:
        """Wait until this replica's index has a commit, for a moment: who wrote a note then finds it here at once."""
        until = time.monotonic() + seconds
        if self.follower.reading.path != self.follower.state.table.path:
            return  # written to a table that this replica has to load first
        while self.follower.state.seq < seq and time.monotonic() < until:
            await asyncio.sleep(0.005)

    def _newest(self, note_ids: list[str]) -> set[str]:
        """Those of the ids that the newest version has."""
        newest = LiveTable(self.follower.reading.path)
        return newest_if_gone(newest, lambda table: table.existing(note_ids))

    async def other_figures(self) -> list[Any]:
        """Figures of deployments that do not report by themselves: one replica of each."""
        found = []
        for one in (self.encoder, self.users, self.ranker):
            if one is not None:
                with contextlib.suppress(ApiError):
                    found.append(await call(one.handle.report, what=one.name, seconds=2))
        return found

    async def missing_now(self) -> list[str]:
        """What is missing for this replica to be ready.

        "Nothing" is never just remembered: a deployment may have died since the last exchange, and the next requests
        would wait for it in vain. So the others are asked again, once for all who want to know at the same moment.
        """
        if not self.problems:
            await self._ask_needed(not_before=time.monotonic() - _READY_SECONDS)
        return self.problems

    def check_health(self) -> None:
        """Serve restarts the replica when this raises."""
        if not self.follower.alive:
            raise RuntimeError("the thread that follows the live table has ended")

    async def _exchange_forever(self) -> None:
        while True:
            await asyncio.gather(self._ask_needed(), self._ask_optional())
            await asyncio.sleep(0.5 if self.problems or self.missing else _EXCHANGE_SECONDS)

    async def _ask_needed(self, not_before: float = float("inf")) -> None:
        """Find out what is missing for being ready, unless that was asked after ``not_before``."""
        async with self._asking:
            if self._asked < not_before:
                began = time.monotonic()
                self.problems = await self._missing_parts()
                self._asked = began

    async def _ask_optional(self) -> None:
        """Find out what is missing that can be done without: recall answers in the ranker's place, and says so."""
        self.missing = [] if self.ranker is None else (await self._ask(self.ranker, "describe"))[1]

    async def _missing_parts(self) -> list[str]:
        """Exchange figures with the writer and ask the other deployments that every answer may need."""
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
            problems.append(self.follower.problem)
        there = [] if described is None else [one["fingerprint"] for one in described["models"]]
        if described is not None and needed not in there:
            problems.append(
                f"the encoder runs {' and '.join(there)}, the index was made with {needed}: if the embedder was "
                "trained anew, run `notellm2 swap-embedder`"
            )
        return problems

    async def _ask(self, other: Dependency, method: str, *arguments: Any) -> tuple[Any, list[str]]:
        """The answer, or None; and why there is none. One that is too busy to answer is there all the same."""
        try:
            # Not counted among the calls in hand: what is full of requests is there.
            return await call(getattr(other.handle, method), *arguments, what=other.name, seconds=5), []
        except OverloadedError:
            return None, []
        except Exception as error:  # whatever it was, this replica is not ready, and says why
            return None, [f"{other.name}: {error.message if isinstance(error, ApiError) else error}"]

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
            log.warning("in the background: %s", type(task.exception()).__name__, exc_info=task.exception())


def _follow(plan: Plan) -> Any:
    """The follower, loaded; at a first start the writer is still making the table.

    Raises:
        DataError: there is no table in time.
    """
    import faiss

    from notellm2_ray.live.follower import StoreFollower

    # Requests are what runs side by side here; threads of one search would only wait for each other.
    faiss.omp_set_num_threads(1)
    serve = plan.serve
    until = time.monotonic() + serve.ready_seconds
    while True:
        follower = StoreFollower(
            plan.directory,
            plan.index,
            poll_seconds=serve.poll_ms / 1000,
            saved_index=plan.saved_index,
            index_arguments={
                "seed": plan.seed,
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
