"""What a lexicon holds, and the lexicon of each language."""

from __future__ import annotations

import importlib
from typing import NamedTuple


class Lexicon(NamedTuple):
    """Words and small grammars of one language.

    Sentences and titles have the slots ``{s}`` (a thing) and ``{t}`` (a quality). Where a sentence tells the subject or
    the style, the slot takes a word of that value's own vocabulary, and elsewhere a word that tells nothing.
    """

    subjects: tuple[tuple[str, ...], ...]  # one vocabulary of things per subject
    styles: tuple[tuple[str, ...], ...]  # one vocabulary of qualities per style
    things: tuple[str, ...]  # that tell no subject
    qualities: tuple[str, ...]  # that tell no style
    sentences: tuple[str, ...]
    titles: tuple[str, ...]
    join: str  # between two sentences
    short_sentences: tuple[int, int]  # fewest and most sentences of a note below 50 tokens
    usual_sentences: tuple[int, int]
    long_sentences: tuple[int, int]  # of a note above 165 tokens
    patterns: tuple[str, ...]  # name of each subject's drawn pattern, for captions
    palettes: tuple[str, ...]  # name of each style's pair of colours
    no_pattern: str
    no_palette: str
    captions: tuple[str, ...]  # slots {pattern} and {palette}


def lexicon(language: str) -> Lexicon:
    """The lexicon of ``"en"`` or ``"zh"``."""
    return importlib.import_module(f"notellm2_ray.data.world.lexicon_{language}").LEXICON


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


def vocabularies(text: str) -> tuple[tuple[str, ...], ...]:
    """One vocabulary per non-empty line."""
    return tuple(words(line) for line in text.strip().splitlines())


def lines(text: str) -> tuple[str, ...]:
    """The non-empty lines of a block of text."""
    return tuple(line.strip() for line in text.strip().splitlines())
