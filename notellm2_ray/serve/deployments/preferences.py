"""The deployment that writes users' preferences; ``online.wiring`` provides the engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from notellm2_ray.core.recommend_prompts import Item
from notellm2_ray.core.summary_table import read_summaries
from notellm2_ray.live.current import current_table
from notellm2_ray.live.table import LiveTable
from notellm2_ray.serve.calls import EngineCalls, Failed
from notellm2_ray.serve.figures import Family, Figures
from notellm2_ray.serve.spec import ServiceSpec, engine_options

log = logging.getLogger("notellm2_ray.serve")


class Preferences:
    """One replica: an engine, and the notes' titles and image summaries for its prompts."""

    async def __init__(self, spec: ServiceSpec) -> None:  # type: ignore[misc]  # Serve awaits it
        from ray import serve

        assert spec.preference_engine is not None
        self.spec = spec
        self.figures = Figures(f"preferences-{serve.get_replica_context().replica_id.unique_id}")
        self.summaries = await asyncio.to_thread(read_summaries, spec.summaries)
        engine = spec.preference_engine()  # in this coroutine: vLLM needs its event loop
        await engine.advance(None, [Item("")], user="", block=0)  # warms up, so that no user waits for it
        self.engine = EngineCalls(engine, "preferences' engine")

    async def advance(self, user: str, block: int, previous: str | None, note_ids: Sequence[str]) -> str | Failed:
        """The preference after a block; Failed if the engine fails.

        Args:
            previous: the preference of the block before; None for the first block.
            note_ids: of the block, oldest first; deleted notes are left out.

        Returns:
            The new preference. If all notes are deleted or the model's answer is empty, ``previous``, or "" for None.
        """
        started = time.perf_counter()
        items = await asyncio.to_thread(self._items, list(note_ids))
        if not items:
            return previous or ""
        step = await self.engine("advance", previous, items, user=user, block=block)
        if isinstance(step, Failed):
            return step
        self.figures.took("preference", time.perf_counter() - started)
        return step.preference

    async def check_health(self) -> None:
        """Ray Serve restarts the replica if this raises, as vLLM's check does after the engine has failed."""
        await self.engine.check_health()

    async def describe(self) -> dict[str, Any] | Failed:
        """Facts about this replica; shows that it and its engine run."""
        return await self.engine.describe(summaries=len(self.summaries))

    def report(self) -> list[Family]:
        """This replica's figures."""
        return self.figures.snapshot()

    def _items(self, note_ids: list[str]) -> list[Item]:
        notes = LiveTable(current_table(self.spec.directory)).notes(note_ids)
        return [Item(note.title, self.summaries.get(note.note_id)) for note in notes if note is not None]


def preferences_deployment(spec: ServiceSpec) -> Any:
    """The deployment, not bound yet."""
    from ray import serve

    assert spec.serve.preferences is not None
    environment = spec.environments.get("preferences")
    options = engine_options(spec.serve.preferences, drain_seconds=spec.serve.drain_seconds, environment=environment)
    return serve.deployment(Preferences, name="Preferences", **options)
