"""Settings of the checks on a source, of pair mining and of the split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from notellm2_ray.core.config import Frozen, added, resource

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class PrepareSettings(Frozen):
    """Checks on the source tables."""

    max_bad_share: Share = resource(
        0.05, description="the job stops if more than this share of a table's rows is quarantined"
    )
    max_image_pixels: int = Field(
        50_000_000,
        ge=1,
        le=178_956_970,  # Pillow refuses larger images
        description="images that declare more pixels are quarantined without decoding them",
    )
    max_image_bytes: int = Field(
        20_000_000, ge=1, description="larger image files are quarantined without reading them"
    )
    bad_image: Literal["quarantine", "drop"] = Field(
        "quarantine", description="a note whose image is unusable: quarantine the note, or keep it and drop the image"
    )
    rows_per_file: int = resource(10_000, ge=1, description="rows per output Parquet file")


class PairSettings(Frozen):
    """Related notes by co-occurrence (NoteLLM-2, Eq. 2 and section 2.3)."""

    table: str | None = added(
        None,
        description="file, directory, glob or URI of a table of your own pairs, which are used instead of mined ones: "
        "query_id, target_id, and perhaps score and negatives (a list of note ids)",
    )
    view_actions: tuple[str, ...] = Field(("view", "click"), description="actions that count as a view")
    click_actions: tuple[str, ...] = Field(("click",), description="actions that count as a click")
    window_days: float | None = Field(
        14.0,
        gt=0,
        description="pairs are mined from the last so many days of the log before the split boundary "
        "(split.by=notes: before the end of the log); null: the whole log",
    )
    max_gap_hours: float | None = Field(
        None,
        gt=0,
        description="longest time between a view and a click that counts; null: any later click in the window",
    )
    lower: float = Field(0.01, ge=0, description="lower co-occurrence scores are dropped")
    upper: float = Field(30.0, gt=0, description="higher co-occurrence scores are dropped")
    top: int = Field(3, ge=1, description="related notes kept per note (the paper's t)")
    partitions: int = resource(
        0, ge=0, description="number of parts that the log is mined in, to limit memory; 0: chosen by its size"
    )

    @model_validator(mode="after")
    def _bounds(self) -> PairSettings:
        if self.lower >= self.upper:
            raise ValueError(f"pairs.lower ({self.lower}) must be below pairs.upper ({self.upper})")
        return self


class SplitSettings(Frozen):
    """Which notes and pairs are for training, validation and testing."""

    by: Literal["time", "notes"] = Field(
        "time",
        description="time: notes created after the boundary are test notes (needs created_at); "
        "notes: a random share of the notes is held out, for catalogues whose notes all exist from the start",
    )
    test_notes: Literal["new", "all"] = Field(
        "new",
        description="by time: notes of the test pairs and of the pool they are searched in. new: those created after "
        "the boundary (paper), which no training event knows; all: older ones too, so that warm notes are tested",
    )
    test_share: Share = Field(
        0.33,
        description="by time: share of the log's time span after the boundary; by notes: share of the notes held out",
    )
    valid_share: Share = Field(0.1, description="share of the training pairs used for validation (paper: one tenth)")

    @model_validator(mode="after")
    def _no_leak(self) -> SplitSettings:
        if self.by == "notes" and self.test_notes == "all":
            raise ValueError(
                "split.test_notes=all needs split.by=time: notes of both sides share the same log in a split by notes"
            )
        return self
