"""Starting the service on this machine or in the cluster that this process was submitted to, and stopping it softly."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.settings.serve import ServeSettings
from notellm2_ray.serve.doctor import check, examine
from notellm2_ray.serve.haproxy import serve_environment
from notellm2_ray.serve.keys import read_keys
from notellm2_ray.serve.plan import Plan

log = logging.getLogger("notellm2_ray")

_SECONDS_BETWEEN_LINES = 5.0


def serve_forever(plan: Plan, connect: Callable[[], Any]) -> None:
    """Run the application until SIGTERM or Ctrl-C, then let the requests in hand finish.

    Args:
        plan: the application.
        connect: starts or joins Ray; called after the environment is set, which Ray reads as it starts.

    Raises:
        ConfigError: keys are needed and there are none, or the port is taken.
        NoteLLMError: the application does not come up.
    """
    start(plan, connect)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # not before: Ray puts its own in place as it starts
        signal.signal(number, lambda *_: stop.set())
    shown = f"[{plan.serve.host}]" if ":" in plan.serve.host else plan.serve.host
    print(f"page  http://{shown}:{plan.serve.port}/\nAPI   http://{shown}:{plan.serve.port}/v1", flush=True)
    while not stop.wait(1.0):
        pass
    log.info("stopping: requests in hand have %g s", plan.serve.drain_seconds)
    shut_down()


def start(plan: Plan, connect: Callable[[], Any]) -> Any:
    """Bring the application up; the handle of its ingress."""
    check_safe(plan)
    check_port(plan.serve)
    os.environ.update(serve_environment(plan.serve))
    # Ray's own ports run code for whoever reaches them, and they listen to every machine.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    connect()
    if not os.environ.get("RAY_ADDRESS"):
        check(examine(os.getpid()))
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation

    from notellm2_ray.serve.app import compose

    options = HTTPOptions(host=plan.serve.host, port=plan.serve.port, keep_alive_timeout_s=60)
    serve.start(proxy_location=ProxyLocation.EveryNode, http_options=options)
    with _saying_how_far(plan.serve.name):
        handle = serve.run(compose(plan), name=plan.serve.name, route_prefix="/")
        wait_ready(plan.serve)
    return handle


@contextmanager
def _saying_how_far(name: str) -> Iterator[None]:
    """Log every few seconds which deployments are still starting: an engine takes up to a minute."""
    done, started = threading.Event(), time.monotonic()

    def say() -> None:
        from ray import serve

        while not done.wait(_SECONDS_BETWEEN_LINES):
            application = serve.status().applications.get(name)
            states = {} if application is None else {key: one.status for key, one in application.deployments.items()}
            waiting = [key for key, status in states.items() if status != "HEALTHY"]
            up = len(states) - len(waiting)
            log.info(
                "starting (%.0f s): %d of %d deployments up%s",
                time.monotonic() - started,
                up,
                len(states),
                f", waiting for {', '.join(waiting)}" if waiting else "",
            )

    thread = threading.Thread(target=say, name="how-far", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def check_safe(plan: Plan) -> None:
    """Refuse to listen to others without keys.

    Raises:
        ConfigError: keys are needed and there are none.
    """
    if plan.serve.needs_key and not read_keys(plan.keys_file):
        raise ConfigError(
            f"serve.host={plan.serve.host} with keys needed, and {plan.keys_file} holds none: make one with "
            "`notellm2 keys create NAME --scope read --scope write`, or listen at 127.0.0.1"
        )


def check_port(settings: ServeSettings) -> None:
    """Refuse a port that somebody has: HAProxy would only say that it could not start.

    Raises:
        ConfigError: it is taken.
    """
    import socket

    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise ConfigError(
                f"serve.port={settings.port} at {settings.host} cannot be had ({error.strerror}): stop what listens "
                "there or choose another serve.port"
            ) from None


def wait_ready(settings: ServeSettings) -> None:
    """Wait until the service answers over HTTP that it is ready.

    Raises:
        ConfigError: it does not in time; with its reasons.
    """
    import httpx

    host = settings.host if not settings.host.startswith(("0.0.0.0", "::")) else "127.0.0.1"
    shown = f"[{host}]" if ":" in host else host
    until, reason = time.monotonic() + settings.ready_seconds, "no answer"
    while time.monotonic() < until:
        try:
            answer = httpx.get(f"http://{shown}:{settings.port}/v1/ready", timeout=10, trust_env=False)
            if answer.status_code == 200:
                return
            reason = answer.text[:500]
        except httpx.HTTPError as error:
            reason = type(error).__name__
        time.sleep(0.2)
    raise ConfigError(f"the service was not ready within serve.ready_seconds={settings.ready_seconds:g}: {reason}")


def shut_down() -> None:
    """Drain and stop the application and its proxies, and leave Ray."""
    import ray
    from ray import serve

    serve.shutdown()
    ray.shutdown()
