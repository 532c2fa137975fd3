"""The deployment that scores candidates by P(yes); ``online.wiring`` provides the engine."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from typing import Any

from notellm2_ray.serve.calls import EngineCalls, Failed
from notellm2_ray.serve.figures import Family, Figures
from notellm2_ray.serve.spec import ServiceSpec, engine_options


class Ranker:
    """One replica: an engine that scores all candidates of a user at once; their prompts share the beginning."""

    async def __init__(self, spec: ServiceSpec) -> None:  # type: ignore[misc]  # Serve awaits it
        from ray import serve

        assert spec.ranker_engine is not None
        self.figures = Figures(f"ranker-{serve.get_replica_context().replica_id.unique_id}")
        engine = spec.ranker_engine()  # in this coroutine: vLLM needs its event loop
        # The first request with an image compiles kernels and takes many times as long; no user should wait for it.
        await engine.score(None, [], [("0", _grey_image())])
        self.engine = EngineCalls(engine, "ranker's engine")

    async def score(
        self,
        preference: str | None,
        history_titles: Sequence[str],
        candidates: Sequence[tuple[str, bytes | None] | None],
    ) -> list[float | None] | Failed:
        """P(yes) of each candidate, in their order; Failed if the engine fails.

        Args:
            preference: the user's; None if there is none yet.
            history_titles: of the last notes, oldest first.
            candidates: title and encoded image; None for a deleted note, whose score is None.
        """
        started = time.perf_counter()
        there = [one for one in candidates if one is not None]
        answer = await self.engine("score", preference, list(history_titles), there)
        if isinstance(answer, Failed):
            return answer
        scores = iter(answer)
        self.figures.took("ranker", time.perf_counter() - started)
        self.figures.batch("ranker", len(there))
        return [None if one is None else next(scores) for one in candidates]

    async def check_health(self) -> None:
        """Ray Serve restarts the replica if this raises, as vLLM's check does after the engine has failed."""
        await self.engine.check_health()

    async def describe(self) -> dict[str, Any] | Failed:
        """Shows that this replica and its engine run."""
        return await self.engine.describe()

    def report(self) -> list[Family]:
        """This replica's figures."""
        return self.figures.snapshot()


def _grey_image() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (224, 224), "gray").save(buffer, "PNG")
    return buffer.getvalue()


def ranker_deployment(spec: ServiceSpec) -> Any:
    """The deployment, not bound yet."""
    from ray import serve

    assert spec.serve.ranker is not None
    environment = spec.environments.get("ranker")
    options = engine_options(spec.serve.ranker, drain_seconds=spec.serve.drain_seconds, environment=environment)
    return serve.deployment(Ranker, name="Ranker", **options)
