"""Routes for users: events, recommendations, histories with preferences."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np

from notellm2_ray.serve.errors import ApiError, NotFoundError, TookTooLongError
from notellm2_ray.serve.experiments import Arm, arm_of
from notellm2_ray.serve.http import schemas
from notellm2_ray.serve.http.cards import cards
from notellm2_ray.serve.http.checks import check_count, check_ids, check_k
from notellm2_ray.serve.http.similar import VARIETY, vectors_of
from notellm2_ray.serve.recommend import Candidate, merge, ranked, recent
from notellm2_ray.serve.variety import diverse, fold

if TYPE_CHECKING:
    from notellm2_ray.serve.deployments.gateway import Gateway

USER_SECONDS = 10.0
_AHEAD = timedelta(days=1)  # a phone's clock may be off by its time zone


def build(gateway: Gateway) -> Any:
    """The router."""
    from fastapi import APIRouter, Query

    routes = APIRouter(tags=["users"])

    @routes.post("/v1/events", response_model=schemas.EventsAnswer)
    async def events(body: schemas.EventsRequest) -> Any:
        """Store events; 200 means that they are on the disk. An event that is sent twice counts once."""
        return await log_events(gateway, body.events)

    @routes.post("/v1/recommend", response_model=schemas.RecommendAnswer)
    async def recommend(body: schemas.RecommendRequest) -> Any:
        """Notes that a user may like next and has not seen yet."""
        return await Recommendation(gateway, body).make()

    @routes.get("/v1/users", response_model=schemas.UsersAnswer)
    async def users(limit: int = Query(20, ge=1, le=1000)) -> Any:
        """Some users with a history."""
        return {"users": await gateway.users.call("sample", limit, seconds=USER_SECONDS)}

    unknown: dict[int | str, dict[str, Any]] = {404: {"model": schemas.ErrorAnswer, "description": "no such user"}}

    @routes.get("/v1/users/{user_id:path}", response_model=schemas.UserAnswer, responses=unknown)
    async def user(user_id: str) -> Any:
        """A user's history in blocks, with the preference after each."""
        check_ids([user_id], gateway.limits, "user_id")
        return await show_user(gateway, user_id)

    return routes


async def log_events(gateway: Gateway, events: Sequence[schemas.Event]) -> dict[str, Any]:
    """Store the events whose note exists and whose time is not in the future."""
    check_count(events, gateway.limits.events, "events")
    unknown = await gateway.unknown([event.note_id for event in events])
    latest = datetime.now(UTC) + _AHEAD
    kept: list[dict[str, Any]] = []
    rows: list[int] = []
    rejected: list[dict[str, Any]] = []
    for row, event in enumerate(events):
        reason = _problem(gateway, event, unknown, latest)
        if reason is None:
            kept.append(event.model_dump())
            rows.append(row)
        else:
            rejected.append({"index": row, "event_id": event.event_id, "reason": reason})
    accepted = duplicates = 0
    if kept:
        done = await gateway.users.call("log_events", kept, seconds=USER_SECONDS)
        accepted, duplicates = done["accepted"], done["duplicates"]
        for row, reason in done["rejected"]:
            rejected.append({"index": rows[row], "event_id": events[rows[row]].event_id, "reason": reason})
    return {"accepted": accepted, "duplicates": duplicates, "rejected": rejected}


def _problem(gateway: Gateway, event: schemas.Event, unknown: set[str], latest: datetime) -> str | None:
    try:
        check_ids(
            [event.event_id, event.user_id, event.note_id, event.session_id, event.request_id], gateway.limits, "id"
        )
    except ApiError as error:
        return error.message
    if event.note_id in unknown:
        return "there is no such note"
    if event.timestamp is not None and event.timestamp > latest:
        return "its time is more than a day in the future"
    return None


async def show_user(gateway: Gateway, user_id: str) -> dict[str, Any]:
    """Blocks and preferences of a user, with the notes' cards."""
    found = await gateway.users.call("blocks", user_id, seconds=USER_SECONDS)
    if found is None:
        raise NotFoundError(f"there is no user {user_id!r}", "user_id")
    ids = [note_id for block in found["blocks"] for note_id in block["note_ids"]] + list(found["open_block"])
    shown = await cards(gateway, ids)

    def those(note_ids: Sequence[str]) -> list[schemas.NoteCard]:
        return [shown[note_id] for note_id in note_ids if note_id in shown]

    blocks = [
        {"block": block["block"], "notes": those(block["note_ids"]), "preference": block["preference"]}
        for block in found["blocks"]
    ]
    return {"user_id": user_id, "blocks": blocks, "open_block": those(found["open_block"])}


class Recommendation:
    """Makes one answer of ``/v1/recommend``.

    There is always an answer from recall. It is ranked if there is a ranker that has room and finishes within the time
    budget; otherwise ``fallback`` says why not.
    """

    def __init__(self, gateway: Gateway, body: schemas.RecommendRequest) -> None:
        limits = gateway.limits
        check_k(body.k, limits.recommend_k)
        check_ids([body.user_id, *(body.history or ())], limits, "user_id" if body.user_id else "history")
        check_count(body.history or (), limits.ids, "history")
        self.gateway, self.body, self.started = gateway, body, time.perf_counter()
        self.request_id = uuid.uuid4().hex
        self.arm = self._arm()
        self.budget = (body.budget_ms or self.arm.recommend.budget_ms) / 1000

    async def make(self) -> dict[str, Any]:
        """Recall, rank, log the exposure, answer."""
        view = await self._view()
        with self.gateway.figures.timing("recall"):
            candidates = await self._recall(view)
        candidates, folded = await self._folded(view, candidates)
        p_yes, fallback = await self._rank(view, candidates)
        chosen = await self._varied(ranked(candidates, p_yes))
        if fallback is not None:
            self.gateway.figures.fallback(fallback)
        if self.body.user_id is not None:
            self._expose([one.note_id for one, _ in chosen])
        shown = await cards(self.gateway, [one.note_id for one, _ in chosen]) if self.body.explain else {}
        self.gateway.figures.took("recommend", time.perf_counter() - self.started)
        return {
            "request_id": self.request_id,
            "arm": self.arm.name,
            "preference": view["preference"],
            "ranked_by": "ranker" if fallback is None else "recall",
            "fallback": fallback,
            "results": [
                {
                    "note_id": one.note_id,
                    "score": one.score,
                    "p_yes": p,
                    "from_history": list(one.from_history),
                    "note": shown.get(one.note_id),
                    "duplicates": None if folded is None else folded.get(one.note_id, []),
                }
                for one, p in chosen
            ],
        }

    def _arm(self) -> Arm:
        settings = self.gateway.settings
        if self.body.user_id is None:
            return Arm("none", settings.recommend)  # an unknown user: the effect on clicks cannot be measured
        return arm_of(self.body.user_id, settings.experiment, settings.arms, settings.recommend)

    async def _view(self) -> dict[str, Any]:
        """history (oldest first), seen, all_seen, preference."""
        if self.body.history is not None:
            return {"history": self.body.history, "seen": self.body.history, "all_seen": True, "preference": None}
        return await self.gateway.users.call("view", self.body.user_id, seconds=USER_SECONDS)

    async def _recall(self, view: dict[str, Any]) -> list[Candidate]:
        settings, index = self.arm.recommend, self.gateway.index
        searched = [note_id for note_id in recent(view["history"], settings) if note_id in index]
        excluded = frozenset(view["seen"]) | frozenset(view["history"])
        found = {}
        for note_id in searched:
            try:
                # Asks for more notes than needed instead of passing a long history to the index in every search.
                k = max(settings.per_note, self.body.k) + min(len(excluded), settings.per_note)
                hits = await self.gateway.search(note_id, k, index=index)
            except NotFoundError:  # deleted meanwhile
                continue
            kept = [row for row, one in enumerate(hits.ids) if one not in excluded]
            found[note_id] = ([hits.ids[row] for row in kept], hits.scores[kept])
        candidates = merge(searched, found, excluded, settings)
        seen = await self._seen_long_ago(view, [one.note_id for one in candidates])
        candidates = [one for one in candidates if one.note_id not in seen]
        if len(candidates) < self.body.k:
            known = excluded | {one.note_id for one in candidates}
            candidates += await self._popular(view, known, len(candidates))
        return candidates

    async def _folded(
        self, view: dict[str, Any], candidates: list[Candidate]
    ) -> tuple[list[Candidate], dict[str, list[str]] | None]:
        """Candidates without near duplicates, of each other or of the recent history; the folded ones by note id.

        They are folded before they are ranked, so that the ranker's few places are for different notes.
        """
        above, index = self.body.fold_above, self.gateway.index
        if above is None:
            return candidates, None
        vectors = await asyncio.to_thread(vectors_of, index, [one.note_id for one in candidates])
        known = vectors_of(index, recent(view["history"], self.arm.recommend))
        found = await asyncio.to_thread(fold, vectors, above, known)
        duplicates = {
            candidates[kept].note_id: [candidates[row].note_id for row in rows]
            for kept, rows in found.duplicates.items()
        }
        return [candidates[row] for row in found.rows], duplicates

    async def _varied(self, ordered: list[tuple[Candidate, float | None]]) -> list[tuple[Candidate, float | None]]:
        """The wanted candidates, diverse if that is asked for."""
        if not self.body.diversity:
            return ordered[: self.body.k]
        vectors = await asyncio.to_thread(vectors_of, self.gateway.index, [one.note_id for one, _ in ordered])
        places = np.linspace(1, 0, len(ordered))
        rows = await asyncio.to_thread(diverse, places, vectors, self.body.k, self.body.diversity)
        return [ordered[row] for row in rows]

    async def _seen_long_ago(self, view: dict[str, Any], note_ids: list[str]) -> set[str]:
        """The notes among these that the user has seen; queried only if the view does not contain all seen notes."""
        if view["all_seen"] or not note_ids:
            return set()
        return set(await self.gateway.users.call("seen", self.body.user_id, note_ids, seconds=USER_SECONDS))

    async def _popular(self, view: dict[str, Any], excluded: frozenset[str], have: int) -> list[Candidate]:
        """The most liked notes, for users with no history or nothing similar left."""
        wanted = self.body.k - have
        ids = await self.gateway.users.call("popular", seconds=USER_SECONDS)
        left = [note_id for note_id in ids if note_id not in excluded and note_id in self.gateway.index]
        seen = await self._seen_long_ago(view, left)
        left = [note_id for note_id in left if note_id not in seen]
        if self.body.diversity or self.body.fold_above is not None:
            wanted *= VARIETY
        return [Candidate(note_id, 0.0, ()) for note_id in left[:wanted]]

    async def _rank(self, view: dict[str, Any], candidates: list[Candidate]) -> tuple[list[float | None], str | None]:
        """P(yes) of the first candidates and None; or no scores and the reason."""
        settings, gateway = self.arm.recommend, self.gateway
        if gateway.ranker is None:
            return [], "not configured"
        if not settings.use_ranker:
            return [], "arm"
        if not view["history"]:
            return [], "no history"
        if gateway.readiness.lacks("ranker"):
            return [], "failed"
        left = self.budget - (time.perf_counter() - self.started)
        if left <= 0:
            return [], "budget"
        try:
            async with asyncio.timeout(left):
                with gateway.figures.timing("rank"):
                    return await self._scores(view, candidates[: max(settings.ranked, 1)], left), None
        except TimeoutError:
            return [], "budget"
        except ApiError as error:
            if error.kind == "overloaded":
                return [], "overloaded"
            return [], "budget" if isinstance(error, TookTooLongError) else "failed"

    async def _scores(self, view: dict[str, Any], candidates: list[Candidate], seconds: float) -> list[float | None]:
        gateway = self.gateway
        assert gateway.ranker is not None  # checked in _rank
        last = view["history"][-gateway.spec.ranker.max_history :]
        read, stored = await asyncio.gather(gateway.cards(last), gateway.notes([one.note_id for one in candidates]))
        titles = [read[note_id].title for note_id in last if note_id in read]
        shown = [None if note is None else (note.title, note.image) for note in stored]
        return await gateway.ranker.call("score", view["preference"], titles, shown, seconds=max(seconds, 0.001))

    def _expose(self, note_ids: list[str]) -> None:
        """Store the exposures in the background: the answer must not wait for a disk."""
        exposure = {
            "request_id": self.request_id,
            "user_id": self.body.user_id,
            "experiment": self.gateway.settings.experiment,
            "arm": self.arm.name,
            "note_ids": note_ids,
        }
        self.gateway.background(self.gateway.users.call("expose", exposure, seconds=USER_SECONDS))
