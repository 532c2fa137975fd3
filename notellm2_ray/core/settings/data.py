"""Knobs of the checks on a source, of pair mining and of the split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from notellm2_ray.core.config import Frozen, resource

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class PrepareSettings(Frozen):
    """Checks on the source tables."""

    max_bad_share: Share = resource(0.05, description="above this share of quarantined rows in a table the job stops")
    max_image_pixels: int = Field(
        50_000_000,
        ge=1,
        le=178_956_970,  # beyond, Pillow opens no image
        description="images declaring more pixels are quarantined undecoded",
    )
    max_image_bytes: int = Field(20_000_000, ge=1, description="image files larger than this are quarantined unread")
    bad_image: Literal["quarantine", "drop"] = Field(
        "quarantine", description="a note with an unusable image: quarantine the note, or keep it without the image"
    )
    rows_per_file: int = resource(10_000, ge=1, description="rows in one output Parquet file")


class PairSettings(Frozen):
    """Related notes by co-occurrence (NoteLLM-2, Eq. 2 and section 2.3)."""

    view_actions: tuple[str, ...] = Field(("view", "click"), description="actions by which a user has viewed a note")
    click_actions: tuple[str, ...] = Field(("click",), description="actions by which a user has clicked a note")
    window_days: float | None = Field(
        14.0,
        gt=0,
        description="length of the behaviour log that pairs are mined from, ending at the split "
        "(by notes: at the end of the log); null: all",
    )
    max_gap_hours: float | None = Field(
        None, gt=0, description="a click counts only this long after the view; null: any later click in the window"
    )
    lower: float = Field(0.01, ge=0, description="co-occurrence scores below are dropped")
    upper: float = Field(30.0, gt=0, description="co-occurrence scores above are dropped")
    top: int = Field(3, ge=1, description="related notes kept per note (the paper's t)")
    partitions: int = resource(0, ge=0, description="parts the log is mined in, for memory; 0: by its size")

    @model_validator(mode="after")
    def _bounds(self) -> PairSettings:
        if self.lower >= self.upper:
            raise ValueError(f"pairs.lower ({self.lower}) must be below pairs.upper ({self.upper})")
        return self


class SplitSettings(Frozen):
    """Which notes and pairs train, validate and test."""

    by: Literal["time", "notes"] = Field(
        "time",
        description="time: notes created after the boundary are test notes (needs created_at); "
        "notes: a random part of the notes is held out, for catalogues whose notes all exist from the start",
    )
    test_share: Share = Field(
        0.33, description="by time: last part of the log's time span; by notes: share of the notes held out"
    )
    valid_share: Share = Field(0.1, description="share of the training pairs used for validation (one-tenth)")
