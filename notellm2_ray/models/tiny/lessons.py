"""What a tiny MLLM learns from: prompts, pictures and the answers wanted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from notellm2_ray.core.recommend_prompts import Part

ExerciseKind = Literal["caption", "topic", "question", "preference", "history"]


class Exercise(NamedTuple):
    """One prompt, and the answer to give."""

    kind: ExerciseKind
    prompt: tuple[Part, ...]  # the user's turn
    answer: str
    image: int | None = None  # which drawing stands at IMAGE


class Lessons(NamedTuple):
    """Exercises to train on and to measure by."""

    drawings: Sequence[bytes]  # encoded images, all of one size; an exercise names one by its place
    exercises: Sequence[Exercise]
    held_out: Sequence[Exercise]
