"""The outputs of the recommender's stages, and what each depends on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from notellm2_ray.baselines.ranking.table import needs, untuned_rows
from notellm2_ray.core.config import shaping
from notellm2_ray.core.run import files_fingerprint, fingerprint
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.settings.ranking import Control, PreferenceVariant, ProtocolName, RankerVariant
from notellm2_ray.core.workspace import Workspace
from notellm2_ray.models.packaged import located
from notellm2_ray.pipeline.embedders import model_reads, model_versions
from notellm2_ray.pipeline.seeds import (
    drawn_with,
    each_with_own,
    label_of,
    ranking_workspace,
    with_ranking_seed,
    with_recall_seed,
)
from notellm2_ray.pipeline.stage import Planned, workspace_of

if TYPE_CHECKING:
    from notellm2_ray.baselines.ranking.baseline import Need

# The preferences that each ranker variant reads.
PREFERENCES: dict[RankerVariant, PreferenceVariant | None] = {
    "mllm_msr": "recurrent",
    "direct": "direct",
    "no_image_summary": "no_image_summary",
    "tallrec": None,
}


class Scored(NamedTuple):
    """One table of scores: one model's P(yes) for one protocol's candidates."""

    method: str  # row of the tables
    ranker: RankerVariant  # how it is prompted
    seed: int | None  # of ``ranking.seeds``; None: an untuned model with what the first seed draws
    control: Control | None
    protocol: ProtocolName
    tuned: bool = True

    @property
    def history(self) -> str:
        """Which history its preferences are made from: see :func:`preference_histories`."""
        return "published" if self.protocol == "published" else ""

    @property
    def name(self) -> str:
        seed = "" if self.seed is None else f"-seed{self.seed}"
        return f"{self.method}{seed}" + (f"-{self.control}" if self.control else "")


def for_ranker(settings: Settings, variant: RankerVariant, seed: int) -> Settings:
    """The settings that tune one of the compared rankers."""
    ranker = settings.ranker.model_copy(update={"variant": variant})
    return with_ranking_seed(settings, seed).model_copy(update={"ranker": ranker})


def for_table(settings: Settings, table: Scored) -> Settings:
    """The settings of the seed whose draws a table of scores is made with."""
    return with_ranking_seed(settings, settings.ranking.seeds[0] if table.seed is None else table.seed)


def rankers(settings: Settings) -> Iterator[Settings]:
    """Settings of every ranker in ``ranking``: each variant with each seed."""
    for variant in settings.ranking.rankers:
        for seed in settings.ranking.seeds:
            yield for_ranker(settings, variant, seed)


def for_preferences(settings: Settings, variant: PreferenceVariant) -> Settings:
    """The settings that make one variant of the preferences."""
    return settings.model_copy(update={"preferences": settings.preferences.model_copy(update={"variant": variant})})


def preference_variants(settings: Settings) -> list[PreferenceVariant]:
    """The variants that the compared rankers need, tuned and untuned, in the order of the rows."""
    needed = [PREFERENCES[variant] for variant in settings.ranking.rankers]
    needed += [PREFERENCES[variant] for variant in untuned_rows(settings).values()]
    return list(dict.fromkeys(variant for variant in needed if variant is not None))


def needs_image_summaries(settings: Settings) -> bool:
    """Whether any compared ranker or baseline reads image summaries."""
    by_preferences = any(variant != "no_image_summary" for variant in preference_variants(settings))
    return by_preferences or "image_summaries" in needs(settings)


def scored(settings: Settings) -> list[Scored]:
    """Every table of scores that the evaluation compares."""
    found: list[Scored] = []
    others = [each.tune.seed for each in each_with_own(settings, "scores")][1:]
    for protocol in settings.candidates.protocols:
        for name, variant in untuned_rows(settings).items():
            found += [Scored(name, variant, seed, None, protocol, tuned=False) for seed in (None, *others)]
        for variant in settings.ranking.rankers:
            found += [Scored(variant, variant, seed, None, protocol) for seed in settings.ranking.seeds]
        for control in settings.ranking.controls if protocol == settings.candidates.protocols[0] else ():
            first = settings.ranking.rankers[0]
            found += [Scored(first, first, seed, control, protocol) for seed in settings.ranking.seeds]
    return found


def preference_histories(settings: Settings) -> list[str]:
    """The histories that preferences are made from: the users' own ("") and those of the "published" protocol."""
    protocols = settings.candidates.protocols
    own = [""] if settings.ranking.rankers or set(protocols) != {"published"} else []
    return own + (["published"] if "published" in protocols else [])


def ranking_model(settings: Settings, name: str) -> str:
    """Name or path of a model of the recommender; tiny (of ``tune.seed``) and packaged ones by directory."""
    return str(ranking_workspace(settings).tiny_mllm) if name == "tiny" else located(name, "mllm")


def uses_tiny_mllm(settings: Settings) -> bool:
    """Whether any of the recommender's models is the tiny one."""
    return "tiny" in (settings.summaries.model, settings.preferences.model, settings.ranker.model)


def needs_tiny_mllm(settings: Settings) -> bool:
    """Whether a step of a whole run reads the tiny one: none may make summaries or preferences."""
    read = [settings.ranker.model]
    read += [settings.preferences.model] if preference_variants(settings) else []
    read += [settings.summaries.model] if needs_image_summaries(settings) else []
    return "tiny" in read


def needs_tiny_embedder_parts(settings: Settings) -> bool:
    """Whether a ranking baseline reads the tiny LLM or CLIP, which the recall half trains."""
    needed = needs(settings)
    by_image = "image_tower" in needed and (settings.ranking.image_tower or settings.model.vision) == "tiny"
    return by_image or ("llm" in needed and settings.model.llm == "tiny")


def _model_reads(settings: Settings, name: str) -> dict[str, Path]:
    """Directory of the tiny MLLM of ``tune.seed``, if ``name`` is 'tiny'."""
    return {"model": ranking_workspace(settings).tiny_mllm} if name == "tiny" else {}


def _model_versions(name: str) -> dict[str, str]:
    """Version of a model that is a local directory."""
    path = located(name, "mllm")
    return {"model": files_fingerprint(path)} if name != "tiny" and Path(path).is_dir() else {}


def sequences(settings: Settings) -> Planned:
    workspace = ranking_workspace(settings)
    shaped = {
        "sequences": shaping(settings.sequences),
        "candidates": shaping(settings.candidates),
        "seed": settings.seed,
        "draws": drawn_with(settings, workspace, "sequences"),
    }
    name = label_of(workspace, "sequences")
    return Planned("make-sequences", workspace.sequences, shaped, {"prepared": workspace.prepared}, name=name)


def tiny_mllm(settings: Settings) -> Planned:
    workspace = ranking_workspace(settings)
    shaped = {
        "tiny": {name: value for name, value in shaping(settings.tiny).items() if re.match("mllm_|vocab_size", name)},
        "seed": drawn_with(settings, workspace, "tiny_mllm"),
        "prompt_language": settings.prompts.language,
        "templates": [settings.summaries.template, settings.preferences.template],
    }
    name = label_of(workspace, "tiny_mllm")
    return Planned("build-tiny-mllm", workspace.tiny_mllm, shaped, {"prepared": workspace.prepared}, name=name)


def image_summaries(settings: Settings) -> Planned:
    workspace, model = ranking_workspace(settings), settings.summaries.model
    shaped = {
        "summaries": shaping(settings.summaries),
        "language": settings.prompts.language,
        "generation": shaping(settings.generation),
    }
    reads = {"prepared": workspace.prepared, **_model_reads(settings, model)}
    name, versions = label_of(workspace, "image_summaries"), _model_versions(model)
    return Planned("summarize-images", workspace.image_summaries, shaped, reads, versions=versions, name=name)


def preferences(settings: Settings, history: str = "") -> Planned:
    """Preferences of ``preferences.variant`` from one of :func:`preference_histories`."""
    workspace, variant, model = ranking_workspace(settings), settings.preferences.variant, settings.preferences.model
    shaped = {
        "preferences": shaping(settings.preferences),
        "language": settings.prompts.language,
        "generation": shaping(settings.generation),
        "seed": drawn_with(settings, workspace, "preferences"),
        "history": history,
    }
    reads = {"sequences": histories_of(settings).sequences, **_model_reads(settings, model)}
    if variant != "no_image_summary":
        reads["image_summaries"] = workspace.image_summaries
    directory = workspace.preferences(variant, history)
    versions = _model_versions(model)
    name = f"{directory.name} {label_of(workspace, 'preferences')}".strip()
    return Planned("summarize-preferences", directory, shaped, reads, versions=versions, name=name)


def histories_of(settings: Settings) -> Workspace:
    """The workspace whose histories preferences are made from; those of all seeds are equal.

    Preferences that all seeds share are made from the first one's.
    """
    workspace = ranking_workspace(settings)
    return workspace if "preferences" in workspace.own else workspace_of(settings)


def ranker_name(settings: Settings) -> str:
    """Directory name of the ranker that these settings tune, as in ``mllm_msr-seed42``."""
    return f"{settings.ranker.variant}-seed{settings.tune.seed}"


def ranker(settings: Settings) -> Planned:
    workspace, name, model = ranking_workspace(settings), ranker_name(settings), settings.ranker.model
    return Planned(
        "train-ranker",
        workspace.ranker(name),
        {"ranker": shaping(settings.ranker), "tune": shaping(settings.tune), "language": settings.prompts.language},
        {
            "sequences": workspace.sequences,
            **_preference_reads(settings, settings.ranker.variant),
            **_model_reads(settings, model),
        },
        versions=_model_versions(model),
        name=name,
    )


def _preference_reads(settings: Settings, variant: RankerVariant, history: str = "") -> dict[str, Path]:
    kind = PREFERENCES[variant]
    return {} if kind is None else {"preferences": ranking_workspace(settings).preferences(kind, history)}


def scores(settings: Settings, table: Scored) -> Planned:
    settings = for_table(settings, table)
    workspace, model = ranking_workspace(settings), settings.ranker.model
    shaped = {
        "ranker": shaping(settings.ranker.model_copy(update={"variant": table.ranker})),
        "table": table._asdict(),
        "language": settings.prompts.language,
        "generation": shaping(settings.generation),
        "seed": drawn_with(settings, workspace, "scores"),
    }
    reads = {
        "sequences": workspace.sequences,
        **_preference_reads(settings, table.ranker, table.history),
        **_model_reads(settings, model),
    }
    if table.tuned:
        reads["ranker"] = workspace.ranker(f"{table.ranker}-seed{table.seed}")
    return Planned(
        "score-candidates",
        workspace.scores(table.name, table.protocol),
        shaped,
        reads,
        versions=_model_versions(model),
        name=f"{table.name} {table.protocol}",
    )


def ranking_evaluation(settings: Settings) -> Planned:
    workspace = workspace_of(settings)
    tables = {table: ranking_workspace(for_table(settings, table)) for table in scored(settings)}
    reads = {
        f"{table.name}/{table.protocol}": home.scores(table.name, table.protocol) for table, home in tables.items()
    }
    reads["prepared"] = workspace.prepared
    versions: dict[str, str] = {}
    needed = needs(settings)
    shaped = {"ranking": shaping(settings.ranking), "seed": settings.seed}
    for each in map(partial(with_ranking_seed, settings), settings.ranking.seeds):
        reads |= _read_by_baselines(each, needed)
    if "llm" in needed:
        versions |= model_versions(settings, ["llm"])
        shaped["llm"] = settings.model.llm
    if "image_tower" in needed:
        if settings.ranking.image_tower:
            versions["image_tower"] = files_fingerprint(settings.ranking.image_tower)
        else:
            versions |= model_versions(settings, ["vision"])
            shaped["vision"] = settings.model.vision
    for path in workspace.sweep_results():
        versions[f"sweep {path.parent.name}"] = fingerprint(path.read_text(encoding="utf-8"))
    return Planned("eval-ranking", workspace.ranking_report, shaped, reads, versions=versions)


def _read_by_baselines(settings: Settings, needed: set[Need]) -> dict[str, Path]:
    """What the baselines of ``tune.seed`` read."""
    workspace = ranking_workspace(settings)
    reads = [workspace.sequences, *([workspace.image_summaries] if "image_summaries" in needed else [])]
    parts = ["llm"] if "llm" in needed else []
    parts += ["vision"] if "image_tower" in needed and not settings.ranking.image_tower else []
    reads += model_reads(with_recall_seed(settings, settings.tune.seed), parts).values()
    return {str(path.relative_to(workspace.root)): path for path in reads}
