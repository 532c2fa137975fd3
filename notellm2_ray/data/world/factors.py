"""What is hidden about every note: its factors, when it appeared, and which of its parts tell which factor."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from notellm2_ray.data.world.draws import choices, uniforms
from notellm2_ray.data.world.lexicon import Lexicon, lexicon
from notellm2_ray.data.world.settings import WorldSettings

DAY = 86_400.0
LOG_START = 1_709_510_400  # 2024-03-04 00:00 UTC, in seconds: the first moment of the event log
MAX_UNITS = 32  # title, topics and at most 30 sentences


class Traits(NamedTuple):
    """What users react to, for N notes."""

    subject: np.ndarray  # (N,) int64
    style: np.ndarray  # (N,) int64
    created: np.ndarray  # (N,) float64, seconds since the log's start; negative before it
    appeal: np.ndarray  # (N,) float64, about normal; it makes notes of equal factors unequally popular
    healthy: np.ndarray  # (N,) bool; false if the row is broken on purpose


class Telling(NamedTuple):
    """Which parts of N notes tell which factor. The units of a text are the title, the topics, and each sentence."""

    num_sentences: np.ndarray  # (N,) int64
    unit_subject: np.ndarray  # (N, MAX_UNITS) bool: whether this unit tells the subject
    unit_style: np.ndarray  # (N, MAX_UNITS) bool
    image_subject: np.ndarray  # (N,) bool
    image_style: np.ndarray  # (N,) bool


def traits(settings: WorldSettings, seed: int, index: np.ndarray) -> Traits:
    """Traits of the notes numbered ``index`` (N,); each note depends on the seed and its own number only.

    Notes appear at a steady rate until the end of the log. The first appear before its start, by a sixth of its length,
    so that the first visitor finds some.
    """
    lead = settings.days / 6
    return Traits(
        subject=choices(seed, "subject", index, settings.num_subjects),
        style=choices(seed, "style", index, settings.num_styles),
        created=np.floor((uniforms(seed, "created", index) * (settings.days + lead) - lead) * DAY),
        # The sum of twelve uniform numbers is near enough to normal, and cheaper than inverting the distribution.
        appeal=np.sum([uniforms(seed, f"appeal {i}", index) for i in range(12)], axis=0) - 6.0,
        healthy=uniforms(seed, "broken", index) >= settings.broken_share,
    )


def telling(settings: WorldSettings, seed: int, index: np.ndarray) -> Telling:
    """Which parts of the notes numbered ``index`` (N,) tell which factor, by the four information knobs."""
    words = lexicon(settings.language)
    sentences = _num_sentences(settings, words, seed, index)
    unit = np.arange(MAX_UNITS)
    place = index[:, None] * MAX_UNITS + unit
    exists = unit < sentences[:, None] + 2
    subject_rate = telling_rate(settings.text_subject, settings.short_share, settings.long_share, settings.language)
    style_rate = telling_rate(settings.text_style, settings.short_share, settings.long_share, settings.language)
    return Telling(
        num_sentences=sentences,
        unit_subject=exists & (uniforms(seed, "text subject", place) < subject_rate),
        unit_style=exists & (uniforms(seed, "text style", place) < style_rate),
        image_subject=uniforms(seed, "image subject", index) < settings.image_subject,
        image_style=uniforms(seed, "image style", index) < settings.image_style,
    )


@lru_cache(maxsize=64)
def telling_rate(knob: float, short_share: float, long_share: float, language: str) -> float:
    """The probability p that one unit tells a factor, such that a note does with probability ``knob``.

    A note of n units tells it with probability 1 - (1 - p)^n. p is found by bisection on the mean of that over the
    world's distribution of n. Short notes then tell it less often than ``knob``, and long ones more often.
    """
    if knob in (0.0, 1.0):
        return knob
    words = lexicon(language)
    shares = (short_share, 1 - short_share - long_share, long_share)
    bands = (words.short_sentences, words.usual_sentences, words.long_sentences)
    units = [np.arange(low, high + 1) + 2 for low, high in bands]
    low, high = 0.0, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        told = sum(share * np.mean(1 - (1 - rate) ** n) for share, n in zip(shares, units, strict=True))
        low, high = (rate, high) if told < knob else (low, rate)
    return high


def _num_sentences(settings: WorldSettings, words: Lexicon, seed: int, index: np.ndarray) -> np.ndarray:
    length = uniforms(seed, "length", index)
    short, long = length < settings.short_share, length >= 1 - settings.long_share
    within = uniforms(seed, "sentences", index)
    counts = [
        low + (within * (high - low + 1)).astype(np.int64)
        for low, high in (words.short_sentences, words.long_sentences, words.usual_sentences)
    ]
    return np.select([short, long], counts[:2], counts[2])
