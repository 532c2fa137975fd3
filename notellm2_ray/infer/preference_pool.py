"""The pool of engine actors that make preferences: it hands chains to them and replaces the ones that die."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

from notellm2_ray.core.errors import ModelError, NoteLLMError
from notellm2_ray.infer.engine import engine_environment, engine_error
from notellm2_ray.infer.preference_worker import ChainCounts, PendingChain, PreferenceEngine, PreferenceJob

log = logging.getLogger("notellm2_ray")

_CHAINS_PER_CALL = 8  # of an actor; they are about equally long, so that none waits long for another
_DEATHS = 3  # for each actor: how many may die in succession without a single new step
_POLL_SECONDS = 1.0


class _Call(NamedTuple):
    number: int  # of the actor
    actor: Any
    pending: list[PendingChain]


class EnginePool:
    """A pool of ``generation.engines`` actors, as a context manager: entering loads the models, leaving ends them."""

    def __init__(self, job: PreferenceJob) -> None:
        self.job = job
        self.actors: list[Any] = []
        self._calls: dict[Any, _Call] = {}
        self._deaths = 0
        # One extra call keeps an actor busy when a call ends; more would only queue.
        self._most = job.settings.concurrent_calls + _CHAINS_PER_CALL

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
        """How many chains the least loaded engine can take in one call."""
        return min(_CHAINS_PER_CALL, self._most - min(self._loads()))

    def submit(self, pending: list[PendingChain]) -> None:
        """Hand chains to the least loaded engine."""
        loads = self._loads()
        number = loads.index(min(loads))
        actor = self.actors[number]
        self._calls[actor.run.remote(pending)] = _Call(number, actor, pending)

    def finished(self) -> Iterator[tuple[list[PendingChain], ChainCounts | None]]:
        """Wait a moment for calls to end; yields the chains of each, with their counts or None if the actor died.

        Raises:
            NoteLLMError, OSError: the error that stopped a chain.
            ModelError: actors keep dying.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=_POLL_SECONDS)
        for reference in ready:
            call = self._calls.pop(reference)
            try:
                done: ChainCounts | None = ray.get(reference)
                self.progressed()
            except RayActorError:
                done = None
                self._replace(call)
            except RayTaskError as error:
                raise self._translated(error) from error
            yield call.pending, done

    def progressed(self) -> None:
        """Something new was finished: earlier deaths no longer count."""
        self._deaths = 0

    def _loads(self) -> list[int]:
        loads = [0] * len(self.actors)
        for call in self._calls.values():
            loads[call.number] += len(call.pending)
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
        """Replace a dead actor, unless an earlier failed call has already replaced it."""
        if self.actors[call.number] is not call.actor:
            return
        self._deaths += 1
        if self._deaths > _DEATHS * len(self.actors):
            raise ModelError(
                f"{self.job.facts.model}: engines died {self._deaths} times without finishing a single preference; "
                "their log says why (if memory ran out, lower generation.max_sequences or preferences.concurrent_calls)"
            )
        log.warning("summarize-preferences: an engine actor died; starting another")
        # It loads its model when its first chains arrive, so that the other engines need not wait.
        self.actors[call.number] = self._new()

    def _translated(self, error: Any) -> Exception:
        cause = getattr(error, "cause", None)
        return cause if isinstance(cause, (NoteLLMError, OSError)) else engine_error(error, self.job.facts)

    def _end(self) -> None:
        import ray

        # An actor that is killed at once leaves its engine's processes running for some seconds.
        stops = [actor.stop.remote() for actor in self.actors]
        with contextlib.suppress(Exception):
            ray.wait(stops, num_returns=len(stops), timeout=20)
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []
