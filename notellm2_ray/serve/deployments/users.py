"""The deployment that keeps users: events, histories, preferences and exposures."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from notellm2_ray.serve.calls import Dependency
from notellm2_ray.serve.errors import ApiError
from notellm2_ray.serve.figures import Family, Figures
from notellm2_ray.serve.spec import ServiceSpec, common_options
from notellm2_ray.users.exposures import Exposure
from notellm2_ray.users.rows import PendingBlock, UserEvent

log = logging.getLogger("notellm2_ray.serve")

_LOOK_SECONDS = 1.0  # between two searches for pending blocks, unless an event starts one earlier
_AT_ONCE = 64  # preferences in progress at most
_PREFERENCE_SECONDS = 120.0
_RETRY_SECONDS = 60.0
_POPULAR_SECONDS = 30.0
_POPULAR = 2000
_SEEN = 1000


class Users:
    """The only replica, with the :class:`~notellm2_ray.users.store.UserStore`.

    If there is a deployment Preferences, it gets the complete blocks: those of one user one after the other, those of
    different users in parallel. Its answer is stored exactly once, even if a process dies in between.
    """

    def __init__(self, spec: ServiceSpec, preferences: Any = None) -> None:
        self.spec = spec
        self.preferences = None if preferences is None else Dependency(preferences, "preferences", _AT_ONCE)
        self.store = open_users(spec)
        self.figures = Figures("users")
        self.popular_notes: list[str] | None = None
        self.counted = float("-inf")  # time of the last count
        self.counting: asyncio.Task[None] | None = None
        self.wake = asyncio.Event()
        self.not_before: dict[str, float] = {}
        self.under_way: set[str] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.loop_task: asyncio.Task[None] | None = None

    async def log_events(self, events: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Store events; returns when they are on the disk.

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
        """What a recommendation needs of a user.

        Returns:
            history (oldest first), seen (the last notes seen), all_seen (whether those are all) and preference (the
            newest, or None).
        """
        self._start()
        return await asyncio.to_thread(self._view, user_id)

    async def seen(self, user_id: str, note_ids: Sequence[str]) -> list[str]:
        """The notes among these that a user has ever seen."""
        return sorted(await asyncio.to_thread(self.store.seen_among, user_id, note_ids))

    async def blocks(self, user_id: str) -> dict[str, Any] | None:
        """Blocks with their preferences, and the open block; None for an unknown user."""
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
        """The 2,000 notes that most users liked, in descending order, deleted ones included.

        They are counted again every half minute by one task for all callers, who get the old list meanwhile.
        """
        idle = self.counting is None or self.counting.done()
        if idle and time.monotonic() - self.counted > _POPULAR_SECONDS:
            self.counting = asyncio.get_running_loop().create_task(self._count_popular())
        if self.popular_notes is None and self.counting is not None:
            await asyncio.shield(self.counting)  # a cancelled caller must not cancel it for the others
        return self.popular_notes or []

    async def expose(self, exposure: dict[str, Any]) -> None:
        """Store the exposures of an answer."""
        at = datetime.now(UTC)
        rows = [
            Exposure(exposure["request_id"], exposure["user_id"], note_id, position, exposure["experiment"],
                     exposure["arm"], at)
            for position, note_id in enumerate(exposure["note_ids"])
        ]  # fmt: skip
        await asyncio.shield(asyncio.wrap_future(self.store.submit_exposures(rows)))

    async def describe(self) -> dict[str, Any]:
        """Whether there are users, which shows that the database answers.

        Every gateway asks every two seconds, so nothing is counted here. Also starts the search for pending blocks,
        which after a restart no event may have started.
        """
        self._start()
        return {"users": bool(await asyncio.to_thread(self.store.users, 1))}

    def report(self) -> list[Family]:
        """This replica's figures."""
        return self.figures.snapshot()

    def check_health(self) -> None:
        """Ray Serve restarts the replica if this raises."""
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
            # Without this, users whose preference keeps failing would come first each time and block all others.
            skipped = frozenset(self.not_before) | self.under_way
            for pending in await asyncio.to_thread(self.store.pending, _AT_ONCE, without=skipped):
                if len(self.under_way) < _AT_ONCE:
                    self.under_way.add(pending.user_id)
                    task = asyncio.get_running_loop().create_task(self._write(pending))
                    self.tasks.add(task)
                    task.add_done_callback(self.tasks.discard)
            self.wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.wake.wait(), _LOOK_SECONDS)

    async def _write(self, pending: PendingBlock) -> None:
        assert self.preferences is not None
        try:
            text = await self.preferences.ask(
                "advance",
                pending.user_id,
                pending.block,
                pending.previous,
                pending.note_ids,
                seconds=_PREFERENCE_SECONDS,
            )
            saved = self.store.submit_preference(pending.user_id, pending.block, pending.fingerprint, text)
            await asyncio.shield(asyncio.wrap_future(saved))
            self.figures.batch("preference_notes", len(pending.note_ids))
            self.not_before.pop(pending.user_id, None)
            self.wake.set()  # the user's next block may be complete already
        except Exception as error:  # any kind: the block stays pending and is tried again
            if not isinstance(error, ApiError):  # those are logged by Dependency
                log.warning("a preference was not written: %s", type(error).__name__)
            self.not_before[pending.user_id] = time.monotonic() + _RETRY_SECONDS
        finally:
            self.under_way.discard(pending.user_id)


def open_users(spec: ServiceSpec) -> Any:
    """The users' store; at the first start it is filled from the bulk jobs' outputs."""
    from notellm2_ray.users.seed import seed_events, seed_users
    from notellm2_ray.users.store import UserStore

    path, rule, actions = spec.users_file, spec.block_rule, spec.actions
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if spec.sequences is not None and spec.preferences is not None:
            sequences, blocks = spec.sequences / "sequences.parquet", spec.sequences / "blocks.parquet"
            preferences = spec.preferences / "preferences.parquet"
            seeded = seed_users(path, sequences, blocks, preferences, rule=rule, action=actions[0])
            log.info("%s: seeded with %d users, %d events, %d preferences", path, *seeded)
        elif spec.events is not None and spec.events.exists():
            count = seed_events(path, spec.events, rule=rule, actions=actions)
            log.info("%s: seeded with %d events", path, count)
    return UserStore(path, rule=rule, actions=actions)


def users_deployment(spec: ServiceSpec) -> Any:
    """The deployment, not bound yet."""
    from ray import serve

    return serve.deployment(
        Users,
        name="Users",
        num_replicas=1,
        max_ongoing_requests=256,
        max_queued_requests=32,  # during a restart each takes up one of a gateway's requests until its time is up
        **common_options(
            spec.serve.users_cpus, drain_seconds=spec.serve.drain_seconds, resource=spec.serve.state_resource
        ),
    )
