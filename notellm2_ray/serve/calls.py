"""Calls from one deployment to another; their failures become errors of the API."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, NamedTuple

from notellm2_ray.core.errors import DataError, ModelError, NoteLLMError
from notellm2_ray.serve.errors import ApiError, InvalidError, OverloadedError, TookTooLongError, UnavailableError

# Below Serve's own logger, which writes a replica's log: at once for an error, else a thousand lines later. Lines of
# other loggers reach that log through stderr, as mere information, and would be lost with a killed replica.
log = logging.getLogger("ray.serve.notellm2")

_LOG_SAYS_WHY = "its log says why"


class Outage:
    """Failed calls to a deployment: the first is logged with its cause, the others are counted.

    At 20 requests a second a dead engine would otherwise fill the log with one and the same cause.

    Args:
        name: of the deployment.
    """

    def __init__(self, name: str) -> None:
        self.name, self.count, self.cause, self.began = name, 0, "", 0.0
        self._failing: set[str] = set()  # methods whose last call failed

    def failed(self, method: str, cause: str, error: BaseException | None = None) -> None:
        """Count a failed call; ``error``: its traceback is logged as well."""
        if not self._failing:
            self.count, self.cause, self.began = 0, cause, time.monotonic()
            log.error("the %s failed (%s); further failures are counted", self.name, cause, exc_info=error)
        self._failing.add(method)
        self.count += 1

    def answered(self, method: str) -> None:
        """A call succeeded: when no method fails any more, log how many calls had failed."""
        if method in self._failing:
            self._failing.discard(method)
            if not self._failing:
                seconds = time.monotonic() - self.began
                log.error(
                    "the %s answers again; %d calls failed in %.0f s (%s)", self.name, self.count, seconds, self.cause
                )


class Failed(NamedTuple):
    """The answer of a replica whose engine failed. Serve would log each raised error with its traceback."""

    cause: str


class EngineCalls:
    """A replica's calls of its engine; a failure is logged once and returned as :class:`Failed`.

    Args:
        engine: of ``online.engines``; its own ``engine``, if it has one, is vLLM's.
        name: for messages.
    """

    def __init__(self, engine: Any, name: str) -> None:
        self.engine, self.outage = engine, Outage(name)

    async def __call__(self, method: str, *arguments: Any, **named: Any) -> Any:
        """The result of a method of the engine, or Failed."""
        try:
            result = await getattr(self.engine, method)(*arguments, **named)
        except Exception as error:  # any kind: the replica goes on, and Serve replaces it if its health check fails
            self.outage.failed(method, first_line(error), error)
            return Failed(first_line(error))
        self.outage.answered(method)
        return result

    async def check_health(self) -> None:
        """Raises if the engine has ended, as vLLM's check does; the cause is logged even if no call has failed yet."""
        check = getattr(getattr(self.engine, "engine", None), "check_health", None)
        if check is None:
            return
        try:
            await check()
        except Exception as error:  # any kind of vLLM's
            self.outage.failed("check_health", first_line(error), error)
            raise
        self.outage.answered("check_health")

    async def describe(self, **facts: Any) -> dict[str, Any] | Failed:
        """Facts about the replica, which show that it runs; Failed if its engine does not."""
        try:
            await self.check_health()
        except Exception as error:  # any kind of vLLM's
            return Failed(first_line(error))
        return facts


def first_line(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


class Dependency:
    """Another deployment, with a bound on the calls to it in hand.

    While a deployment restarts, each call to it waits until its time is up. Without a bound such calls would fill the
    gateway, which would then refuse requests that do not even need that deployment.

    Args:
        handle: of the deployment.
        name: for messages.
        most: calls in hand at once; further ones are refused immediately.
    """

    def __init__(self, handle: Any, name: str, most: int) -> None:
        self.handle, self.name, self.most, self.in_hand = handle, name, most, 0
        self.outage = Outage(name)

    async def call(self, method: str, *arguments: Any, seconds: float) -> Any:
        """As :meth:`ask`, but bounded.

        Raises:
            OverloadedError: the most calls are in hand already.
        """
        if self.in_hand >= self.most:
            raise OverloadedError(f"{self.in_hand} calls to the {self.name} are in hand already: try again soon")
        self.in_hand += 1
        try:
            return await self.ask(method, *arguments, seconds=seconds)
        finally:
            self.in_hand -= 1

    async def ask(self, method: str, *arguments: Any, seconds: float) -> Any:
        """The result of a method of the deployment.

        Args:
            method: its name.
            seconds: the most it may take, including the time in the deployment's queue.

        Raises:
            OverloadedError: the deployment's queue is full.
            TookTooLongError: the call took too long.
            UnavailableError: the deployment is not running, died during the call, or failed on it.
            InvalidError: the deployment refused the data.
        """
        try:
            async with asyncio.timeout(seconds):
                result = await getattr(self.handle, method).remote(*arguments)
        except TimeoutError:
            raise TookTooLongError(f"the {self.name} took longer than {seconds:g} s") from None
        except Exception as error:
            raise self._translated(method, error) from error
        if isinstance(result, Failed):
            self.outage.failed(method, result.cause)
            raise UnavailableError(f"the {self.name} failed on this request; {_LOG_SAYS_WHY}")
        self.outage.answered(method)
        return result

    def _translated(self, method: str, error: Exception) -> ApiError:
        """A call's error as an error of the API; what a client must not see goes to the log."""
        told, cause = translated(error, self.name)
        if isinstance(told, UnavailableError):
            self.outage.failed(method, first_line(cause), cause if told.message.endswith(_LOG_SAYS_WHY) else None)
        return told


def translated(error: BaseException, what: str) -> tuple[ApiError, BaseException]:
    """A call's error as an error of the API, without details that a client must not see; and what caused it."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    cause = getattr(error, "cause", None) or error
    if isinstance(error, BackPressureError):
        return OverloadedError(f"the {what} is busy and its queue is full: try again soon"), cause
    if isinstance(cause, ApiError):
        return cause, cause
    if isinstance(cause, DataError):
        return InvalidError(str(cause)), cause
    if isinstance(cause, ModelError):
        return UnavailableError(str(cause)), cause
    if isinstance(cause, NoteLLMError) or isinstance(error, (RayError, DeploymentUnavailableError)):
        return UnavailableError(f"the {what} is not available at the moment: try again soon"), cause
    return UnavailableError(f"the {what} failed on this request; {_LOG_SAYS_WHY}"), cause
