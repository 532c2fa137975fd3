"""The embedders of the recall table: the settings, pretrained models and inputs of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from notellm2_ray.baselines.ranking.table import needs
from notellm2_ray.core.config import build, merge, to_plain
from notellm2_ray.core.errors import ConfigError
from notellm2_ray.core.run import files_fingerprint
from notellm2_ray.core.settings import Settings
from notellm2_ray.models.embedder.kinds import kind_of
from notellm2_ray.models.packaged import located
from notellm2_ray.pipeline.seeds import recall_workspace


def select(settings: Settings, name: str, seed: int) -> Settings:
    """The settings with another embedder selected: a variant of ``model``, or one that ``embedders`` defines."""
    train = settings.train.model_copy(update={"seed": seed})
    return settings.model_copy(update={"train": train, "embedder": name})


def resolved(settings: Settings) -> Settings:
    """The settings with ``model`` and ``train`` filled in for the selected embedder.

    No other embedder can be selected from the result, because it would inherit this one's ``model`` and ``train``.
    """
    name = settings.embedder_row
    own = settings.embedders.get(name)
    if own is None:
        model = settings.model.model_copy(update={"variant": name})
        return settings.model_copy(update={"model": model, "embedder": None})
    changed = {"model": own.model, "train": {**own.train, "seed": settings.train.seed}}
    return build(Settings, merge(to_plain(settings), changed))


def compared_embedders(settings: Settings) -> list[Settings]:
    """Resolved settings of every embedder in ``evaluate``, one per seed: what is untrained is random too."""
    names, seeds = settings.evaluate.embedders, settings.evaluate.seeds
    return [resolved(select(settings, name, seed)) for name in names for seed in seeds]


def chosen_embedder(settings: Settings) -> Settings:
    """Settings of the embedder whose vectors of all notes a whole run indexes and serves."""
    return select(settings, settings.embedder_row, settings.evaluate.seeds[0])


def trained_embedders(settings: Settings) -> Iterator[Settings]:
    """Resolved settings of every embedder that a whole run trains, as of :func:`selected_embedders`."""
    return map(resolved, selected_embedders(settings))


def selected_embedders(settings: Settings) -> Iterator[Settings]:
    """The settings with each embedder selected that a whole run trains: the compared ones and the chosen one.

    An embedder that is trained with the negatives of another comes after that one.
    """
    names, seeds = settings.evaluate.embedders, settings.evaluate.seeds
    seen = set()
    for one in (*(select(settings, name, seed) for name in names for seed in seeds), chosen_embedder(settings)):
        for each in reversed(_with_sources(one)):
            if each.embedder_name not in seen:
                seen.add(each.embedder_name)
                yield each


def _with_sources(settings: Settings) -> list[Settings]:
    """The selected embedder, the one whose negatives it is trained with, and so on.

    Raises:
        ConfigError: an embedder would need its own negatives.
    """
    chain = [settings]
    while (source := source_of_negatives(chain[-1])) is not None:
        names = [each.embedder_row for each in (*chain, source)]
        if names[-1] in names[:-1]:
            raise ConfigError(
                f"train.negatives_of: {' needs the negatives of '.join(names)}. Give hard_negatives and negatives_of "
                "to an entry of `embedders`, and name another embedder there"
            )
        chain.append(source)
    return chain


def source_of_negatives(settings: Settings) -> Settings | None:
    """The settings with the embedder selected whose negatives the selected one is trained with, of the same seed.

    Args:
        settings: not :func:`resolved`.
    """
    name = resolved(settings).train.negatives_of if is_trained(settings) else None
    return None if name is None else select(settings, name, settings.train.seed)


def is_trained(settings: Settings) -> bool:
    """Whether the embedder of these settings is trained; otherwise it is the model before any training."""
    own = settings.embedders.get(settings.embedder or "")
    return own is None or own.trained


def is_baseline(settings: Settings) -> bool:
    """Whether the embedder of these settings is a baseline of the recall table's star.

    As in the paper, every variant but notellm2 is one, and every ready multimodal LLM. So is a model before training,
    and what says so itself.
    """
    own = settings.embedders.get(settings.embedder or "")
    if own is not None and own.baseline is not None:
        return own.baseline
    of_the_papers = settings.model.kind in ("notellm2", "mllm")
    is_notellm2 = (settings.model.kind, settings.model.variant) == ("notellm2", "notellm2")
    return not is_trained(settings) or (of_the_papers and not is_notellm2)


def natural_inputs(settings: Settings) -> str:
    """The inputs that the embedder of these settings is made for."""
    return kind_of(settings.model).natural_inputs(settings.model)


def tested_inputs(settings: Settings) -> tuple[str, ...]:
    """The inputs that the embedder is tested with, the natural one first (Table 3 if it takes text and images)."""
    natural = natural_inputs(settings)
    if natural != "multimodal":
        return (natural,)
    return (natural, *(name for name in settings.evaluate.inputs if name != natural))


def shown_inputs(settings: Settings, pool: str) -> tuple[str, ...]:
    """The inputs that a pool of notes is embedded with: for the test pool those tested, for all notes the natural one.

    With ``embed.by_modality``, also image alone and text alone. For the training notes it is the natural one.
    """
    if pool == "test":
        return tested_inputs(settings)
    natural = natural_inputs(settings)
    if pool == "train":
        return (natural,)
    return (natural, "image", "text") if settings.embed.by_modality and natural == "multimodal" else (natural,)


def parts_of(settings: Settings) -> tuple[str, ...]:
    """The pretrained models that the embedder of these settings is built from: ``llm``, ``vision`` or both."""
    return kind_of(settings.model).parts(settings.model)


def is_tiny(settings: Settings, part: str) -> bool:
    """Whether the ``llm`` or the ``vision`` tower is the workspace's own tiny one."""
    return getattr(settings.model, part) == "tiny"


def baseline_parts(settings: Settings) -> tuple[str, ...]:
    """The pretrained models of the embedder that ranking baselines compute features with."""
    needed = needs(settings)
    by_image = "image_tower" in needed and not settings.ranking.image_tower
    return (*(("llm",) if "llm" in needed else ()), *(("vision",) if by_image else ()))


def tiny_parts(settings: Settings) -> list[str]:
    """The tiny models that a run with these settings needs."""
    wanted = set()
    for each in (settings, *trained_embedders(settings)):
        wanted |= {(getattr(each.model, part), part) for part in parts_of(each)}
    wanted |= {(getattr(settings.model, part), part) for part in baseline_parts(settings)}
    return [name for part, name in (("llm", "llm"), ("vision", "clip")) if ("tiny", part) in wanted]


def model_paths(settings: Settings) -> tuple[str, str]:
    """Names or paths of the LLM and the vision tower; tiny (of ``train.seed``) and packaged ones by directory."""
    return _path(settings, "llm"), _path(settings, "vision")


def _path(settings: Settings, part: str) -> str:
    if is_tiny(settings, part):
        workspace = recall_workspace(settings)
        return str(workspace.tiny_llm if part == "llm" else workspace.tiny_clip)
    return located(getattr(settings.model, part), kind_of(settings.model).packaged_llm if part == "llm" else part)


def model_reads(settings: Settings, parts: Sequence[str]) -> dict[str, Path]:
    """Directory of the tiny models of ``train.seed``, if any of the parts is tiny."""
    return {"tiny": recall_workspace(settings).tiny} if any(is_tiny(settings, part) for part in parts) else {}


def model_versions(settings: Settings, parts: Sequence[str]) -> dict[str, str]:
    """Versions of the parts that are local directories, or named with a file of weights (timm:ARCHITECTURE:FILE)."""
    paths = {part: _local(_path(settings, part)) for part in parts if not is_tiny(settings, part)}
    return {part: files_fingerprint(path) for part, path in paths.items() if Path(path).exists()}


def _local(name: str) -> str:
    file = name.rpartition(":")[2]
    return file if file.endswith(".safetensors") else name
