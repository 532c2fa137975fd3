"""Exercises for the tiny MLLM: caption drawings, summarise a taste, and answer yes or no about what is shown.

A large model can do this already. The tiny one learns it from drawings and titles like the world's, which are made for
the purpose from random streams of their own. They contain no note, user or click of any source, and the recommender's
question is never asked. The taste in an answer depends only on the words shown (:func:`taste_of`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from notellm2_ray.core.prompts import Language, quote
from notellm2_ray.core.recommend_prompts import PREFERENCE_BEGINS, Item, Text, preference_prompt, summary_prompt
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.settings.ranking import PreferenceVariant
from notellm2_ray.data.world.images import draw_image
from notellm2_ray.data.world.lexicon import Lexicon, lexicon
from notellm2_ray.data.world.settings import WorldSettings
from notellm2_ray.data.world.texts import Writer
from notellm2_ray.lessons.yes_no import Scene, question
from notellm2_ray.models.tiny.exercises import Exercise, ExerciseKind, Lessons

# The topic of each of the lexicons' vocabularies. A large model knows that "tabby" is about "cats".
TOPICS: Mapping[Language, tuple[str, ...]] = {
    "en": (
        "hiking", "baking", "cats", "coffee", "seaside", "yoga", "music", "gardening", "makeup", "cycling", "books",
        "furniture", "fashion", "gadgets", "astronomy", "noodles", "travel", "parenting", "photography", "painting",
        "fitness", "salads", "dogs", "sewing",
    ),
    "zh": (
        "户外", "烘焙", "猫咪", "咖啡", "海边", "瑜伽", "音乐", "园艺", "美妆", "骑行", "阅读", "家居", "穿搭", "数码",
        "天文", "面食", "旅行", "育儿", "摄影", "绘画", "健身", "轻食", "狗狗", "手工",
    ),
}  # fmt: skip
_SAY: Mapping[Language, tuple[str, str, str, str, str, str]] = {
    "en": (" notes about ", " and ", "many things", ", in pictures of ", " or ", "."),
    "zh": ("关于", "和", "各种事物", "的笔记，图片多为", "或", "。"),
}
_ABOUT: Mapping[Language, tuple[str, str]] = {
    "en": ('title: "', '"\nWhat is this note about?'),
    "zh": ('标题："', '"\n这条笔记关于什么？'),
}
_PER_NOTE = 0.9  # every later note multiplies a weight by this
_NAMED = (1.5, 1.0)  # weights of the names that the previous preference gives first and second
_CAPTION = 1  # the lexicons' caption with pattern and palette; only one wording, so that a caption is right or wrong
_LONGEST = 30  # most notes in a history that is summarised at once
_SHOWN = 0.9  # share of drawings that show a pattern, and of those that show colours


class Taste(NamedTuple):
    """Topics and palettes by name, at most two of each, the one of the largest weight first."""

    topics: tuple[str, ...] = ()
    palettes: tuple[str, ...] = ()


class Told(NamedTuple):
    """What the words about a note tell: its topic, and the palette of its picture; None if they do not."""

    topic: str | None
    palette: str | None


def taste_of(notes: Sequence[Told], previous: Taste | None = None) -> Taste:
    """The taste that an answer states: the topics and palettes of the largest weight, where recent notes weigh more.

    A note adds weight 1 to its topic and to its palette. The first name of the previous preference begins with weight
    1.5, the second with 1.0. Every later note multiplies all weights by 0.9. Of tied names the later one comes first.

    Args:
        notes: oldest first.
        previous: the taste before these notes.
    """
    known = previous or Taste()
    return Taste(
        _weightiest([note.topic for note in notes], known.topics),
        _weightiest([note.palette for note in notes], known.palettes),
    )


def _weightiest(names: Sequence[str | None], named: Sequence[str]) -> tuple[str, ...]:
    weights: dict[str, float] = dict(zip(named, _NAMED, strict=False))
    for name in names:
        weights = {known: weight * _PER_NOTE for known, weight in weights.items()}
        if name is not None:
            weights[name] = weights.pop(name, 0.0) + 1.0  # the latest comes last
    return tuple(sorted(reversed(weights), key=lambda name: -weights[name])[:2])


def say(taste: Taste, language: Language) -> str:
    """A taste as the sentence of a preference; it mentions pictures only if some were shown."""
    about, both, nothing, pictures, either, end = _SAY[language]
    topics = both.join(taste.topics) or nothing
    if not taste.palettes:
        end = {"en": ".", "zh": "的笔记。"}[language]
        return PREFERENCE_BEGINS[language] + about + topics + end
    return PREFERENCE_BEGINS[language] + about + topics + pictures + either.join(taste.palettes) + end


def lessons(settings: Settings) -> Lessons:
    """Drawings and exercises in the numbers of the settings, some held out. Equal settings give equal lessons.

    For a source other than the world, drawings and titles have the world's default sizes.
    """
    tiny = settings.tiny
    teacher = Teacher(settings)
    drawn = [teacher.drawing(number) for number in range(tiny.mllm_drawings + tiny.mllm_held_out)]
    scenes = [scene for _, scene in drawn]
    train, unseen = range(tiny.mllm_drawings), range(tiny.mllm_drawings, len(drawn))
    return Lessons(
        [image for image, _ in drawn],
        [*teacher.exercises("train", train, scenes, tiny.mllm_topics, tiny.mllm_questions, tiny.mllm_preferences)],
        [*teacher.exercises("held out", unseen, scenes, *3 * [tiny.mllm_held_out])],
    )


class Teacher:
    """Makes exercises: titles in the source's language; prompts, captions and answers in the prompts' language."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.language = settings.prompts.language
        source = settings.source
        self.world = source if isinstance(source, WorldSettings) else WorldSettings(language=self.language)
        self.words: Lexicon = lexicon(self.world.language)
        self.names: Lexicon = lexicon(self.language)
        self.topics = TOPICS[self.language][: self.world.num_subjects]
        self.palettes = self.names.palettes[: self.world.num_styles]
        self.patterns = self.names.patterns[: self.world.num_subjects]

    def _random(self, *names: str | int) -> random.Random:
        return random.Random(stream_seed(self.settings.seed, "taste exercises", *names))

    def drawing(self, number: int) -> tuple[bytes, Scene]:
        """Drawing number ``number``, and what it shows."""
        rng = self._random("drawing", number)
        subject = rng.randrange(len(self.patterns)) if rng.random() < _SHOWN else None
        style = rng.randrange(len(self.palettes)) if rng.random() < _SHOWN else None
        image = draw_image(np.random.default_rng(rng.getrandbits(63)), subject, style, self.world.image_size)
        pattern = self.names.no_pattern if subject is None else self.patterns[subject]
        return image, Scene(number, pattern, self.names.no_palette if style is None else self.palettes[style])

    def exercises(
        self,
        part: str,
        numbers: Sequence[int],
        scenes: Sequence[Scene],
        num_topics: int,
        num_questions: int,
        num_preferences: int,
    ) -> Iterator[Exercise]:
        """A caption for each drawing in ``numbers``, and the given number of exercises of each other kind."""
        prompt = tuple(summary_prompt(self.language, self.settings.summaries.template))
        for number in numbers:
            yield Exercise("caption", prompt, self.caption(scenes[number].pattern, scenes[number].palette), number)
        for turn in range(num_topics):
            yield self.topic(self._random(part, "topic", turn))
        for turn in range(num_questions):
            rng = self._random(part, "question", turn)
            topic, title = self.title(rng, rng.randrange(len(self.topics)), told=True)
            names = (self.palettes, self.patterns, self.topics)
            yield question(rng, scenes[rng.choice(numbers)], str(topic), title, names, self.language)
        for turn in range(num_preferences):
            yield self.preference(self._random(part, "preference", turn))

    def topic(self, rng: random.Random) -> Exercise:
        """The question what a title is about."""
        topic, title = self.title(rng, rng.randrange(len(self.topics)), told=rng.random() < _SHOWN)
        before, after = _ABOUT[self.language]
        return Exercise("topic", (before, Text(quote(title, self.language)), after), topic or _SAY[self.language][2])

    def caption(self, pattern: str, palette: str) -> str:
        """The caption of a picture."""
        return self.names.captions[_CAPTION].format(pattern=pattern, palette=palette)

    def title(self, rng: random.Random, subject: int, told: bool) -> tuple[str | None, str]:
        """A new title, and the topic that it tells, if any."""
        style = rng.randrange(len(self.words.styles))
        writer = Writer(self.words, rng, subject, style, self.world.words_per_value)
        title = writer.sentence(rng.choice(self.words.titles), told, rng.random() < 0.1)
        return self.topics[subject] if told else None, title

    def preference(self, rng: random.Random) -> Exercise:
        """A block of notes, with or without a previous preference, or a long history, summarised by the rule."""
        variants: tuple[PreferenceVariant, ...] = ("recurrent", "direct", "no_image_summary")
        variant = rng.choices(variants, (6, 1, 3))[0]
        num_notes = (
            rng.randint(1, _LONGEST) if variant == "direct" else rng.choices((1, 2, 3, 4, 5), (5, 3, 8, 1, 1))[0]
        )
        shown = variant != "no_image_summary"
        liked = rng.sample(range(len(self.topics)), min(3, len(self.topics))), rng.sample(self.palettes, 2)
        rate = rng.uniform(0.2, 1.0)
        told, items = zip(*(self._note(rng, *liked, rate, shown) for _ in range(num_notes)), strict=True)
        previous = None if variant == "direct" or rng.random() < 0.3 else self._previous(rng, *liked, shown)
        prompt = preference_prompt(
            self.language,
            variant,
            None if previous is None else say(previous, self.language),
            items,
            self.settings.preferences.template,
        )
        kind: ExerciseKind = "history" if variant == "direct" else "preference"
        return Exercise(kind, tuple(prompt), say(taste_of(told, previous), self.language))

    def _note(
        self, rng: random.Random, subjects: Sequence[int], palettes: Sequence[str], rate: float, shown: bool
    ) -> tuple[Told, Item]:
        subject = rng.choice(subjects) if rng.random() < 0.75 else rng.randrange(len(self.topics))
        topic, title = self.title(rng, subject, told=rng.random() < rate)
        if not shown or rng.random() < 0.05:
            return Told(topic, None), Item(title)
        palette = rng.choice(palettes) if rng.random() < 0.75 else rng.choice(self.palettes)
        pattern = rng.choice(self.patterns) if rng.random() < 0.5 else self.names.no_pattern
        if rng.random() < 0.05:
            return Told(topic, None), Item(title, self.caption(pattern, self.names.no_palette))
        return Told(topic, palette), Item(title, self.caption(pattern, palette))

    def _previous(self, rng: random.Random, subjects: Sequence[int], palettes: Sequence[str], shown: bool) -> Taste:
        topics = [self.topics[subject] for subject in subjects]
        pools = [(topics, self.topics), (palettes, self.palettes)]
        picked = []
        for liked, every in pools:
            first = rng.choice(liked) if rng.random() < 0.7 else rng.choice(every)
            second = rng.choice([name for name in (liked if rng.random() < 0.5 else every) if name != first] or [first])
            picked.append(tuple(dict.fromkeys((first, second)))[: rng.choices((0, 1, 2), (1, 3, 6))[0]])
        return Taste(picked[0], picked[1] if shown else ())
