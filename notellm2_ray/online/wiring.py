"""The online service wired together: from settings to a spec, with engines of ``infer`` for deployments of ``serve``.

The files in serve_configs name ``build_app``. This module must not import ``annotations`` from ``__future__``: Ray
would then pass the builder a plain dict instead of ServeArguments, and a misspelt key would not be noticed.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from notellm2_ray.core.config import Frozen
from notellm2_ray.core.errors import ConfigError, OutputError
from notellm2_ray.core.history_blocks import BlockRule
from notellm2_ray.core.settings import Settings
from notellm2_ray.live.current import current
from notellm2_ray.live.durability import manifests
from notellm2_ray.pipeline import ranking_outputs
from notellm2_ray.pipeline.embedders import resolved
from notellm2_ray.pipeline.seeds import ranking_workspace
from notellm2_ray.pipeline.stage import workspace_of
from notellm2_ray.serve.spec import ServiceSpec


class ServeArguments(Frozen):
    """``args`` of the application in a Serve configuration file, like the options of the command line."""

    preset: str | None = Field(None, description="preset to start from, like --preset")
    config: str | None = Field(None, description="YAML file of settings, like --config")
    overrides: tuple[str, ...] = Field((), description="settings as key=value, like on the command line")


def build_app(args: ServeArguments) -> Any:
    """The application of a Serve configuration file.

    Raises:
        ConfigError: a setting is unknown or wrong.
        OutputError: the embedder or its vectors are not there yet.
    """
    from notellm2_ray.presets import load_settings
    from notellm2_ray.serve.app import compose
    from notellm2_ray.serve.launch import check_safe

    spec = service_spec(load_settings(args.config, args.preset, args.overrides))
    check_safe(spec)
    return compose(spec)


def serve_forever(settings: Settings) -> None:
    """`notellm2 serve`: run until SIGTERM or Ctrl-C."""
    from notellm2_ray.core.cluster import connect
    from notellm2_ray.core.settings import RaySettings
    from notellm2_ray.serve import launch

    spec = service_spec(settings)
    # Logical CPUs: all deployments and Serve's own actors must fit, even on a laptop with two cores.
    needed = int(_cpus(spec)) + 2
    ray = RaySettings(num_cpus=max(settings.ray.num_cpus, needed), object_store_gb=settings.ray.object_store_gb)
    launch.serve_forever(spec, functools.partial(connect, ray))


def haproxy_script(settings: Settings, directory: Path) -> str:
    """`notellm2 haproxy DIRECTORY`: writes the script that runs HAProxy; shell lines that export its variables."""
    import shlex

    from notellm2_ray.serve.haproxy import cluster_environment

    variables = cluster_environment(settings.serve, directory.absolute())
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in variables.items())


def create_key(settings: Settings, name: str, scopes: Sequence[str]) -> str:
    """`notellm2 keys create NAME --scope read`: the new key, which cannot be shown again."""
    from notellm2_ray.serve.keys import create_key as create

    return create(_keys_file(settings), name, scopes)


def revoke_key(settings: Settings, name: str) -> None:
    """`notellm2 keys revoke NAME`."""
    from notellm2_ray.serve.keys import revoke_key as revoke

    revoke(_keys_file(settings), name)


def service_spec(settings: Settings) -> ServiceSpec:
    """The service's spec, from the settings and the outputs in the workspace.

    Raises:
        ConfigError: see :func:`_engines`.
        OutputError: the embedder is not trained, the notes are not embedded, or the settings name a missing ranker.
    """
    settings = resolved(settings)
    workspace, directory = workspace_of(settings), _directory(settings)
    model = workspace.embedder_model(settings.embedder_name)
    embeddings = workspace.embedding_table(settings.embedder_name, "all")
    served = current(directory)
    if served.model is not None and not served.model.is_dir():
        raise OutputError(f"{served.model} is not there, and {served.table} holds its vectors: restore it from a copy")
    if served.model is None and not model.is_dir():
        raise OutputError(f"{model} is not there: run train-embedder (or `notellm2 run`) first")
    # The directory alone says nothing: creating a key creates it.
    if not embeddings.exists() and not manifests(served.table):
        raise OutputError(f"{embeddings} is not there: run embed-notes first")
    return ServiceSpec(
        directory=directory,
        model=served.model or model,
        notes=Path(settings.embed.notes) if settings.embed.notes else workspace.notes,
        embeddings=embeddings,
        serve=settings.serve.with_engine_gpus(settings.generation.gpus_per_engine),
        index=settings.index,
        ranker=settings.ranker,
        precision=settings.embed.precision,
        dimensions=settings.embed.dimensions,
        seed=settings.seed,
        block_rule=BlockRule.from_settings(settings.sequences),
        actions=settings.sequences.positive_actions,
        events=workspace.events,
        saved_index=_if_there(workspace.index(settings.embedder_name), "index.json"),
        sequences=_if_there(ranking_outputs.histories_of(settings).sequences, "blocks.parquet"),
        preferences=_if_there(_preferences_of(settings), "preferences.parquet"),
        summaries=_summaries(settings),
        **_engines(settings),
    )


def _engines(settings: Settings) -> dict[str, Any]:
    """Factories of the engines for ``serve.preferences`` and ``serve.ranker``, as arguments of the spec.

    Raises:
        ConfigError: preferences of this variant cannot be advanced block by block.
        OutputError: the ranker is not trained yet.
    """
    from notellm2_ray.infer.engine import engine_environment
    from notellm2_ray.online.engines import (
        check_preferences,
        check_ranker,
        engine_settings,
        preference_writer,
        yes_no_scorer,
    )

    found: dict[str, Any] = {}
    environments: dict[str, dict[str, str]] = {}
    if settings.serve.preferences is not None:
        if settings.preferences.variant == "direct":
            raise ConfigError(
                "preferences.variant=direct summarises a whole history at once, but serve.preferences advances a "
                "preference block by block: set preferences.variant to recurrent or no_image_summary, or leave "
                "serve.preferences null"
            )
        model = ranking_outputs.ranking_model(settings, settings.preferences.model)
        own = engine_settings(settings, settings.serve.preferences)
        check_preferences(model, own)
        found["preference_engine"] = functools.partial(preference_writer, model, own)
        environments["preferences"] = engine_environment(own.generation)
    if settings.serve.ranker is not None:
        model = str(settings.serve.ranker_model or _ranker_model(settings))
        own = engine_settings(settings, settings.serve.ranker)
        check_ranker(model, own)
        found["ranker_engine"] = functools.partial(yes_no_scorer, model, own)
        environments["ranker"] = engine_environment(own.generation)
    return {**found, "environments": environments}


def _ranker_model(settings: Settings) -> Path:
    path = workspace_of(settings).ranker_model(ranking_outputs.ranker_name(settings))
    if not path.is_dir():
        raise OutputError(f"{path} is not there: run train-ranker, set serve.ranker_model, or leave serve.ranker null")
    return path


def _preferences_of(settings: Settings) -> Path:
    variant = ranking_outputs.PREFERENCES[settings.ranker.variant] or settings.preferences.variant
    return ranking_workspace(settings).preferences(variant)


def _summaries(settings: Settings) -> Path | None:
    table = ranking_workspace(settings).summary_table
    return table if table.is_file() else None


def _if_there(directory: Path, name: str) -> Path | None:
    return directory if (directory / name).is_file() else None


def _directory(settings: Settings) -> Path:
    return workspace_of(settings).serving


def _keys_file(settings: Settings) -> Path:
    return settings.serve.keys_file or _directory(settings) / "keys.json"


def _cpus(spec: ServiceSpec) -> float:
    """CPUs that all replicas together reserve when fully scaled up."""
    serve = spec.serve
    scaled = [serve.gateway, serve.encoder]
    scaled += [one for one in (serve.preferences, serve.ranker) if one is not None]
    return serve.writer_cpus + serve.users_cpus + sum(one.cpus * one.most_replicas for one in scaled)
