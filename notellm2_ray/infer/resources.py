"""Whether the actors that were asked for fit into the cluster: Ray itself would wait for ever, without an error."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.settings import EmbedSettings

log = logging.getLogger("notellm2_ray")


def check_resources(actors: int, settings: EmbedSettings) -> None:
    """Raise :class:`ConfigError` if ``actors`` never fit; warn if they must wait for what others hold now."""
    import ray
    from ray._private.state import state

    needed = {"CPU": settings.cpus_per_actor, "GPU": settings.gpus_per_actor}
    # A cluster that grows on demand may have nothing yet: there Ray knows how large it can get.
    if state.get_max_resources_from_cluster_config() is None:
        require_fit([node["Resources"] for node in ray.nodes() if node["Alive"]], needed, actors)
    free = ray.available_resources()
    short = [name for name, each in needed.items() if each * actors > free.get(name, 0) + 1e-6]
    if short:
        log.warning("embed-notes: other work holds the cluster's %s; waiting for it where needed", " and ".join(short))


def require_fit(nodes: Sequence[Mapping[str, float]], needed: Mapping[str, float], actors: int) -> None:
    """Raise :class:`ConfigError` unless ``actors``, each within one node, fit on ``nodes``; names what is short."""
    for resource, each in needed.items():
        if not each:
            continue
        fitting = sum(_times(node, {resource: each}) for node in nodes)
        if fitting < actors:
            have = sum(node.get(resource, 0) for node in nodes)
            setting = f"embed.{resource.lower()}s_per_actor"
            raise ConfigError(
                f"{actors} encoder actor(s) with {each:g} {resource}(s) each do not fit into the cluster: its "
                f"{len(nodes)} node(s) have {have:g} {resource}(s), enough for {fitting}. Lower embed.actors or "
                f"{setting}"
                + ("" if resource == "GPU" else ", or raise ray.num_cpus where the cluster is this job's own")
            )
    fitting = sum(_times(node, needed) for node in nodes)
    if fitting < actors:
        raise ConfigError(
            f"{actors} encoder actors do not fit: only {fitting} find {needed['CPU']:g} CPU(s) and {needed['GPU']:g} "
            "GPU(s) on one node. Lower embed.actors, embed.cpus_per_actor or embed.gpus_per_actor"
        )


def _times(node: Mapping[str, float], needed: Mapping[str, float]) -> int:
    """How many actors a node has room for."""
    return int(min(node.get(name, 0) / each + 1e-6 for name, each in needed.items() if each))
