"""Knobs of the sources, the checks on them, pair mining and the split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from notellm2_ray.core.config import Frozen

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class WorldSettings(Frozen):
    """The synthetic world: drawn images, written texts, users whose tastes drift; everything follows from the seed."""

    kind: Literal["world"] = "world"
    num_notes: int = Field(2000, ge=20, description="notes in the world")
    num_users: int = Field(600, ge=2, description="users in the world")
    events_per_user: int = Field(
        80, ge=2, description="impressions a user comes for, on average; who has seen all of interest leaves earlier"
    )
    days: int = Field(21, ge=3, description="length of the event log; the paper takes two weeks to train, one to test")
    image_size: int = Field(96, ge=32, le=1024, description="side of the drawn images in pixels")
    num_subjects: int = Field(12, ge=2, le=24, description="values of a note's first hidden factor, its subject")
    num_styles: int = Field(8, ge=2, le=12, description="values of a note's second hidden factor, its style")
    words_per_value: int = Field(
        6,
        ge=1,
        le=12,
        description="words that tell one subject or style (Chinese: at most 10): the fewer, the more often notes share "
        "them",
    )
    text_subject: Share = Field(0.98, description="probability that a note's text tells its subject")
    text_style: Share = Field(0.1, description="probability that a note's text tells its style")
    image_subject: Share = Field(0.3, description="probability that a note's image shows its subject")
    image_style: Share = Field(0.95, description="probability that a note's image shows its style")
    short_share: Share = Field(0.1, description="share of notes with fewer than 50 tokens of text")
    long_share: Share = Field(0.1, description="share of notes with more than 165 tokens of text")
    broken_share: float = Field(
        0.005, ge=0, le=0.5, description="share of rows broken on purpose, to see them quarantined"
    )
    language: Literal["en", "zh"] = Field("en", description="language of the texts")

    @model_validator(mode="after")
    def _shares(self) -> WorldSettings:
        if self.short_share + self.long_share > 1:
            raise ValueError(
                f"short_share ({self.short_share}) and long_share ({self.long_share}) must not exceed 1 together"
            )
        if self.language == "zh" and self.words_per_value > 10:
            raise ValueError(f"words_per_value ({self.words_per_value}) must be at most 10 with language=zh")
        return self


class ColumnMap(Frozen):
    """Names of a table's columns; the defaults are ours. An optional column that is absent is read as empty."""

    note_id: str = "note_id"
    title: str = "title"
    topics: str = "topics"
    content: str = "content"
    image: str = "image"
    created_at: str = "created_at"
    user_id: str = "user_id"
    timestamp: str = "timestamp"
    action: str = "action"
    session_id: str = "session_id"


class TabularSettings(Frozen):
    """Your own tables: Parquet, JSONL or CSV files of notes and of events."""

    kind: Literal["tabular"]
    notes: str = Field(description="file, directory or glob of the notes table")
    events: str = Field(description="file, directory or glob of the events table")
    format: Literal["auto", "parquet", "jsonl", "csv"] = Field("auto", description="auto goes by the file's ending")
    columns: ColumnMap = Field(ColumnMap(), description="our column name to yours")
    image_root: Path | None = Field(
        None, description="folder that relative image paths start from; null: the folder of the notes file"
    )
    topic_separator: str = Field("|", description="splits topics where they come as one string")
    time_unit: Literal["s", "ms", "us"] = Field("s", description="unit of numeric timestamps (since 1970, UTC)")
    default_action: str = Field("click", description="action of events in a table without an action column")


class MicroLensSettings(Frozen):
    """MicroLens: a pairs file of item sequences and a titles file; covers if you have them."""

    kind: Literal["microlens"]
    pairs: Path = Field(description="the ..._pairs.tsv (sequences) or ..._pairs.csv (user,item,timestamp) file")
    titles: Path = Field(description="the ..._titles.csv file (item,title)")
    covers: Path | None = Field(None, description="folder of cover images named ITEM.jpg; absent: no images")


class MovieLensSettings(Frozen):
    """MovieLens with posters: ratings.csv, movies.csv, tags.csv and a folder of poster images named MOVIEID.jpg."""

    kind: Literal["movielens"]
    directory: Path = Field(description="folder that holds ratings.csv, movies.csv and posters/")
    click_rating: float = Field(3.5, description="a rating is always a view, and from this value on a click too")
    posters_only: bool = Field(True, description="keep only the movies that have a poster")


Source = Annotated[WorldSettings | TabularSettings | MicroLensSettings | MovieLensSettings, Field(discriminator="kind")]


class PrepareSettings(Frozen):
    """Checks on the source tables."""

    max_bad_share: Share = Field(0.05, description="above this share of quarantined rows in a table the job stops")
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
    rows_per_file: int = Field(10_000, ge=1, description="rows in one output Parquet file")


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
    partitions: int = Field(0, ge=0, description="parts the log is mined in, for memory; 0: by its size")

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
