"""The specification of a service: paths and settings as plain values, which every deployment is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from notellm2_ray.core.history_blocks import DEFAULT_RULE, BlockRule
from notellm2_ray.core.settings.ranking import RankerSettings
from notellm2_ray.core.settings.retrieval import IndexSettings
from notellm2_ray.core.settings.serve import DeploymentSettings, ServeSettings

# Serve's default back-off of up to half a second leaves a busy deployment mostly idle: at twice its capacity of 100
# requests a second it answered 10 a second, and 85 with this back-off.
_BACKOFF = {"initial_backoff_s": 0.005, "max_backoff_s": 0.01}


@dataclass(frozen=True)
class ServiceSpec:
    """What a service consists of.

    Attributes:
        directory: serving directory with live table, users and keys, on storage that all replicas share.
        model: directory of the embedder, unless ``directory`` names another (:mod:`~notellm2_ray.live.current`).
        notes: prepared notes, for the first start.
        embeddings: their bulk vectors, for the first start.
        serve, index, ranker: settings.
        precision: that ``embeddings`` were computed in, and notes are embedded in; ``auto``: whichever gives the model
            the fingerprint that the served table names.
        dimensions: length to which both are cut; None: they are whole.
        seed: of the index and of sampling.
        block_rule: where the blocks of a user's history end.
        actions: events that put a note into a user's history.
        events: prepared events, for the first start without ``sequences`` and ``preferences``.
        saved_index: directory of a built index, used by the first load if it fits the table.
        sequences, preferences, summaries: outputs of the recommender's bulk jobs, for the first start and as inputs of
            preferences; None for jobs that have not run.
        preference_engine: makes an object with ``async advance(previous, items, *, user, block)`` (see
            :mod:`~notellm2_ray.serve.deployments.preferences`); None: no preferences are written.
        ranker_engine: makes an object with ``async score(...)`` (see
            :mod:`~notellm2_ray.serve.deployments.ranker`); None: no ranker.
        environments: environment variables of the processes that hold an engine, by ``preferences`` and ``ranker``.
    """

    directory: Path
    model: Path
    notes: Path
    embeddings: Path
    serve: ServeSettings
    index: IndexSettings
    ranker: RankerSettings
    precision: str = "fp32"
    dimensions: int | None = None
    seed: int = 42
    block_rule: BlockRule = DEFAULT_RULE
    actions: tuple[str, ...] = ("click",)
    events: Path | None = None
    saved_index: Path | None = None
    sequences: Path | None = None
    preferences: Path | None = None
    summaries: Path | None = None
    preference_engine: Callable[[], Any] | None = None
    ranker_engine: Callable[[], Any] | None = None
    environments: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def keys_file(self) -> Path:
        return self.serve.keys_file or self.directory / "keys.json"

    @property
    def users_file(self) -> Path:
        return self.serve.users_file or self.directory / "users.sqlite"


def replica_options(
    settings: DeploymentSettings, *, drain_seconds: float, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Arguments of ``serve.deployment`` for a deployment that scales."""
    from ray.serve.config import AutoscalingConfig, BackpressureConfig

    options: dict[str, Any] = {
        "max_ongoing_requests": settings.max_ongoing,
        "max_queued_requests": settings.max_queued,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
        **common_options(settings.cpus, settings.gpus or 0, drain_seconds=drain_seconds, environment=environment),
    }
    if settings.max_replicas is None:
        options["num_replicas"] = settings.replicas
    else:
        options["autoscaling_config"] = AutoscalingConfig(
            min_replicas=settings.replicas,
            max_replicas=settings.max_replicas,
            target_ongoing_requests=settings.target_ongoing,
            upscale_delay_s=5,
            downscale_delay_s=60,
        )
    return options


def engine_options(
    settings: DeploymentSettings, *, drain_seconds: float, environment: dict[str, str] | None
) -> dict[str, Any]:
    """As :func:`replica_options`, for a deployment around an engine.

    Serve replaces a replica after its third failed check. An engine's check is cheap, and the engine that follows needs
    long enough to start.
    """
    options = replica_options(settings, drain_seconds=drain_seconds, environment=environment)
    return {**options, "health_check_period_s": 1}


def common_options(
    cpus: float,
    gpus: float = 0,
    *,
    drain_seconds: float,
    environment: dict[str, str] | None = None,
    resource: str | None = None,
) -> dict[str, Any]:
    """Arguments of ``serve.deployment`` for any deployment; ``resource``: a Ray resource that its node must have."""
    from ray.serve.config import RequestRouterConfig

    actor: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus}
    if resource:
        actor["resources"] = {resource: 0.001}
    if environment:
        actor["runtime_env"] = {"env_vars": environment}
    return {
        "ray_actor_options": actor,
        "graceful_shutdown_timeout_s": drain_seconds,
        "graceful_shutdown_wait_loop_s": 0.2,
        "request_router_config": RequestRouterConfig.model_validate(_BACKOFF),
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
    }
