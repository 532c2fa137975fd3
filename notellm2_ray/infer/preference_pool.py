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
    """A pool of ``generation.engines`` actors, as a context manager: entering waits for the first, leaving ends all.

    The others join when they are ready: in a cluster that grows, their nodes may come much later, or never.
    """

    def __init__(self, job: PreferenceJob) -> None:
        self.job = job
        self.actors: list[Any] = []
        self._starting: dict[Any, int] = {}  # number of the actor by the reference to its start
        self._ready: set[int] = set()
        self._calls: dict[Any, _Call] = {}
        self._deaths = 0
        # One extra call keeps an actor busy when a call ends; more would only queue.
        self._most = job.settings.concurrent_calls + _CHAINS_PER_CALL

    def __enter__(self) -> EnginePool:
        import ray

        try:
            for number in range(self.job.generation.engines):
                self.actors.append(self._new())
                self._start(number)
            while not self._ready:
                for reference in ray.wait(list(self._starting), num_returns=1, timeout=_POLL_SECONDS)[0]:
                    self._started(reference, first=True)
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
        loads = self._loads()
        return min(_CHAINS_PER_CALL, self._most - min(loads.values())) if loads else 0

    def submit(self, pending: list[PendingChain]) -> None:
        """Hand chains to the least loaded engine."""
        loads = self._loads()
        number = min(loads, key=loads.__getitem__)
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

        ready, _ = ray.wait([*self._calls, *self._starting], num_returns=1, timeout=_POLL_SECONDS)
        for reference in ready:
            if reference in self._starting:
                self._started(reference)
                continue
            call = self._calls.pop(reference)
            try:
                done: ChainCounts | None = ray.get(reference)
                self.progressed()
            except RayActorError:
                done = None
                self._replace(call.number, call.actor)
            except RayTaskError as error:
                raise self._translated(error) from error
            yield call.pending, done

    def progressed(self) -> None:
        """Something new was finished: earlier deaths no longer count."""
        self._deaths = 0

    def _loads(self) -> dict[int, int]:
        """Chains in hand of each engine that is ready, by its number."""
        loads = dict.fromkeys(sorted(self._ready), 0)
        for call in self._calls.values():
            if call.number in loads:
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

    def _start(self, number: int) -> None:
        self._starting[self.actors[number].start.remote()] = number

    def _started(self, reference: Any, first: bool = False) -> None:
        """A start has ended; ``first``: no engine has ever been ready, so that a death is the model's fault."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        number = self._starting.pop(reference)
        try:
            ray.get(reference)
            self._ready.add(number)
        except RayTaskError as error:
            raise self._translated(error) from error
        except RayActorError as error:
            if first:
                raise engine_error(error, self.job.facts) from error
            self._replace(number, self.actors[number])

    def _replace(self, number: int, actor: Any) -> None:
        """Replace a dead actor, unless an earlier failed call has already replaced it."""
        if self.actors[number] is not actor:
            return
        self._deaths += 1
        if self._deaths > _DEATHS * len(self.actors):
            raise ModelError(
                f"{self.job.facts.model}: engines died {self._deaths} times without finishing a single preference; "
                "their log says why (if memory ran out, lower generation.max_sequences or preferences.concurrent_calls)"
            )
        log.warning("summarize-preferences: an engine actor died; starting another")
        self._ready.discard(number)
        self.actors[number] = self._new()
        self._start(number)

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
