"""The whole knob tree: every setting of every stage, checked together.

Defaults are the papers' where the papers say; what a laptop needs otherwise is a preset (:mod:`notellm2_ray.presets`).
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from notellm2_ray.core.config import Frozen
from notellm2_ray.core.settings.data import (
    PairSettings,
    PrepareSettings,
    SplitSettings,
)
from notellm2_ray.core.settings.model import ModelSettings, QFormerSettings, TinySettings
from notellm2_ray.core.settings.ranking import (
    CandidateSettings,
    GenerationSettings,
    PreferenceSettings,
    RankerSettings,
    RankEvaluateSettings,
    SequenceSettings,
    SummarySettings,
    TuneSettings,
)
from notellm2_ray.core.settings.retrieval import EmbedSettings, EvaluateSettings, IndexSettings
from notellm2_ray.core.settings.serve import ServeSettings
from notellm2_ray.core.settings.sources import SOURCES, AnySource, default_source
from notellm2_ray.core.settings.train import TrainSettings

__all__ = [
    "CandidateSettings",
    "EmbedSettings",
    "EvaluateSettings",
    "GenerationSettings",
    "IndexSettings",
    "ModelSettings",
    "PairSettings",
    "PreferenceSettings",
    "PrepareSettings",
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
    """How a job starts Ray when it is run alone; under `ray job submit` or RAY_ADDRESS it joins that cluster."""

    num_cpus: int = Field(0, ge=0, description="logical CPUs of the embedded cluster; 0: at least 4, or what there is")
    object_store_gb: float = Field(1.0, gt=0, description="object store of the embedded cluster, in GiB")


class Settings(Frozen):
    """All settings of a workspace."""

    workspace: Path = Field(Path("runs/world"), description="directory that every stage of this data set writes under")
    seed: int = Field(42, ge=0, description="seed of the data: world, splits, tiny models (training: train.seed)")
    source: AnySource = Field(default_factory=default_source, description="where notes and events come from")
    prepare: PrepareSettings = Field(PrepareSettings(), description="checks on the source")
    pairs: PairSettings = Field(PairSettings(), description="mining of related notes")
    split: SplitSettings = Field(SplitSettings(), description="train, validation and test")
    tiny: TinySettings = Field(TinySettings(), description="models trained from scratch")
    model: ModelSettings = Field(ModelSettings(), description="the embedder")
    train: TrainSettings = Field(TrainSettings(), description="training")
    embed: EmbedSettings = Field(EmbedSettings(), description="bulk embedding")
    index: IndexSettings = Field(IndexSettings(), description="ANN index")
    evaluate: EvaluateSettings = Field(EvaluateSettings(), description="evaluation of recall")
    sequences: SequenceSettings = Field(SequenceSettings(), description="users' histories and their blocks")
    candidates: CandidateSettings = Field(CandidateSettings(), description="targets, negatives, splits of users")
    generation: GenerationSettings = Field(GenerationSettings(), description="vLLM engines")
    summaries: SummarySettings = Field(SummarySettings(), description="image summaries")
    preferences: PreferenceSettings = Field(PreferenceSettings(), description="users' tastes in words")
    ranker: RankerSettings = Field(RankerSettings(), description="the recommender")
    tune: TuneSettings = Field(TuneSettings(), description="fine-tuning of the recommender")
    ranking: RankEvaluateSettings = Field(RankEvaluateSettings(), description="evaluation of ranking")
    serve: ServeSettings = Field(ServeSettings(), description="the online service")
    ray: RaySettings = Field(RaySettings(), description="embedded Ray cluster")

    @model_validator(mode="after")
    def _source_has_what_is_asked(self) -> Settings:
        if self.split.by == "time" and not SOURCES.get(self.source.kind).has_creation_times:
            raise ValueError(
                f"split.by=time needs the notes' creation times, which {self.source.kind} lacks: use split.by=notes"
            )
        return self

    @property
    def embedder_name(self) -> str:
        """Directory name of the embedder that these settings train, as in ``notellm2-seed42``."""
        return f"{self.model.variant}-seed{self.train.seed}"
