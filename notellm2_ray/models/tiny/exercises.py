"""What the tiny LLM and the tiny MLLM learn from: prompts, pictures and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from notellm2_ray.core.recommend_prompts import Part

ExerciseKind = Literal["caption", "topic", "question", "preference", "history"]


class Question(NamedTuple):
    """A text that ends where the LLM must answer, the answer, and what else could have been answered."""

    prompt: str
    answer: str
    words: Mapping[str, float] = {}  # how well each word would do, above 0


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
