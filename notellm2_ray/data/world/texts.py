"""Writing a note's title, topics and content from small grammars."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from notellm2_ray.data.world.lexicon import Lexicon


class Text(NamedTuple):
    """The written part of a note."""

    title: str
    topics: list[str]
    content: str


class Writer:
    """Picks the words of one note: words of its factors where a unit tells them, and neutral words elsewhere.

    Args:
        words: the language.
        rng: the note's own random stream; what it decides does not depend on the factors.
        subject: number of the note's subject.
        style: number of the note's style.
        num_words: how many words there are for each subject and each style.
    """

    def __init__(self, words: Lexicon, rng: random.Random, subject: int, style: int, num_words: int) -> None:
        self.words, self.rng = words, rng
        self.subject_words, self.style_words = words.subjects[subject][:num_words], words.styles[style][:num_words]

    def thing(self, tells: bool) -> str:
        """A word of the subject, or a neutral one."""
        return self.rng.choice(self.subject_words if tells else self.words.things)

    def quality(self, tells: bool) -> str:
        """A word of the style, or a neutral one."""
        return self.rng.choice(self.style_words if tells else self.words.qualities)

    def sentence(self, template: str, tells_subject: bool, tells_style: bool) -> str:
        """A template with its slots filled."""
        text = template.format(s=self.thing(tells_subject), t=self.quality(tells_style))
        return text[:1].upper() + text[1:]


def write(
    words: Lexicon,
    seed: int,
    subject: int,
    style: int,
    tells_subject: Sequence[bool],
    tells_style: Sequence[bool],
    num_sentences: int,
    num_words: int,
) -> Text:
    """One note's text. In English, 1 to 3 sentences give 14 to 36 words, 8 to 12 give 80 to 120, 20 more than 165.

    Args:
        seed: seed of the note's own stream.
        tells_subject: whether the title, the topics and each sentence tell the subject (num_sentences + 2 values).
        tells_style: the same for the style.
    """
    rng = random.Random(seed)
    writer = Writer(words, rng, subject, style, num_words)
    title = writer.sentence(rng.choice(words.titles), tells_subject[0], tells_style[0])
    topics = [writer.thing(tells_subject[1]), writer.quality(tells_style[1])]
    if rng.random() < 0.5:
        topics.append(writer.thing(False))
    templates: list[str] = []
    while len(templates) < num_sentences:  # a sentence is repeated only when all have been used
        templates += rng.sample(words.sentences, len(words.sentences))
    told = zip(templates[:num_sentences], tells_subject[2:], tells_style[2:], strict=False)
    return Text(title, list(dict.fromkeys(topics)), words.join.join(writer.sentence(*unit) for unit in told))
