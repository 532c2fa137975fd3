"""The engine actors of preferences: supplied with chains, replaced when they die."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

from notellm2_ray.core.errors import ModelError, NoteLLMError
from notellm2_ray.infer.engine import engine_environment, engine_error
from notellm2_ray.infer.preference_worker import Done, Job, PreferenceEngine, Work

log = logging.getLogger("notellm2_ray")

_CHUNK = 8  # chains in one call of an actor; they are of about equal length, so that none waits long for another
_DEATHS = 3  # actors that may die one after another without a single new step
_POLL_SECONDS = 1.0


class _Call(NamedTuple):
    number: int  # of the actor
    actor: Any
    works: list[Work]


class EnginePool:
    """``generation.engines`` actors. Use as a context manager: entering loads the models, leaving ends the actors."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.actors: list[Any] = []
        self._calls: dict[Any, _Call] = {}
        self._deaths = 0
        # As many chains again as run at once would wait at the actor for nothing; one call more never lets it idle.
        self._most = job.settings.concurrent_calls + _CHUNK

    def __enter__(self) -> EnginePool:
        try:
            self.actors = [self._new() for _ in range(self.job.generation.engines)]
            self._wait_for_start([actor.start.remote() for actor in self.actors])
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def busy(self) -> bool:
        return bool(self._calls)

    def room(self) -> int:
        """Chains that the least loaded engine takes now, as one call."""
        return min(_CHUNK, self._most - min(self._loads()))

    def submit(self, works: list[Work]) -> None:
        """Hand chains to the least loaded engine."""
        loads = self._loads()
        number = loads.index(min(loads))
        actor = self.actors[number]
        self._calls[actor.run.remote(works)] = _Call(number, actor, works)

    def finished(self) -> Iterator[tuple[list[Work], Done | None]]:
        """Calls that have ended since, waiting a moment for the first; without a result where the actor died.

        Raises:
            NoteLLMError, OSError: what stopped a chain.
            ModelError: actors keep dying.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=_POLL_SECONDS)
        for reference in ready:
            call = self._calls.pop(reference)
            try:
                done: Done | None = ray.get(reference)
                self.progressed()
            except RayActorError:
                done = None
                self._replace(call)
            except RayTaskError as error:
                raise self._translated(error) from error
            yield call.works, done

    def progressed(self) -> None:
        """Something new got done: deaths before it are forgiven."""
        self._deaths = 0

    def _loads(self) -> list[int]:
        loads = [0] * len(self.actors)
        for call in self._calls.values():
            loads[call.number] += len(call.works)
        return loads

    def _new(self) -> Any:
        import ray

        generation = self.job.generation
        actor = ray.remote(PreferenceEngine).options(
            num_cpus=generation.cpus_per_engine,
            num_gpus=generation.gpus_per_engine,
            max_restarts=0,  # a new actor writes a new log
            max_concurrency=1000,
            runtime_env={"env_vars": engine_environment(generation)},
        )
        return actor.remote(self.job)

    def _wait_for_start(self, starts: list[Any]) -> None:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        try:
            ray.get(starts)
        except RayTaskError as error:
            raise self._translated(error) from error
        except RayActorError as error:
            raise engine_error(error, self.job.facts) from error

    def _replace(self, call: _Call) -> None:
        """A new actor in the place of a dead one, unless an earlier call of the dead one has seen to it."""
        if self.actors[call.number] is not call.actor:
            return
        self._deaths += 1
        if self._deaths > _DEATHS * len(self.actors):
            raise ModelError(
                f"{self.job.facts.model}: engines died {self._deaths} times without finishing a single preference; "
                "their log says why (out of memory: lower generation.max_sequences or preferences.concurrent_calls)"
            )
        log.warning("summarize-preferences: an engine actor died; starting another")
        # It loads its model when its first chains arrive; the other engines are not kept waiting meanwhile.
        self.actors[call.number] = self._new()

    def _translated(self, error: Any) -> Exception:
        cause = getattr(error, "cause", None)
        return cause if isinstance(cause, (NoteLLMError, OSError)) else engine_error(error, self.job.facts)

    def _end(self) -> None:
        import ray

        # An engine's processes outlive an actor that is killed before it could end them, for some seconds.
        stops = [actor.stop.remote() for actor in self.actors]
        with contextlib.suppress(Exception):
            ray.wait(stops, num_returns=len(stops), timeout=20)
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []
