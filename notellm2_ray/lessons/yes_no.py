"""Questions about one picture or one title with the answer yes or no, as instruction-tuned models know them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from notellm2_ray.core.prompts import Language, joined, quote
from notellm2_ray.core.recommend_prompts import IMAGE, NO, YES, Part, Text
from notellm2_ray.models.tiny.exercises import Exercise


class Scene(NamedTuple):
    """What a drawing shows, by name."""

    number: int
    pattern: str
    palette: str


class _Words(NamedTuple):
    palette: str  # begins a question about colours
    pattern: str
    topic: str
    either: str  # between two names
    end: str
    title: str


_WORDS: Mapping[Language, _Words] = {
    "en": _Words("Is this picture in ", "Does this picture show ", "Is this note about ", " or ", "? ", 'title: "'),
    "zh": _Words("这张图片是", "这张图片画着", "这条笔记关于", "或", "吗？", '标题："'),
}


def question(
    rng: random.Random,
    scene: Scene,
    topic: str,
    title: str,
    names: tuple[Sequence[str], Sequence[str], Sequence[str]],
    language: Language,
) -> Exercise:
    """A question about the colours or the pattern of a picture, or about the topic of a title; half are answered yes.

    It names one or two possible answers. It is put before the picture or title, or after it.

    Args:
        names: all palettes, patterns and topics.
    """
    words = _WORDS[language]
    subject = rng.choices(("palette", "pattern", "topic"), (4, 1, 4))[0]
    asked, truth, every = {
        "palette": (words.palette, scene.palette, names[0]),
        "pattern": (words.pattern, scene.pattern, names[1]),
        "topic": (words.topic, topic, names[2]),
    }[subject]
    answer = truth in every and rng.random() < 0.5
    options = rng.sample([name for name in every if name != truth], rng.randint(1, min(2, len(every) - 1)))
    if answer:
        options[rng.randrange(len(options))] = truth
    asking = asked + words.either.join(options) + words.end
    about_title = subject == "topic"
    shown: list[Part] = [words.title, Text(quote(title, language)), '"'] if about_title else [IMAGE]
    prompt = joined([asking, *shown] if rng.random() < 0.7 else [*shown, "\n", asking])
    return Exercise("question", tuple(prompt), YES if answer else NO, None if about_title else scene.number)
