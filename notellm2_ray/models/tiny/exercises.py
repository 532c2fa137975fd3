"""What the tiny MLLM learns from: prompts, pictures and answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from notellm2_ray.core.recommend_prompts import Part

ExerciseKind = Literal["caption", "topic", "question", "preference", "history"]


class Exercise(NamedTuple):
    """One prompt and its answer."""

    kind: ExerciseKind
    prompt: tuple[Part, ...]  # the user's turn
    answer: str
    image: int | None = None  # number of the drawing at IMAGE


class Lessons(NamedTuple):
    """Exercises for training, and others to measure with."""

    drawings: Sequence[bytes]  # encoded images, all of one size; an exercise refers to one by its number
    exercises: Sequence[Exercise]
    held_out: Sequence[Exercise]
