"""Checks that the requested actors fit into the cluster: Ray itself would wait for ever, without an error.

A cluster that this process has started is as large as it will ever be. Any other may grow on demand: actors that find
no room are the demand, and a stage begins with the first that is placed. Ray's open-source autoscaler reports nowhere
how large a cluster can become (``state.get_max_resources_from_cluster_config()`` is None): nothing is refused there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from notellm2_ray.core.cluster import started_here
from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.room import places
from notellm2_ray.core.settings import EmbedSettings, GenerationSettings

log = logging.getLogger("notellm2_ray")


class Names(NamedTuple):
    """The names of a stage's settings, for messages."""

    stage: str
    actor: str
    number: str
    cpus: str
    gpus: str


_ENCODERS = Names("embed-notes", "encoder", "embed.actors", "embed.cpus_per_actor", "embed.gpus_per_actor")


def check_resources(actors: int, settings: EmbedSettings) -> None:
    """Raise :class:`ConfigError` if ``actors`` can never fit; warn if they do not fit now."""
    _check(actors, {"CPU": settings.cpus_per_actor, "GPU": settings.gpus_per_actor}, _ENCODERS)


def check_readers(readers: int, actors: int, settings: EmbedSettings) -> None:
    """Raise :class:`ConfigError` if ``readers`` beside ``actors`` can never fit."""
    import ray

    total, needed = ray.cluster_resources().get("CPU", 0), readers + actors * settings.cpus_per_actor
    if readers and needed > total + 1e-6 and started_here():
        raise ConfigError(
            f"{readers} readers with one CPU, beside {actors} encoder actor(s) with {settings.cpus_per_actor:g} each, "
            f"do not fit into the cluster's {total:g} CPU(s). Lower embed.readers (0: the actors read), or raise "
            "ray.num_cpus if the cluster is started by this job"
        )


def check_engines(stage: str, settings: GenerationSettings, beside: float = 0.0) -> None:
    """The same for the engines of a stage that generates text and needs ``beside`` CPUs for its other actors."""
    names = Names(stage, "engine", "generation.engines", "generation.cpus_per_engine", "generation.gpus_per_engine")
    _check(settings.engines, {"CPU": settings.cpus_per_engine, "GPU": settings.gpus_per_engine}, names, beside)


def _check(actors: int, needed: Mapping[str, float], names: Names, beside: float = 0.0) -> None:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    try:
        require_fit(nodes, needed, actors, names)
        require_cpus_beside(nodes, needed["CPU"], actors, names, beside)
    except ConfigError as error:
        if started_here():
            raise
        log.warning("%s: %s. Waiting for the cluster to grow; work begins with the first one", names.stage, error)
        return
    free = ray.available_resources()
    short = [name for name, each in needed.items() if each * actors > free.get(name, 0) + 1e-6]
    if short:
        held = " and ".join(short)
        log.warning("%s: other work holds the cluster's %s; actors wait until it is free", names.stage, held)


def require_cpus_beside(
    nodes: Sequence[Mapping[str, float]], each: float, actors: int, names: Names, beside: float
) -> None:
    """Raise :class:`ConfigError` unless ``beside`` CPUs are left beside the actors for whatever feeds them."""
    total = sum(node.get("CPU", 0) for node in nodes)
    if beside and actors * each + beside > total + 1e-6:
        raise ConfigError(
            f"{names.stage}: {actors} {names.actor}(s) with {each:g} CPU(s) each leave less than the {beside:g} CPU(s) "
            f"that reading needs; the cluster has {total:g}. Lower {names.cpus} or {names.number}, or raise "
            "ray.num_cpus if the cluster is started by this job"
        )


def require_fit(
    nodes: Sequence[Mapping[str, float]], needed: Mapping[str, float], actors: int, names: Names = _ENCODERS
) -> None:
    """Raise :class:`ConfigError` that names what is short, unless each of ``actors`` fits within one of ``nodes``."""
    for resource, each in needed.items():
        if not each:
            continue
        fitting = places(nodes, {resource: each})
        if fitting < actors:
            have = sum(node.get(resource, 0) for node in nodes)
            setting = names.gpus if resource == "GPU" else names.cpus
            raise ConfigError(
                f"{actors} {names.actor} actor(s) with {each:g} {resource}(s) each do not fit into the cluster: its "
                f"{len(nodes)} node(s) have {have:g} {resource}(s), enough for {fitting}. Lower {names.number} or "
                f"{setting}"
                + ("" if resource == "GPU" else ", or raise ray.num_cpus if the cluster is started by this job")
            )
    fitting = places(nodes, needed)
    if fitting < actors:
        raise ConfigError(
            f"{actors} {names.actor} actors do not fit: only {fitting} find {needed['CPU']:g} CPU(s) and "
            f"{needed['GPU']:g} GPU(s) on one node. Lower {names.number}, {names.cpus} or {names.gpus}"
        )
