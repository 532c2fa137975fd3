"""The deployment that scores candidates by P(yes); the engine itself is handed in by the top-level wiring."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from typing import Any

from notellm2_ray.serve.figures import Family, Figures
from notellm2_ray.serve.plan import Plan, replica_options


class Ranker:
    """One replica: an engine that advances all of a user's candidates at once; they share their prompt's beginning."""

    async def __init__(self, plan: Plan) -> None:  # type: ignore[misc]  # Serve awaits it
        from ray import serve

        assert plan.ranker_engine is not None
        self.figures = Figures(f"ranker-{serve.get_replica_context().replica_id.unique_id}")
        self.engine = plan.ranker_engine()  # vLLM's needs this loop
        # The first request with a picture takes many times as long, kernels being compiled: let nobody wait for it.
        await self.engine.score(None, [], [("0", _plain_picture())])

    async def score(
        self,
        preference: str | None,
        history_titles: Sequence[str],
        candidates: Sequence[tuple[str, bytes | None] | None],
    ) -> list[float | None]:
        """P(yes) of each candidate, in their order.

        Args:
            preference: the user's taste in words; None where there is none yet.
            history_titles: of the last notes, oldest first.
            candidates: title and encoded image; None for a note that is gone, which gets None.
        """
        started = time.perf_counter()
        there = [one for one in candidates if one is not None]
        scores = iter(await self.engine.score(preference, list(history_titles), there))
        self.figures.took("ranker", time.perf_counter() - started)
        self.figures.batch("ranker", len(there))
        return [None if one is None else next(scores) for one in candidates]

    async def check_health(self) -> None:
        """Serve starts the replica anew when this raises, as vLLM's does once its engine has failed."""
        check = getattr(getattr(self.engine, "engine", None), "check_health", None)
        if check is not None:
            await check()

    def describe(self) -> dict[str, Any]:
        """That this replica is up."""
        return {}

    def report(self) -> list[Family]:
        """This replica's figures."""
        return self.figures.snapshot()


def _plain_picture() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (224, 224), "gray").save(buffer, "PNG")
    return buffer.getvalue()


def ranker_deployment(plan: Plan) -> Any:
    """The deployment, not bound yet."""
    from ray import serve

    assert plan.serve.ranker is not None
    options = replica_options(plan.serve.ranker, drain_seconds=plan.serve.drain_seconds, environment=plan.environment)
    return serve.deployment(Ranker, name="Ranker", **options)
