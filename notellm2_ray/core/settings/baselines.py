"""Knobs of the baselines, and how they are tuned."""

from __future__ import annotations

from itertools import product
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from notellm2_ray.core.config import Frozen, build

Architecture = Literal["gru4rec", "sasrec"]


class Bm25Settings(Frozen):
    """The recall baseline bm25 (Lucene's variant)."""

    k1: float = Field(1.5, ge=0, description="how much it counts that a word occurs several times")
    b: float = Field(0.75, ge=0, le=1, description="how much long texts are held against a note")


class SwingSettings(Frozen):
    """The recall baseline swing (Yang et al. 2020)."""

    alpha: float = Field(1.0, ge=0, description="smoothing; larger: users who share many notes count for more")


class SequentialSettings(Frozen):
    """What GRU4Rec and SASRec have in common; sizes are RecBole's unless stated."""

    architecture: ClassVar[Architecture]

    width: int = Field(64, ge=2, description="width of a note's vector")
    dropout: float = Field(0.3, ge=0, lt=1, description="dropout probability")
    learning_rate: float = Field(3e-3, gt=0, description="Adam's learning rate")
    max_length: int = Field(50, ge=1, description="how many of a sequence's last notes are read")
    max_epochs: int = Field(
        100, ge=1, description="most passes over the sequences (RecBole: 300, far more than a small set needs)"
    )
    patience: int = Field(
        20,
        ge=1,
        description="epochs without a better validation AUC before stopping (RecBole: 10; on small sets GRU4Rec first "
        "learns what is popular, then gets worse for a while before it learns more)",
    )
    min_batch: int = Field(32, ge=1, description="fewest sequences in an update; between the two, a twentieth of all")
    max_batch: int = Field(512, ge=1, description="most sequences in an update (RecBole: 2,048 prefixes)")
    unknown_share: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="share of the notes read that are replaced by the unknown note, to train its vector",
    )
    max_classes: int = Field(
        20_000, ge=2, description="if there are more notes, so many are drawn as negatives of an update"
    )


class Gru4RecSettings(SequentialSettings):
    """GRU4Rec. At RecBole's learning rate, 1e-3, it ends lower on a small set."""

    architecture: ClassVar[Architecture] = "gru4rec"

    hidden: int = Field(128, ge=1, description="width of the recurrent layer")


class SasRecSettings(SequentialSettings):
    """SASRec."""

    architecture: ClassVar[Architecture] = "sasrec"

    dropout: float = Field(0.5, ge=0, lt=1, description="dropout probability")
    learning_rate: float = Field(1e-3, gt=0, description="Adam's learning rate")
    layers: int = Field(2, ge=1, description="attention layers")
    heads: int = Field(2, ge=1, description="attention heads; they divide the width")
    inner: int = Field(256, ge=1, description="width of the feed-forward layers")

    @model_validator(mode="after")
    def _fits(self) -> SasRecSettings:
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        return self


# What tune_baselines tries unless told otherwise: eight trainings of each sequential baseline.
GRID: dict[str, tuple[float, ...]] = {"learning_rate": (1e-3, 3e-3), "dropout": (0.2, 0.5), "width": (64, 128)}


def points(settings: SequentialSettings, grid: dict[str, tuple[float, ...]]) -> list[SequentialSettings]:
    """The settings with every combination of the grid's values.

    Raises:
        ConfigError: a name is no knob of these settings, or a value does not fit.
    """
    plain: dict[str, Any] = settings.model_dump()
    combined = (dict(zip(grid, values, strict=True)) for values in product(*grid.values()))
    return [build(type(settings), plain | changed) for changed in combined]
