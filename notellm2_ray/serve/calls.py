"""Calls between deployments, with their failures as errors of the API."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from notellm2_ray.core.errors import DataError, ModelError, NoteLLMError
from notellm2_ray.serve.errors import ApiError, InvalidError, OverloadedError, TookTooLongError, UnavailableError

log = logging.getLogger("notellm2_ray.serve")


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
    except ApiError:
        raise
    except Exception as error:
        raise translated(error, what) from error


def translated(error: BaseException, what: str) -> ApiError:
    """An error of a call, as its caller's caller may see it."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

    cause = getattr(error, "cause", None) or error
    if isinstance(error, BackPressureError):
        return OverloadedError(f"the {what} has as much to do as it takes: try again soon")
    if isinstance(cause, DataError):
        return InvalidError(str(cause))
    if isinstance(cause, ModelError):
        return UnavailableError(str(cause))
    if isinstance(cause, NoteLLMError) or isinstance(error, (RayError, DeploymentUnavailableError)):
        log.warning("%s: %s", what, str(cause).splitlines()[-1] if str(cause) else type(cause).__name__)
        return UnavailableError(f"the {what} is not there for the moment: try again soon")
    log.error("the %s failed: %s", what, type(cause).__name__, exc_info=error)
    return UnavailableError(f"the {what} failed on this request; its log says why")
