"""The deployment that puts users' tastes into words; the engine itself is handed in by the top-level wiring."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from notellm2_ray.core.recommend_prompts import Item
from notellm2_ray.live.current import current_table
from notellm2_ray.live.table import LiveTable
from notellm2_ray.serve.figures import Family, Figures
from notellm2_ray.serve.plan import Plan, replica_options

log = logging.getLogger("notellm2_ray.serve")


class Preferences:
    """One replica: an engine, and the notes' titles and image summaries for its prompts."""

    async def __init__(self, plan: Plan) -> None:  # type: ignore[misc]  # Serve awaits it
        from ray import serve

        assert plan.preference_engine is not None
        self.plan = plan
        self.figures = Figures(f"preferences-{serve.get_replica_context().replica_id.unique_id}")
        self.summaries = await asyncio.to_thread(read_summaries, plan)
        self.engine = plan.preference_engine()  # vLLM's needs this loop
        await self.engine.advance(None, [Item("")], user="", block=0)  # the first call takes longest: of nobody's

    async def advance(self, user: str, block: int, previous: str | None, note_ids: Sequence[str]) -> str:
        """The taste after a block.

        Args:
            previous: the taste before it; None for a first block.
            note_ids: of the block, oldest first; notes that are gone are left out.

        Returns:
            The taste before it where all of its notes are gone, or the model answered nothing; "" if that was None.
        """
        started = time.perf_counter()
        items = await asyncio.to_thread(self._items, list(note_ids))
        if not items:
            return previous or ""
        step = await self.engine.advance(previous, items, user=user, block=block)
        self.figures.took("preference", time.perf_counter() - started)
        return step.preference

    async def check_health(self) -> None:
        """Serve starts the replica anew when this raises, as vLLM's does once its engine has failed."""
        check = getattr(getattr(self.engine, "engine", None), "check_health", None)
        if check is not None:
            await check()

    def describe(self) -> dict[str, Any]:
        """That this replica is up."""
        return {"summaries": len(self.summaries)}

    def report(self) -> list[Family]:
        """This replica's figures."""
        return self.figures.snapshot()

    def _items(self, note_ids: list[str]) -> list[Item]:
        notes = LiveTable(current_table(self.plan.directory)).notes(note_ids)
        return [Item(note.title, self.summaries.get(note.note_id)) for note in notes if note is not None]


def read_summaries(plan: Plan) -> dict[str, str]:
    """Image summaries by note, of the bulk job; notes that came later are shown by their title alone."""
    if plan.summaries is None or not plan.summaries.is_file():
        return {}
    import pyarrow.parquet as pq

    table = pq.read_table(plan.summaries, columns=["note_id", "summary"])
    return dict(zip(table["note_id"].to_pylist(), table["summary"].to_pylist(), strict=True))


def preferences_deployment(plan: Plan) -> Any:
    """The deployment, not bound yet."""
    from ray import serve

    assert plan.serve.preferences is not None
    options = replica_options(
        plan.serve.preferences, drain_seconds=plan.serve.drain_seconds, environment=plan.environment
    )
    return serve.deployment(Preferences, name="Preferences", **options)
