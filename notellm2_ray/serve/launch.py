"""Starting the service on this machine or in the cluster of this job, and stopping it without cutting requests off."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.settings.serve import ServeSettings
from notellm2_ray.serve.doctor import check, examine
from notellm2_ray.serve.haproxy import cluster_environment, serve_environment
from notellm2_ray.serve.keys import read_keys
from notellm2_ray.serve.spec import ServiceSpec

log = logging.getLogger("notellm2_ray")

_SECONDS_BETWEEN_LINES = 5.0


def serve_forever(spec: ServiceSpec, connect: Callable[..., Any]) -> None:
    """Run the service until SIGTERM or Ctrl-C, then let the requests in hand finish.

    Args:
        spec: of the service.
        connect: starts or joins Ray; called after setting the environment variables that Ray reads at its start. Where
            RAY_ADDRESS is set, it is given those that the job's processes in that cluster need.

    Raises:
        ConfigError: keys are needed and there are none, or the port is taken.
        NoteLLMError: the application does not start.
    """
    start(spec, connect)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # not earlier: Ray installs its own handlers at its start
        signal.signal(number, lambda *_: stop.set())
    shown = f"[{spec.serve.host}]" if ":" in spec.serve.host else spec.serve.host
    print(f"page  http://{shown}:{spec.serve.port}/\nAPI   http://{shown}:{spec.serve.port}/v1", flush=True)
    while not stop.wait(1.0):
        pass
    log.info("stopping: requests in hand have %g s to finish", spec.serve.drain_seconds)
    shut_down(spec.serve.name)


def start(spec: ServiceSpec, connect: Callable[..., Any]) -> Any:
    """Start the application; the handle of its ingress."""
    check_safe(spec)
    # Ray's own ports are open to every machine, and anyone who reaches them can run code.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ.get("RAY_ADDRESS"):
        # The cluster's processes run already, without our variables; those that this job starts get them from Ray.
        environment = cluster_environment(spec.serve, spec.directory / "haproxy")
        os.environ.update(environment)
        connect(environment)
        warn_of_running_serve()
    else:
        check_port(spec.serve)
        os.environ.update(serve_environment(spec.serve))
        connect()
        check_gpus(spec.serve)
        check(examine(os.getpid()))
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation

    from notellm2_ray.serve.app import compose

    options = HTTPOptions(host=spec.serve.host, port=spec.serve.port, keep_alive_timeout_s=60)
    serve.start(proxy_location=ProxyLocation.EveryNode, http_options=options)
    with _log_progress(spec.serve.name):
        handle = serve.run(compose(spec), name=spec.serve.name, route_prefix="/")
        wait_ready(spec.serve)
    return handle


@contextmanager
def _log_progress(name: str) -> Iterator[None]:
    """Log every few seconds which deployments are still starting; an engine takes up to a minute."""
    done, started = threading.Event(), time.monotonic()

    def report() -> None:
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

    thread = threading.Thread(target=report, name="start-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def check_safe(spec: ServiceSpec) -> None:
    """Refuse to listen to other machines without API keys.

    Raises:
        ConfigError: keys are needed and there are none.
    """
    if spec.serve.needs_key and not read_keys(spec.keys_file):
        raise ConfigError(
            f"serve.host={spec.serve.host} needs API keys, and {spec.keys_file} holds none: create one with "
            "`notellm2 keys create NAME --scope read --scope write`, or listen at 127.0.0.1"
        )


def check_port(settings: ServeSettings) -> None:
    """Refuse a port that is in use; HAProxy would only say that it could not start.

    Raises:
        ConfigError: the port cannot be bound.
    """
    import socket

    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise ConfigError(
                f"serve.port={settings.port} at {settings.host} cannot be used ({error.strerror}): stop the process "
                "that listens there, or choose another serve.port"
            ) from None


def warn_of_running_serve() -> None:
    """Warn if the cluster runs Ray Serve already: its proxies then keep the environment that they began with."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return
    log.warning(
        "Ray Serve runs in this cluster already and keeps its address, its proxy and its variables. Without those of "
        "`notellm2 haproxy` requests above the capacity are refused late and slowly: set them before Ray starts, or "
        "stop Serve with `serve shutdown` and start again"
    )


def check_gpus(settings: ServeSettings) -> None:
    """Refuse a service that reserves more GPUs than this machine has: Ray would wait for them for ever.

    Raises:
        ConfigError: some deployments find no GPU.
    """
    import ray

    there = int(ray.cluster_resources().get("GPU", 0))
    parts = {"encoder": settings.encoder, "ranker": settings.ranker, "preferences": settings.preferences}
    asked = {name: one.gpus for name, one in parts.items() if one is not None and one.gpus}
    wanted = [gpus for name, gpus in asked.items() if (part := parts[name]) for _ in range(part.replicas)]
    if not fit_on_cards(wanted, there):
        named = ", ".join(f"serve.{name}.gpus={gpus:g}" for name, gpus in asked.items())
        raise ConfigError(
            f"the service reserves more GPUs than the {there} of this machine: {named}. Give each a share, such as "
            "0.4, so that those on one GPU add up to at most 1, or give fewer of them a GPU"
        )


def fit_on_cards(wanted: Iterable[float], cards: int) -> bool:
    """Whether reservations of GPUs find room: a share lies on one card, and whole GPUs on empty ones."""
    free = [1.0] * cards
    for gpus in sorted(wanted, reverse=True):
        number, each = max(1, int(gpus)), min(1.0, gpus)
        found = [card for card, room in enumerate(free) if room + 1e-6 >= each][:number]
        if len(found) < number:
            return False
        for card in found:
            free[card] -= each
    return True


def wait_ready(settings: ServeSettings) -> None:
    """Wait until the service answers over HTTP that it is ready.

    Raises:
        ConfigError: it is not ready in time; the message contains the service's reasons.
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


def shut_down(name: str) -> None:
    """Drain and stop the application ``name``, and Serve with it if it runs no other; then disconnect from Ray."""
    import ray
    from ray import serve

    if serve.status().applications.keys() - {name}:
        serve.delete(name)
    else:
        serve.shutdown()
    ray.shutdown()
