"""Whether a gateway can answer: what it last heard of the other deployments, and of its own index.

Each gateway has handles of its own, and HAProxy gives the next request to any of them. The service is therefore ready
only when all gateways say so.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from notellm2_ray.serve.calls import Dependency
from notellm2_ray.serve.errors import ApiError, OverloadedError

log = logging.getLogger("notellm2_ray.serve")

_EXCHANGE_SECONDS = 2.0
_ASK_SECONDS = 5.0  # for another deployment's answer about itself
_PEERS_SECONDS = 12.0  # more than two rounds of questions to the other deployments may take
_READY_SECONDS = 0.25  # how long the answer that this replica is ready stays valid


class Status(NamedTuple):
    """What is not available, each with its reason: ``NAME: why``."""

    problems: list[str]  # of parts that requests need
    missing: list[str]  # of parts that they can do without


class Readiness:
    """What one gateway knows of the deployments that it depends on.

    Attributes:
        problems: why this replica is not ready.
        missing: what is not available but not needed either.
        reports: the last report of every replica, by name.
        writing_model: fingerprint of the writer's model, as last reported; "": the same as the index's.
        peers: handle of all gateways, this one included.
    """

    def __init__(
        self,
        name: str,
        follower: Any,
        encoder: Dependency,
        writer: Dependency,
        users: Dependency,
        optional: Sequence[Dependency],
        report: Callable[[], dict[str, Any]],
        peers: Any,
    ) -> None:
        """Nothing is asked yet.

        Args:
            name: of this gateway.
            follower: of the live table, with the current index.
            optional: deployments without which requests are still answered.
            report: this gateway's report, which the writer collects.
        """
        self.name, self.follower, self.report, self.peers = name, follower, report, peers
        self.encoder, self.writer, self.users, self.optional = encoder, writer, users, optional
        self.reports: dict[str, dict[str, Any]] = {}
        self.writing_model = ""
        self.problems = ["the other deployments have not been asked yet"]
        self.missing: list[str] = []
        self._asking = asyncio.Lock()
        self._asked = float("-inf")  # when the other deployments were last asked
        self._last_problems: dict[str, list[str]] = {}  # of each deployment, when it last answered or failed

    async def problems_now(self) -> list[str]:
        """Why this replica is not ready at the moment.

        If there was no problem at the last exchange, the other deployments are asked again, because one may have died
        since, and the next requests would wait for it in vain. Simultaneous callers share one such round.
        """
        if not self.problems:
            await self.ask_needed(not_before=time.monotonic() - _READY_SECONDS)
        return self.problems

    async def status(self) -> Status:
        """What this replica misses at the moment."""
        problems = await self.problems_now()
        if not self.missing:  # one that was missing is asked by the exchange alone: that may take until it is back
            await self._ask_optional()
        return Status(problems, self.missing)

    async def status_of_all(self) -> Status:
        """What any of the gateways misses, since any of them may get the next request.

        Each has handles of its own, and learns later or earlier than others that a replica was replaced.
        """
        try:
            answers = self.peers.broadcast("status").results_async(timeout_s=_PEERS_SECONDS)
            found = await asyncio.gather(self.status(), answers)
        except Exception as error:  # any kind: a gateway that does not answer would not answer a request either
            log.info("a gateway does not answer: %s", type(error).__name__)
            return Status([*self.problems, "gateway: one of its replicas does not answer"], self.missing)
        statuses = [found[0], *found[1]]
        merged = [list(dict.fromkeys(one for status in statuses for one in status[part])) for part in range(2)]
        return Status(*merged)

    def lacks(self, name: str) -> bool:
        """Whether a part is known to be away, so that a request need not wait for it."""
        return any(one.startswith(f"{name}:") for one in self.missing)

    async def exchange_forever(self) -> None:
        """Ask the other deployments every few seconds, and more often while one is away."""
        while True:
            await asyncio.gather(self.ask_needed(), self._ask_optional())
            await asyncio.sleep(0.5 if self.problems or self.missing else _EXCHANGE_SECONDS)

    async def ask_needed(self, not_before: float = float("inf")) -> None:
        """Update ``problems``, unless the other deployments were asked after ``not_before``."""
        async with self._asking:
            if self._asked < not_before:
                began = time.monotonic()
                self.problems = await self._find_problems()
                self._asked = began

    async def _ask_optional(self) -> None:
        """Update ``missing``: without the ranker, answers come from recall and say so."""
        asked = await asyncio.gather(*(self._ask(one, "describe") for one in self.optional))
        self.missing = [problem for _, problems in asked for problem in problems]

    async def _find_problems(self) -> list[str]:
        """Exchange reports with the writer and ask the other required deployments; why this replica is not ready."""
        needed = self.follower.index.model_fingerprint
        (reports, problems), (described, away), (_, without_users) = await asyncio.gather(
            self._ask(self.writer, "exchange", self.name, self.report()),
            self._ask(self.encoder, "describe", needed),
            self._ask(self.users, "describe"),
        )
        self.reports = reports or self.reports
        written = self.reports.get("writer", {}).get("state", {})
        self.writing_model = written.get("model_fingerprint", self.writing_model)
        problems += away + without_users
        if self.follower.problem is not None:
            problems.append(f"index: {self.follower.problem}")
        there = [] if described is None else [one["fingerprint"] for one in described["models"]]
        if described is not None and needed not in there:
            problems.append(
                f"encoder: it runs {' and '.join(there)}, but the index was made with {needed}: if the embedder was "
                "trained again, run `notellm2 swap-embedder`"
            )
        return problems

    async def _ask(self, other: Dependency, method: str, *arguments: Any) -> tuple[Any, list[str]]:
        """The answer or None, and the problem if there is one.

        If the deployment's queue is full, nothing has changed since it last answered: a running one is busy, and calls
        to a dead one queue up.
        """
        answer, problems = None, []
        try:
            # Without Dependency.call's bound: a deployment with many calls in hand is running.
            answer = await other.ask(method, *arguments, seconds=_ASK_SECONDS)
        except OverloadedError:
            return None, self._last_problems.get(other.name, [])
        except Exception as error:  # any kind: this replica is not ready and reports the reason
            problems = [f"{other.name}: {error.message if isinstance(error, ApiError) else error}"]
        self._last_problems[other.name] = problems
        return answer, problems
