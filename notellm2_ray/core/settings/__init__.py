"""The whole tree of settings: every setting of every stage, checked together.

The defaults are the papers' values where the papers give them. Smaller values for a laptop come as presets
(:mod:`notellm2_ray.presets`).
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from pydantic import Field, model_validator

from notellm2_ray.core.config import Frozen
from notellm2_ray.core.settings.data import (
    PairSettings,
    PrepareSettings,
    SplitSettings,
)
from notellm2_ray.core.settings.model import (
    VARIANT_NAMES,
    EmbedderSettings,
    ModelSettings,
    QFormerSettings,
    TinySettings,
)
from notellm2_ray.core.settings.ranking import (
    CandidateSettings,
    GenerationSettings,
    PreferenceSettings,
    PromptSettings,
    RankerSettings,
    RankEvaluateSettings,
    SequenceSettings,
    SummarySettings,
    TuneSettings,
)
from notellm2_ray.core.settings.retrieval import (
    EmbedSettings,
    EvaluateSettings,
    IdSettings,
    IndexSettings,
    NegativeSettings,
)
from notellm2_ray.core.settings.serve import ServeSettings
from notellm2_ray.core.settings.sources import SOURCES, AnySource, default_source
from notellm2_ray.core.settings.train import LoraSettings, TrainSettings

__all__ = [
    "CandidateSettings",
    "EmbedSettings",
    "EmbedderSettings",
    "EvaluateSettings",
    "GenerationSettings",
    "IdSettings",
    "IndexSettings",
    "LoraSettings",
    "ModelSettings",
    "NegativeSettings",
    "PairSettings",
    "PreferenceSettings",
    "PrepareSettings",
    "PromptSettings",
    "QFormerSettings",
    "RankEvaluateSettings",
    "RankerSettings",
    "RaySettings",
    "SequenceSettings",
    "ServeSettings",
    "Settings",
    "SplitSettings",
    "SummarySettings",
    "TinySettings",
    "TrainSettings",
    "TuneSettings",
]


class RaySettings(Frozen):
    """How a job that runs alone starts Ray. Under `ray job submit` or with RAY_ADDRESS it joins that cluster."""

    num_cpus: int = Field(
        0, ge=0, description="logical CPUs of the embedded cluster; 0: all of the machine's, at least 4"
    )
    object_store_gb: float = Field(1.0, gt=0, description="object store of the embedded cluster, in GiB")
    wait_minutes: float = Field(
        15,
        ge=0,
        description="how long training waits for a joined cluster to grow if its workers find no room; then it fails",
    )
    gpu_memory_gb: float | None = Field(
        None,
        gt=0,
        description="memory of a GPU in GiB, with which --dry-run compares its forecast; null: of this machine's GPU, "
        "or else of common ones",
    )


class Settings(Frozen):
    """All settings of a workspace."""

    workspace: Path = Field(Path("runs/world"), description="directory that all stages write into")
    seed: int = Field(
        42,
        ge=0,
        description="seed of the synthetic world, the splits and the first tiny models; training has train.seed",
    )
    source: AnySource = Field(default_factory=default_source, description="where notes and events come from")
    prepare: PrepareSettings = Field(PrepareSettings(), description="checks on the source")
    pairs: PairSettings = Field(PairSettings(), description="mining of related notes")
    split: SplitSettings = Field(SplitSettings(), description="train, validation and test sets")
    tiny: TinySettings = Field(TinySettings(), description="models trained from scratch")
    model: ModelSettings = Field(ModelSettings(), description="the embedder")
    train: TrainSettings = Field(TrainSettings(), description="training")
    embedders: dict[str, EmbedderSettings] = Field(
        {}, description="further embedders by name; `evaluate.embedders` and `embedder` can refer to them"
    )
    embedder: str | None = Field(
        None, description="name of the embedder to train, embed with and serve; null: the one of model.variant"
    )
    embed: EmbedSettings = Field(EmbedSettings(), description="bulk embedding")
    index: IndexSettings = Field(IndexSettings(), description="ANN index")
    negatives: NegativeSettings = Field(NegativeSettings(), description="mining of hard negatives")
    ids: IdSettings = Field(IdSettings(), description="semantic ids")
    evaluate: EvaluateSettings = Field(EvaluateSettings(), description="evaluation of recall")
    sequences: SequenceSettings = Field(SequenceSettings(), description="user histories and their blocks")
    candidates: CandidateSettings = Field(CandidateSettings(), description="targets, negatives and user splits")
    generation: GenerationSettings = Field(GenerationSettings(), description="vLLM engines")
    prompts: PromptSettings = Field(PromptSettings(), description="prompts of the recommender")
    summaries: SummarySettings = Field(SummarySettings(), description="image summaries")
    preferences: PreferenceSettings = Field(PreferenceSettings(), description="user preferences in words")
    ranker: RankerSettings = Field(RankerSettings(), description="the recommender")
    tune: TuneSettings = Field(TuneSettings(), description="fine-tuning of the recommender")
    ranking: RankEvaluateSettings = Field(RankEvaluateSettings(), description="evaluation of ranking")
    serve: ServeSettings = Field(ServeSettings(), description="the online service")
    ray: RaySettings = Field(RaySettings(), description="embedded Ray cluster")

    @model_validator(mode="after")
    def _source_has_what_is_asked(self) -> Settings:
        source = SOURCES.get(self.source.kind)
        if not source.has_creation_times:
            for setting, asked, remedy in self._needs_creation_times():
                if asked:
                    raise ValueError(
                        f"{setting} needs the notes' creation times, which {self.source.kind} lacks: {remedy}"
                    )
        if source.invented_times(self.source):
            for setting, asked, remedy in self._needs_times():
                if asked:
                    raise ValueError(
                        f"{setting} needs the times of the events, and this source has only their order: {remedy}"
                    )
        return self

    def _needs_creation_times(self) -> list[tuple[str, bool, str]]:
        """Settings that read when a note was created: (as it is set, whether it is, what to set instead)."""
        aged = self.candidates.max_negative_age_days
        return [
            ("split.by=time", self.split.by == "time", "use split.by=notes"),
            (f"candidates.max_negative_age_days={aged}", aged is not None, "set it to null"),
            ("the row newest", "newest" in self.ranking.baselines, "leave it out of ranking.baselines"),
        ]

    def _needs_times(self) -> list[tuple[str, bool, str]]:
        """Settings that compare the times of events, as in :meth:`_needs_creation_times`."""
        window, gap = self.pairs.window_days, self.pairs.max_gap_hours
        by_time, by_session = self.candidates.split_by == "time", self.sequences.blocks_by == "session"
        return [
            (f"pairs.window_days={window}", window is not None, "set it to null"),
            (f"pairs.max_gap_hours={gap}", gap is not None, "set it to null"),
            ("candidates.split_by=time", by_time, "use candidates.split_by=users"),
            ("sequences.blocks_by=session", by_session, "use sequences.blocks_by=size"),
        ]

    @model_validator(mode="after")
    def _embedders_are_known(self) -> Settings:
        for name in self.embedders:
            if name in VARIANT_NAMES:
                raise ValueError(f"embedders.{name}: that is a variant of `model`; choose another name")
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}", name):
                raise ValueError(
                    f"embedders: {name!r} cannot be a directory name: use letters, digits, '-', '_' and '.'"
                )
        known = (*VARIANT_NAMES, *self.embedders)
        own = () if self.embedder is None else (self.embedder,)
        for place, names in (("evaluate.embedders", self.evaluate.embedders), ("embedder", own)):
            for name in names:
                if name not in known:
                    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise ValueError(
                        f"{place}: there is no embedder {name!r}{hint} (variants of `model`: "
                        f"{', '.join(VARIANT_NAMES)}; others are defined under `embedders`)"
                    )
        return self

    @model_validator(mode="after")
    def _dimensions_are_of_the_vector(self) -> Settings:
        whole, cut = self.model.embedding_dim, self.train.dimensions
        if cut and whole is not None and max(cut) != whole:
            raise ValueError(
                f"train.dimensions={list(cut)}: the largest must be model.embedding_dim ({whole}), the length of a "
                "whole vector"
            )
        return self

    @model_validator(mode="after")
    def _negatives_are_of_known_embedders(self) -> Settings:
        known = (*VARIANT_NAMES, *self.embedders)
        for source in (self.train.negatives_of, *(own.train.get("negatives_of") for own in self.embedders.values())):
            if source is not None and source not in known:
                raise ValueError(f"train.negatives_of: there is no embedder {source!r} (known: {', '.join(known)})")
        return self

    @property
    def embedder_row(self) -> str:
        """Name of the embedder that these settings train: a variant, or a name from ``embedders``."""
        return self.embedder or self.model.variant

    @property
    def embedder_name(self) -> str:
        """Directory name of the embedder that these settings train, as in ``notellm2-seed42``."""
        return f"{self.embedder_row}-seed{self.train.seed}"
