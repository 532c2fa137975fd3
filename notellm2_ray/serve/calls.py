"""Calls between deployments, with their failures as errors of the API."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from notellm2_ray.core.errors import DataError, ModelError, NoteLLMError
from notellm2_ray.serve.errors import ApiError, InvalidError, OverloadedError, TookTooLongError, UnavailableError

log = logging.getLogger("notellm2_ray.serve")


class Dependency:
    """Another deployment, and how many calls to it are in hand.

    While a deployment restarts, calls to it wait for their whole time. Without a bound they would fill the gateway's
    slots, and requests that do not need it would be refused.

    Args:
        handle: of the deployment.
        name: for messages.
        most: calls in hand at once; one more is refused at once.
    """

    def __init__(self, handle: Any, name: str, most: int) -> None:
        self.handle, self.name, self.most, self.in_hand = handle, name, most, 0

    async def call(self, method: str, *arguments: Any, seconds: float) -> Any:
        """As :func:`call`, of a method by name.

        Raises:
            OverloadedError: as many calls as there may be are in hand.
        """
        if self.in_hand >= self.most:
            raise OverloadedError(f"{self.in_hand} calls of the {self.name} are in hand already: try again soon")
        self.in_hand += 1
        try:
            return await call(getattr(self.handle, method), *arguments, what=self.name, seconds=seconds)
        finally:
            self.in_hand -= 1


async def call(method: Any, *arguments: Any, what: str, seconds: float) -> Any:
    """The result of a method of another deployment's handle.

    Args:
        method: as ``handle.encode``.
        what: the deployment, for messages.
        seconds: time that it may take, waiting in its queue included.

    Raises:
        OverloadedError: its queue is full.
        TookTooLongError: it took too long.
        UnavailableError: it is not there, died with the call, or failed on it.
        InvalidError: it found the data wrong.
    """
    try:
        async with asyncio.timeout(seconds):
            return await method.remote(*arguments)
    except TimeoutError:
        raise TookTooLongError(f"the {what} took longer than {seconds:g} s") from None
    except Exception as error:
        raise translated(error, what) from error


def translated(error: BaseException, what: str) -> ApiError:
    """An error of a call, as its caller's caller may see it."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    cause = getattr(error, "cause", None) or error
    if isinstance(error, BackPressureError):
        return OverloadedError(f"the {what} has as much to do as it takes: try again soon")
    if isinstance(cause, ApiError):
        return cause
    if isinstance(cause, DataError):
        return InvalidError(str(cause))
    if isinstance(cause, ModelError):
        return UnavailableError(str(cause))
    if isinstance(cause, NoteLLMError) or isinstance(error, (RayError, DeploymentUnavailableError)):
        log.warning("%s: %s", what, str(cause).splitlines()[-1] if str(cause) else type(cause).__name__)
        return UnavailableError(f"the {what} is not there for the moment: try again soon")
    log.error("the %s failed: %s", what, type(cause).__name__, exc_info=error)
    return UnavailableError(f"the {what} failed on this request; its log says why")
