"""Knobs of the synthetic world."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from notellm2_ray.core.settings.data import Share
from notellm2_ray.core.settings.sources import SourceSettings


class WorldSettings(SourceSettings):
    """The synthetic world: drawn images, written texts, users whose tastes drift; everything follows from the seed."""

    kind: Literal["world"] = "world"
    num_notes: int = Field(2000, ge=20, description="notes in the world")
    num_users: int = Field(600, ge=2, description="users in the world")
    events_per_user: int = Field(
        80, ge=2, description="mean impressions of a user; a user who has seen everything of interest leaves earlier"
    )
    days: int = Field(21, ge=3, description="length of the event log; the paper takes two weeks to train, one to test")
    image_size: int = Field(96, ge=32, le=1024, description="side of the drawn images in pixels")
    num_subjects: int = Field(12, ge=2, le=24, description="values of a note's first hidden factor, its subject")
    num_styles: int = Field(8, ge=2, le=12, description="values of a note's second hidden factor, its style")
    words_per_value: int = Field(
        6,
        ge=1,
        le=12,
        description="words of each subject and style (Chinese: at most 10); with fewer, notes share more words",
    )
    text_subject: Share = Field(0.98, description="probability that a note's text tells its subject")
    text_style: Share = Field(0.1, description="probability that a note's text tells its style")
    image_subject: Share = Field(0.3, description="probability that a note's image shows its subject")
    image_style: Share = Field(0.95, description="probability that a note's image shows its style")
    short_share: Share = Field(0.1, description="share of notes with fewer than 50 tokens of text")
    long_share: Share = Field(0.1, description="share of notes with more than 165 tokens of text")
    broken_share: float = Field(
        0.005, ge=0, le=0.5, description="share of rows broken on purpose, which prepare must quarantine"
    )
    language: Literal["en", "zh"] = Field("en", description="language of the texts")

    @model_validator(mode="after")
    def _shares(self) -> WorldSettings:
        if self.short_share + self.long_share > 1:
            raise ValueError(
                f"short_share ({self.short_share}) and long_share ({self.long_share}) must not add up to more than 1"
            )
        if self.language == "zh" and self.words_per_value > 10:
            raise ValueError(f"words_per_value ({self.words_per_value}) must be at most 10 with language=zh")
        return self
