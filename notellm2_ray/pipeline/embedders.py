"""The embedders of the recall table by name: settings of each, and what it is made from and shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from notellm2_ray.baselines.ranking.table import needs
from notellm2_ray.core.config import build, merge, to_plain
from notellm2_ray.core.run import files_fingerprint
from notellm2_ray.core.settings import Settings
from notellm2_ray.models.embedder.kinds import kind_of
from notellm2_ray.pipeline.stage import workspace_of


def select(settings: Settings, name: str, seed: int) -> Settings:
    """The settings with another embedder named: a variant of ``model``, or one that ``embedders`` defines."""
    train = settings.train.model_copy(update={"seed": seed})
    return settings.model_copy(update={"train": train, "embedder": name})


def resolved(settings: Settings) -> Settings:
    """The settings with ``model`` and ``train`` as they are for the embedder that is named.

    Others can no longer be selected from the result: what is different for this one would be taken for theirs.
    """
    name = settings.embedder_row
    own = settings.embedders.get(name)
    if own is None:
        model = settings.model.model_copy(update={"variant": name})
        return settings.model_copy(update={"model": model, "embedder": None})
    changed = {"model": own.model, "train": {**own.train, "seed": settings.train.seed}}
    return build(Settings, merge(to_plain(settings), changed))


def compared_embedders(settings: Settings) -> list[Settings]:
    """Settings of every embedder that ``evaluate`` names, resolved: each with each seed, an untrained one with one."""
    chosen = [select(settings, name, seed) for name in settings.evaluate.embedders for seed in settings.evaluate.seeds]
    first = settings.evaluate.seeds[0]
    return [resolved(each) for each in chosen if is_trained(each) or each.train.seed == first]


def chosen_embedder(settings: Settings) -> Settings:
    """Settings that name the embedder that a whole run embeds all notes with, indexes and serves."""
    return select(settings, settings.embedder_row, settings.evaluate.seeds[0])


def trained_embedders(settings: Settings) -> Iterator[Settings]:
    """Settings, resolved, of every embedder that a whole run trains: those it compares, and the chosen one."""
    seen = set()
    for each in (*compared_embedders(settings), resolved(chosen_embedder(settings))):
        if each.embedder_name not in seen:
            seen.add(each.embedder_name)
            yield each


def is_trained(settings: Settings) -> bool:
    """Whether the embedder of these settings is trained at all, or is a row of the model as it comes."""
    own = settings.embedders.get(settings.embedder or "")
    return own is None or own.trained


def natural_inputs(settings: Settings) -> str:
    """What the embedder of these settings is meant to be given."""
    return kind_of(settings.model).natural_inputs(settings.model)


def tested_inputs(settings: Settings) -> tuple[str, ...]:
    """What it is tested with, its natural input first (Table 3 for an embedder that takes both)."""
    natural = natural_inputs(settings)
    if natural != "multimodal":
        return (natural,)
    return (natural, *(name for name in settings.evaluate.inputs if name != natural))


def shown_inputs(settings: Settings, pool: str) -> tuple[str, ...]:
    """What it is shown of a pool of notes: of the test pool what it is tested with, of all notes its natural input.

    With ``embed.by_modality`` also each part of a note alone.
    """
    if pool == "test":
        return tested_inputs(settings)
    natural = natural_inputs(settings)
    return (natural, "image", "text") if settings.embed.by_modality and natural == "multimodal" else (natural,)


def parts_of(settings: Settings) -> tuple[str, ...]:
    """Which pretrained models the embedder of these settings is built from: ``llm``, ``vision``."""
    return kind_of(settings.model).parts(settings.model)


def is_tiny(settings: Settings, part: str) -> bool:
    """Whether the ``llm`` or the ``vision`` tower is the workspace's own tiny one."""
    return getattr(settings.model, part) == "tiny"


def baseline_parts(settings: Settings) -> tuple[str, ...]:
    """Which of the embedder's pretrained models the ranking baselines take their features from."""
    needed = needs(settings)
    by_image = "image_tower" in needed and not settings.ranking.image_tower
    return (*(("llm",) if "llm" in needed else ()), *(("vision",) if by_image else ()))


def tiny_parts(settings: Settings) -> list[str]:
    """Which tiny models a run of these settings needs."""
    wanted = set()
    for each in (settings, *trained_embedders(settings)):
        wanted |= {(getattr(each.model, part), part) for part in parts_of(each)}
    wanted |= {(getattr(settings.model, part), part) for part in baseline_parts(settings)}
    return [name for part, name in (("llm", "llm"), ("vision", "clip")) if ("tiny", part) in wanted]


def model_paths(settings: Settings) -> tuple[str, str]:
    """The LLM and the vision tower with 'tiny' resolved to the workspace's own."""
    workspace = workspace_of(settings)
    llm = str(workspace.tiny_llm) if is_tiny(settings, "llm") else settings.model.llm
    vision = str(workspace.tiny_clip) if is_tiny(settings, "vision") else settings.model.vision
    return llm, vision


def model_reads(settings: Settings, parts: Sequence[str]) -> dict[str, Path]:
    """The workspace's tiny models, if any of the parts is tiny."""
    return {"tiny": workspace_of(settings).tiny} if any(is_tiny(settings, part) for part in parts) else {}


def model_versions(settings: Settings, parts: Sequence[str]) -> dict[str, str]:
    """Versions of those parts that lie in directories here."""
    names = {part: getattr(settings.model, part) for part in parts}
    return {part: files_fingerprint(name) for part, name in names.items() if Path(name).is_dir()}
