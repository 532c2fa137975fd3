"""The deployment that keeps users: events, histories, tastes in words, and what experiments showed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from notellm2_ray.serve.exposures import Exposure
from notellm2_ray.serve.figures import Family, Figures
from notellm2_ray.serve.plan import Plan, common_options
from notellm2_ray.serve.user_rows import PendingBlock, UserEvent

log = logging.getLogger("notellm2_ray.serve")

_LOOK_SECONDS = 1.0  # between looks for blocks that wait, where no event woke the search
_AT_ONCE = 64
_PREFERENCE_SECONDS = 120.0
_RETRY_SECONDS = 60.0
_POPULAR_SECONDS = 30.0
_POPULAR = 2000
_MAX_SEED_EVENTS = 2_000_000
_SEED_ROWS = 5000


class Users:
    """One replica, around one :class:`~notellm2_ray.serve.user_store.UserStore`.

    Blocks that are full are handed to the deployment Preferences, where there is one, a user's one after the other and
    all users' side by side. What it answers is kept exactly once, whatever dies in between.
    """

    def __init__(self, plan: Plan, preferences: Any = None) -> None:
        self.plan, self.preferences = plan, preferences
        self.store = open_users(plan)
        self.figures = Figures("users")
        self.popular_notes: tuple[float, list[str]] = (0.0, [])
        self.wake = asyncio.Event()
        self.not_before: dict[str, float] = {}
        self.under_way: set[str] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.loop_task: asyncio.Task[None] | None = None

    async def log_events(self, events: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Keep events; done when they are on the disk.

        Returns:
            accepted, duplicates, rejected (pairs of row and reason).
        """
        self._start()
        now = datetime.now(UTC)
        values = ({**event, "timestamp": event["timestamp"] or now} for event in events)
        rows = [UserEvent(**{name: one[name] for name in UserEvent._fields}) for one in values]
        with self.figures.timing("events"):
            statuses = await asyncio.shield(asyncio.wrap_future(self.store.submit_events(rows)))
        self.figures.batch("events", len(rows))
        self.wake.set()
        duplicates = sum(status == "duplicate" for status in statuses)
        return {"accepted": len(rows) - duplicates, "duplicates": duplicates, "rejected": []}

    async def view(self, user_id: str) -> dict[str, Any]:
        """What recommending needs: history (oldest first), seen, preference (the newest, or None)."""
        self._start()
        return await asyncio.to_thread(self._view, user_id)

    async def blocks(self, user_id: str) -> dict[str, Any] | None:
        """Blocks with their preferences and the open block; None for a user never heard of."""
        history = await asyncio.to_thread(self.store.history, user_id)
        if not history.blocks and not history.waiting and not await asyncio.to_thread(self.store.seen, user_id, 1):
            return None
        closed = [
            {"block": one.block, "note_ids": one.note_ids, "preference": one.preference} for one in history.blocks
        ]
        # Full blocks that still wait for their words are blocks to whoever looks at them.
        size, waiting, number = self.plan.block_size, history.waiting, len(closed)
        while self.plan.session_gap_minutes is None and len(waiting) >= size:
            closed.append({"block": number, "note_ids": waiting[:size], "preference": None})
            waiting, number = waiting[size:], number + 1
        return {"blocks": closed, "open_block": waiting}

    async def sample(self, limit: int) -> list[str]:
        """Some users with a history."""
        return await asyncio.to_thread(self.store.users, limit)

    async def popular(self, limit: int) -> list[str]:
        """Notes by how many users liked them, most first; counted anew every half minute."""
        counted, notes = self.popular_notes
        if time.monotonic() - counted > _POPULAR_SECONDS or not counted:
            notes = await asyncio.to_thread(self.store.popular, _POPULAR)
            self.popular_notes = (time.monotonic(), notes)
        return notes[:limit]

    async def expose(self, exposure: dict[str, Any]) -> None:
        """Keep what an answer showed."""
        at = datetime.now(UTC)
        rows = [
            Exposure(exposure["request_id"], exposure["user_id"], note_id, position, exposure["experiment"],
                     exposure["arm"], at)
            for position, note_id in enumerate(exposure["note_ids"])
        ]  # fmt: skip
        await asyncio.shield(asyncio.wrap_future(self.store.submit_exposures(rows)))

    async def lift(self, experiment: str) -> list[dict[str, Any]]:
        """Each arm's users, clicks, click rate and lift."""
        return [one._asdict() for one in await asyncio.to_thread(self.store.statistics, experiment)]

    async def describe(self) -> dict[str, Any]:
        """Counts; also wakes the search for blocks that wait, after a restart without events."""
        self._start()
        return await asyncio.to_thread(self.store.info)

    def report(self) -> list[Family]:
        """This replica's figures."""
        return self.figures.snapshot()

    def check_health(self) -> None:
        """Serve restarts the replica when this raises."""
        if not self.store.alive:
            raise RuntimeError("the thread that writes the users' database has ended")

    def __del__(self) -> None:
        store = getattr(self, "store", None)
        if store is not None:
            with contextlib.suppress(Exception):
                store.close()

    def _view(self, user_id: str) -> dict[str, Any]:
        liked = self.store.liked(user_id)
        newest = self.store.preference(user_id)
        return {
            "history": liked[::-1],
            "seen": [*self.store.seen(user_id), *liked],
            "preference": None if newest is None else newest[1],
        }

    def _start(self) -> None:
        if self.preferences is not None and (self.loop_task is None or self.loop_task.done()):
            self.loop_task = asyncio.get_running_loop().create_task(self._write_preferences())

    async def _write_preferences(self) -> None:
        while True:
            now = time.monotonic()
            for pending in await asyncio.to_thread(self.store.pending, _AT_ONCE):
                late = self.not_before.get(pending.user_id, 0.0) > now
                if not late and pending.user_id not in self.under_way and len(self.under_way) < _AT_ONCE:
                    self.under_way.add(pending.user_id)
                    task = asyncio.get_running_loop().create_task(self._write(pending))
                    self.tasks.add(task)
                    task.add_done_callback(self.tasks.discard)
            self.wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wake.wait(), _LOOK_SECONDS)

    async def _write(self, pending: PendingBlock) -> None:
        from notellm2_ray.serve.calls import call

        try:
            text = await call(
                self.preferences.advance,
                pending.user_id,
                pending.block,
                pending.previous,
                pending.note_ids,
                what="preferences",
                seconds=_PREFERENCE_SECONDS,
            )
            saved = self.store.submit_preference(pending.user_id, pending.block, pending.fingerprint, text)
            await asyncio.shield(asyncio.wrap_future(saved))
            self.figures.batch("preference_notes", len(pending.note_ids))
            self.not_before.pop(pending.user_id, None)
            self.wake.set()  # the user's next block may wait already
        except Exception as error:  # whatever it was, the block still waits and is tried again
            log.warning("a preference was not written: %s", type(error).__name__)
            self.not_before[pending.user_id] = time.monotonic() + _RETRY_SECONDS
        finally:
            self.under_way.discard(pending.user_id)


def open_users(plan: Plan) -> Any:
    """The users' store; at the first start filled from what the bulk jobs left."""
    from notellm2_ray.serve.user_store import UserStore

    path = plan.users_file
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    if fresh and plan.sequences is not None and plan.preferences is not None:
        _seed_from_bulk(plan, path)
        fresh = False
    store = UserStore(
        path, block_size=plan.block_size, session_gap_minutes=plan.session_gap_minutes, actions=plan.actions
    )
    if fresh and plan.events is not None and plan.events.exists():
        seed_events(store, plan.events)
    return store


def _seed_from_bulk(plan: Plan, path: Path) -> None:
    from notellm2_ray.serve.seed_users import seed_users

    assert plan.sequences is not None and plan.preferences is not None
    seeded = seed_users(
        path,
        plan.sequences / "sequences.parquet",
        plan.sequences / "blocks.parquet",
        plan.preferences / "preferences.parquet",
        block_size=plan.block_size,
        session_gap_minutes=plan.session_gap_minutes,
        action=plan.actions[0],
    )
    log.info("%s: seeded with %d users, %d events, %d preferences", path, *seeded)


def seed_events(store: Any, events: Path) -> int:
    """Put prepared events into an empty store; the number kept.

    A service that starts with an empty history can recommend nothing of one's own; a log of billions is no seed
    either, so it ends after the first two million rows and says so.
    """
    import pyarrow.dataset as pads

    kept = 0
    for batch in pads.dataset(str(events), format="parquet").to_batches(batch_size=_SEED_ROWS):
        rows = batch.select(["user_id", "note_id", "timestamp", "action", "session_id"]).to_pylist()
        store.add_events([UserEvent(**row) for row in rows])
        kept += len(rows)
        if kept >= _MAX_SEED_EVENTS:
            log.warning("%s: only the first %d events were taken as histories", events, kept)
            break
    log.info("seeded with %d events", kept)
    return kept


def users_deployment(plan: Plan) -> Any:
    """The deployment, not bound yet."""
    from ray import serve

    return serve.deployment(
        Users,
        name="Users",
        num_replicas=1,
        max_ongoing_requests=256,
        max_queued_requests=32,  # each waits in a gateway's slot, until the next replica is there or its time is up
        **common_options(
            plan.serve.users_cpus, drain_seconds=plan.serve.drain_seconds, resource=plan.serve.state_resource
        ),
    )
