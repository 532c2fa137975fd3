"""The deployment that keeps users: events, histories, tastes in words, and what experiments showed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from notellm2_ray.serve.figures import Family, Figures
from notellm2_ray.serve.plan import Plan, common_options
from notellm2_ray.users.exposures import Exposure
from notellm2_ray.users.rows import PendingBlock, UserEvent

log = logging.getLogger("notellm2_ray.serve")

_LOOK_SECONDS = 1.0  # between looks for blocks that wait, where no event woke the search
_AT_ONCE = 64
_PREFERENCE_SECONDS = 120.0
_RETRY_SECONDS = 60.0
_POPULAR_SECONDS = 30.0
_POPULAR = 2000
_SEEN = 1000


class Users:
    """One replica, around one :class:`~notellm2_ray.users.store.UserStore`.

    Blocks that are full are handed to the deployment Preferences, where there is one, a user's one after the other and
    all users' side by side. What it answers is kept exactly once, whatever dies in between.
    """

    def __init__(self, plan: Plan, preferences: Any = None) -> None:
        self.plan, self.preferences = plan, preferences
        self.store = open_users(plan)
        self.figures = Figures("users")
        self.popular_notes: list[str] | None = None
        self.counted = float("-inf")  # when they were
        self.counting: asyncio.Task[None] | None = None
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
        """What recommending needs: history (oldest first), seen (lately), whether that is all_seen, and preference (the
        newest, or None).
        """
        self._start()
        return await asyncio.to_thread(self._view, user_id)

    async def seen(self, user_id: str, note_ids: Sequence[str]) -> list[str]:
        """Those of the notes that a user has seen, however long ago."""
        return sorted(await asyncio.to_thread(self.store.seen_among, user_id, note_ids))

    async def blocks(self, user_id: str) -> dict[str, Any] | None:
        """Blocks with their preferences and the open block; None for a user never heard of."""
        history = await asyncio.to_thread(self.store.history, user_id)
        if not history.blocks and not history.waiting and not await asyncio.to_thread(self.store.seen, user_id, 1):
            return None
        closed = [
            {"block": one.block, "note_ids": one.note_ids, "preference": one.preference} for one in history.blocks
        ]
        due = [
            {"block": number, "note_ids": note_ids, "preference": None}
            for number, note_ids in enumerate(history.due, len(closed))
        ]
        return {"blocks": closed + due, "open_block": history.open_block}

    async def sample(self, limit: int) -> list[str]:
        """Some users with a history."""
        return await asyncio.to_thread(self.store.users, limit)

    async def popular(self) -> list[str]:
        """The two thousand notes that most users liked, most first, deleted ones among them; counted anew every half
        minute, by one task for all callers, who get the list as it was meanwhile.
        """
        idle = self.counting is None or self.counting.done()
        if idle and time.monotonic() - self.counted > _POPULAR_SECONDS:
            self.counting = asyncio.get_running_loop().create_task(self._count_popular())
        if self.popular_notes is None and self.counting is not None:
            await asyncio.shield(self.counting)  # a caller that goes away leaves it to the others
        return self.popular_notes or []

    async def expose(self, exposure: dict[str, Any]) -> None:
        """Keep what an answer showed."""
        at = datetime.now(UTC)
        rows = [
            Exposure(exposure["request_id"], exposure["user_id"], note_id, position, exposure["experiment"],
                     exposure["arm"], at)
            for position, note_id in enumerate(exposure["note_ids"])
        ]  # fmt: skip
        await asyncio.shield(asyncio.wrap_future(self.store.submit_exposures(rows)))

    async def describe(self) -> dict[str, Any]:
        """Whether there are users, which shows that the database answers; every gateway asks every two seconds, so it
        counts nothing. Also wakes the search for blocks that wait, after a restart without events.
        """
        self._start()
        return {"users": bool(await asyncio.to_thread(self.store.users, 1))}

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
            "seen": [*self.store.seen(user_id, _SEEN), *liked],
            "all_seen": not self.store.more_events(user_id, _SEEN),
            "preference": None if newest is None else newest[1],
        }

    async def _count_popular(self) -> None:
        self.popular_notes = await asyncio.to_thread(self.store.popular, _POPULAR)
        self.counted = time.monotonic()

    def _start(self) -> None:
        if self.preferences is not None and (self.loop_task is None or self.loop_task.done()):
            self.loop_task = asyncio.get_running_loop().create_task(self._write_preferences())

    async def _write_preferences(self) -> None:
        while True:
            now = time.monotonic()
            self.not_before = {user_id: at for user_id, at in self.not_before.items() if at > now}
            # Those that wait longest come first, and whose preference fails over and over waits longest of all.
            passed_over = frozenset(self.not_before) | self.under_way
            for pending in await asyncio.to_thread(self.store.pending, _AT_ONCE, without=passed_over):
                if len(self.under_way) < _AT_ONCE:
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
    from notellm2_ray.users.seed import seed_events, seed_users
    from notellm2_ray.users.store import UserStore

    path, rule, actions = plan.users_file, plan.block_rule, plan.actions
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if plan.sequences is not None and plan.preferences is not None:
            sequences, blocks = plan.sequences / "sequences.parquet", plan.sequences / "blocks.parquet"
            preferences = plan.preferences / "preferences.parquet"
            seeded = seed_users(path, sequences, blocks, preferences, rule=rule, action=actions[0])
            log.info("%s: seeded with %d users, %d events, %d preferences", path, *seeded)
        elif plan.events is not None and plan.events.exists():
            count = seed_events(path, plan.events, rule=rule, actions=actions)
            log.info("%s: seeded with %d events", path, count)
    return UserStore(path, rule=rule, actions=actions)


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
