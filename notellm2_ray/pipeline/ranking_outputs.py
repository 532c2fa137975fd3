"""Where the recommender's outputs lie in the workspace, and what each is made of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from notellm2_ray.core.config import to_plain
from notellm2_ray.core.run import Output, files_fingerprint, fingerprint
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.settings.ranking import Control, PreferenceVariant, ProtocolName, RankerVariant
from notellm2_ray.pipeline.recall_outputs import fingerprint_of, model_inputs, shaping, workspace_of

# The preferences that a ranker variant is given.
PREFERENCES: dict[RankerVariant, PreferenceVariant | None] = {
    "mllm_msr": "recurrent",
    "direct": "direct",
    "no_image_summary": "no_image_summary",
    "tallrec": None,
}
_UNTUNED: dict[str, RankerVariant] = {"untuned": "mllm_msr", "untuned_text": "tallrec"}


class Scored(NamedTuple):
    """One table of scores: a model's opinion of one protocol's candidates."""

    method: str  # row of the tables
    ranker: RankerVariant  # how it is prompted
    seed: int | None  # of its tuning; None: untuned
    control: Control | None
    protocol: ProtocolName

    @property
    def history(self) -> str:
        """Whose preferences: see :func:`preference_histories`."""
        return "published" if self.protocol == "published" else ""

    @property
    def name(self) -> str:
        seed = "" if self.seed is None else f"-seed{self.seed}"
        return f"{self.method}{seed}" + (f"-{self.control}" if self.control else "")


def for_ranker(settings: Settings, variant: RankerVariant, seed: int) -> Settings:
    """The settings that tune one of the compared rankers."""
    ranker = settings.ranker.model_copy(update={"variant": variant})
    return settings.model_copy(update={"ranker": ranker, "tune": settings.tune.model_copy(update={"seed": seed})})


def rankers(settings: Settings) -> Iterator[Settings]:
    """Settings of every ranker that ``ranking`` names: each variant with each seed."""
    for variant in settings.ranking.rankers:
        for seed in settings.ranking.seeds:
            yield for_ranker(settings, variant, seed)


def for_preferences(settings: Settings, variant: PreferenceVariant) -> Settings:
    """The settings that make one variant of the preferences."""
    return settings.model_copy(update={"preferences": settings.preferences.model_copy(update={"variant": variant})})


def preference_variants(settings: Settings) -> list[PreferenceVariant]:
    """Every variant that the compared rankers, tuned and untuned, need; that of the rows' order."""
    needed = [PREFERENCES[variant] for variant in settings.ranking.rankers]
    needed += [PREFERENCES[_UNTUNED[name]] for name in settings.ranking.baselines if name in _UNTUNED]
    return list(dict.fromkeys(variant for variant in needed if variant is not None))


def needs_image_summaries(settings: Settings) -> bool:
    """Whether anything that is compared reads them."""
    by_preferences = any(variant != "no_image_summary" for variant in preference_variants(settings))
    return by_preferences or "gru4rec_summary" in settings.ranking.baselines


def scored(settings: Settings) -> list[Scored]:
    """Every table of scores that the evaluation compares."""
    found: list[Scored] = []
    for protocol in settings.candidates.protocols:
        for name in settings.ranking.baselines:
            if name in _UNTUNED:
                found.append(Scored(name, _UNTUNED[name], None, None, protocol))
        for variant in settings.ranking.rankers:
            found += [Scored(variant, variant, seed, None, protocol) for seed in settings.ranking.seeds]
        for control in settings.ranking.controls if protocol == settings.candidates.protocols[0] else ():
            first = settings.ranking.rankers[0]
            found += [Scored(first, first, seed, control, protocol) for seed in settings.ranking.seeds]
    return found


def ranking_model(settings: Settings, name: str) -> str:
    """A model of the recommender with 'tiny' resolved to the workspace's own."""
    return str(workspace_of(settings) / "tiny_mllm") if name == "tiny" else name


def uses_tiny_mllm(settings: Settings) -> bool:
    """Whether any of the recommender's models is the tiny one."""
    return "tiny" in (settings.summaries.model, settings.preferences.model, settings.ranker.model)


def needs_tiny_embedder_parts(settings: Settings) -> bool:
    """Whether a baseline's features come from the tiny models that the other half trains."""
    baselines = settings.ranking.baselines
    by_image = "gru4rec_image" in baselines and (settings.ranking.image_tower or settings.model.vision) == "tiny"
    return by_image or ("gru4rec_summary" in baselines and settings.model.llm == "tiny")


def _model_input(settings: Settings, name: str) -> dict[str, str]:
    """Version of one of the recommender's models: the tiny one, or one in a directory here."""
    if name == "tiny":
        return {"model": fingerprint_of(workspace_of(settings) / "tiny_mllm")}
    return {"model": files_fingerprint(name)} if Path(name).is_dir() else {}


def sequences(settings: Settings) -> Output:
    shaped = {
        "sequences": to_plain(settings.sequences),
        "candidates": to_plain(settings.candidates),
        "seed": settings.seed,
    }
    prepared = workspace_of(settings) / "prepared"
    return Output(prepared.with_name("sequences"), "make-sequences", shaped, {"prepared": fingerprint_of(prepared)})


def tiny_mllm(settings: Settings) -> Output:
    shaped = {
        "tiny": {name: value for name, value in to_plain(settings.tiny).items() if re.match("mllm_|vocab_size", name)},
        "seed": settings.seed,
        "prompt_language": settings.ranker.prompt_language,
        "templates": [settings.summaries.template, settings.preferences.template],
    }
    prepared = workspace_of(settings) / "prepared"
    return Output(prepared.with_name("tiny_mllm"), "build-tiny-mllm", shaped, {"prepared": fingerprint_of(prepared)})


def image_summaries(settings: Settings) -> Output:
    shaped = {
        "summaries": shaping(settings.summaries),
        "language": settings.ranker.prompt_language,
        "generation": _generation(settings),
    }
    prepared = workspace_of(settings) / "prepared"
    inputs = {"prepared": fingerprint_of(prepared), **_model_input(settings, settings.summaries.model)}
    return Output(prepared.with_name("image_summaries"), "summarize-images", shaped, inputs)


def preference_histories(settings: Settings) -> list[str]:
    """Which histories preferences are made from: the users' own (""), and those of the "published" construction."""
    protocols = settings.candidates.protocols
    own = [""] if settings.ranking.rankers or set(protocols) != {"published"} else []
    return own + (["published"] if "published" in protocols else [])


def preferences_directory(settings: Settings, variant: PreferenceVariant, history: str) -> Path:
    """Where the preferences of a variant lie."""
    name = f"{variant}-{history}" if history else variant
    return workspace_of(settings) / "preferences" / name


def preferences(settings: Settings, history: str = "") -> Output:
    workspace = workspace_of(settings)
    variant = settings.preferences.variant
    shaped = {
        "preferences": shaping(settings.preferences),
        "language": settings.ranker.prompt_language,
        "generation": _generation(settings),
        "seed": settings.seed,
        "history": history,
    }
    inputs = {
        "sequences": fingerprint_of(workspace / "sequences"),
        **_model_input(settings, settings.preferences.model),
    }
    if variant != "no_image_summary":
        inputs["image_summaries"] = fingerprint_of(workspace / "image_summaries")
    directory = preferences_directory(settings, variant, history)
    return Output(directory, "summarize-preferences", shaped, inputs)


def _generation(settings: Settings) -> dict[str, Any]:
    """What of the engine can change an answer."""
    shown = to_plain(settings.generation)
    return {name: shown[name] for name in ("dtype", "max_model_len", "engine_kwargs")}


def ranker_name(settings: Settings) -> str:
    """Directory name of the ranker that these settings tune, as in ``mllm_msr-seed42``."""
    return f"{settings.ranker.variant}-seed{settings.tune.seed}"


def ranker(settings: Settings) -> Output:
    workspace = workspace_of(settings)
    shaped = {"ranker": to_plain(settings.ranker), "tune": shaping(settings.tune)}
    inputs = {
        "sequences": fingerprint_of(workspace / "sequences"),
        **_preferences_input(settings, settings.ranker.variant),
        **_model_input(settings, settings.ranker.model),
    }
    return Output(workspace / "rankers" / ranker_name(settings), "train-ranker", shaped, inputs)


def _preferences_input(settings: Settings, variant: RankerVariant, history: str = "") -> dict[str, str]:
    kind = PREFERENCES[variant]
    if kind is None:
        return {}
    return {"preferences": fingerprint_of(preferences_directory(settings, kind, history))}


def scores(settings: Settings, table: Scored) -> Output:
    workspace = workspace_of(settings)
    shaped = {
        "ranker": to_plain(settings.ranker.model_copy(update={"variant": table.ranker})),
        "table": table._asdict(),
        "generation": _generation(settings),
        "seed": settings.seed,
    }
    inputs = {
        "sequences": fingerprint_of(workspace / "sequences"),
        **_preferences_input(settings, table.ranker, table.history),
        **_model_input(settings, settings.ranker.model),
    }
    if table.seed is not None:
        inputs["ranker"] = fingerprint_of(workspace / "rankers" / f"{table.ranker}-seed{table.seed}")
    return Output(workspace / "scores" / table.name / table.protocol, "score-candidates", shaped, inputs)


def ranking_evaluation(settings: Settings) -> Output:
    workspace = workspace_of(settings)
    inputs = {
        f"{table.name}/{table.protocol}": fingerprint_of(scores(settings, table).directory)
        for table in scored(settings)
    }
    inputs["sequences"] = fingerprint_of(workspace / "sequences")
    inputs["prepared"] = fingerprint_of(workspace / "prepared")
    baselines = set(settings.ranking.baselines)
    shaped = {"ranking": to_plain(settings.ranking), "seed": settings.seed}
    if "gru4rec_summary" in baselines:
        inputs["image_summaries"] = fingerprint_of(workspace / "image_summaries")
        inputs |= model_inputs(settings, ["llm"])
        shaped["llm"] = settings.model.llm
    if "gru4rec_image" in baselines:
        if settings.ranking.image_tower:
            inputs["image_tower"] = files_fingerprint(settings.ranking.image_tower)
        else:
            inputs |= model_inputs(settings, ["vision"])
            shaped["vision"] = settings.model.vision
    for path in sorted(workspace.glob("sweeps/*/sweep.json")):
        inputs[f"sweep {path.parent.name}"] = fingerprint(path.read_text(encoding="utf-8"))
    return Output(workspace / "report" / "ranking", "eval-ranking", shaped, inputs)
