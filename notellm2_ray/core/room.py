"""Whether a cluster has room for all workers of a job. Ray itself would wait for ever, without an error."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from notellm2_ray.core.errors import ConfigError

log = logging.getLogger("notellm2_ray")

_POLL_SECONDS = 5.0


def places(nodes: Sequence[Mapping[str, float]], needed: Mapping[str, float]) -> int:
    """How many workers find room, each of them within one node.

    Args:
        nodes: resources of each node, as {"CPU": 8, "GPU": 1}.
        needed: resources of one worker, at least one of them above 0.
    """
    return sum(min(_fitting(name, node.get(name, 0), each) for name, each in needed.items() if each) for node in nodes)


def _fitting(resource: str, there: float, each: float) -> int:
    if resource == "GPU" and each < 1:  # two shares of 0.6 need two GPUs
        return int(there) * int(1 / each + 1e-6)
    return int(there / each + 1e-6)


def require_room(
    needed: Mapping[str, float], count: int, what: str, remedy: str, *, embedded: bool, wait_minutes: float
) -> None:
    """Return once every worker has room. Ray must be connected.

    A cluster that other processes started may grow: nodes may still be starting, or an autoscaler may add them. Ray
    does not tell whether there is one, so nodes are asked for and waited for.

    Args:
        needed: resources of one worker.
        count: number of workers.
        what: the workers and their settings, to begin the message with.
        remedy: which settings to change.
        embedded: whether this process started the cluster, which then cannot grow.
        wait_minutes: how long to wait for further nodes.

    Raises:
        ConfigError: there is not enough room.
    """
    if count <= places(nodes := _nodes(), needed):
        return
    if not embedded and wait_minutes > 0:
        log.warning("%s; %s. Asking for more nodes, for %g minutes", what, _room(nodes, needed), wait_minutes)
        if _grown(needed, count, wait_minutes):
            return
        what = f"after {wait_minutes:g} minutes of waiting: {what}"
    raise ConfigError(f"{what}; {_room(_nodes(), needed)}. {remedy}")


def _grown(needed: Mapping[str, float], count: int, minutes: float) -> bool:
    """Ask the autoscaler, if there is one, for room, and wait for it."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[{name: each for name, each in needed.items() if each}] * count)
    try:
        end = time.monotonic() + 60 * minutes
        while (found := places(_nodes(), needed)) < count and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        return found >= count
    finally:
        request_resources(bundles=[])  # the workers hold their nodes from here on, if they start


def _nodes() -> list[Mapping[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _room(nodes: Sequence[Mapping[str, float]], needed: Mapping[str, float]) -> str:
    have = " and ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}s" for name in needed)
    return f"the cluster's {len(nodes)} node(s) have {have}, room for {places(nodes, needed)}"
