"""Calls from one deployment to another; their failures become errors of the API."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from notellm2_ray.core.errors import DataError, ModelError, NoteLLMError
from notellm2_ray.serve.errors import ApiError, InvalidError, OverloadedError, TookTooLongError, UnavailableError

log = logging.getLogger("notellm2_ray.serve")


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

    async def call(self, method: str, *arguments: Any, seconds: float) -> Any:
        """As :func:`call`, for a method given by its name.

        Raises:
            OverloadedError: the most calls are in hand already.
        """
        if self.in_hand >= self.most:
            raise OverloadedError(f"{self.in_hand} calls to the {self.name} are in hand already: try again soon")
        self.in_hand += 1
        try:
            return await call(getattr(self.handle, method), *arguments, what=self.name, seconds=seconds)
        finally:
            self.in_hand -= 1


async def call(method: Any, *arguments: Any, what: str, seconds: float) -> Any:
    """The result of a method of another deployment's handle.

    Args:
        method: for example ``handle.encode``.
        what: name of the deployment, for messages.
        seconds: the most it may take, including the time in the deployment's queue.

    Raises:
        OverloadedError: the deployment's queue is full.
        TookTooLongError: the call took too long.
        UnavailableError: the deployment is not running, died during the call, or failed on it.
        InvalidError: the deployment refused the data.
    """
    try:
        async with asyncio.timeout(seconds):
            return await method.remote(*arguments)
    except TimeoutError:
        raise TookTooLongError(f"the {what} took longer than {seconds:g} s") from None
    except Exception as error:
        raise translated(error, what) from error


def translated(error: BaseException, what: str) -> ApiError:
    """A call's error as an error of the API, without details that a client must not see."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    cause = getattr(error, "cause", None) or error
    if isinstance(error, BackPressureError):
        return OverloadedError(f"the {what} is busy and its queue is full: try again soon")
    if isinstance(cause, ApiError):
        return cause
    if isinstance(cause, DataError):
        return InvalidError(str(cause))
    if isinstance(cause, ModelError):
        return UnavailableError(str(cause))
    if isinstance(cause, NoteLLMError) or isinstance(error, (RayError, DeploymentUnavailableError)):
        log.warning("%s: %s", what, str(cause).splitlines()[-1] if str(cause) else type(cause).__name__)
        return UnavailableError(f"the {what} is not available at the moment: try again soon")
    log.error("the %s failed: %s", what, type(cause).__name__, exc_info=error)
    return UnavailableError(f"the {what} failed on this request; its log says why")
