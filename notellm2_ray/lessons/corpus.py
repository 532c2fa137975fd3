"""The texts that the tiny LLM is trained on, and the captioned images that the tiny CLIP is trained on."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterator

from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.core.prompts import Language, Slot, join_topics, note_prompt, quote, truncate
from notellm2_ray.core.run import stream_seed
from notellm2_ray.core.schema import Note
from notellm2_ray.core.settings import Settings
from notellm2_ray.core.words import note_text, tokenize
from notellm2_ray.data.world.settings import WorldSettings
from notellm2_ray.models.tiny.exercises import Question

_AT_ONCE = 256
_EXCERPTS = 8  # of each note; the first is the whole note
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s*")
_CLOSING: dict[Language, str] = {"zh": "”", "en": '"'}


def questions_for_llm(store: NoteStore, language: Language, seed: int) -> Iterator[Question]:
    """Questions that teach a small LLM what a large one already knows: the notes' words, and to compress a text.

    Each is an excerpt of a training note in the compression prompt, answered by its most characteristic word (of the
    highest tf-idf). An LLM trained on plain texts alone ends every prompt in the same state. Contrastive training
    cannot leave that state: all vectors are equal, so all gradients are zero.
    """
    words: Counter[str] = Counter()
    for note in _notes(store):
        words.update(set(tokenize(note_text(note), stem=False)))
    for number, note in enumerate(_notes(store)):
        rng = random.Random(stream_seed(seed, "exercises", number))
        sentences = [sentence for sentence in _SENTENCE_END.split(note.content) if sentence]
        for turn in range(_EXCERPTS):
            few = rng.sample(sentences, min(len(sentences), rng.randint(1, 2)))
            excerpt = note._replace(content=" ".join(sentences if turn == 0 else few))
            weights = _weights(excerpt, words, len(store))
            answer = max(weights, key=lambda word: (weights[word], word), default="")
            yield Question(_ask(excerpt, language), answer + _CLOSING[language], weights)


def _ask(note: Note, language: Language) -> str:
    fields = {
        Slot.TITLE: truncate(note.title, 20, "auto"),
        Slot.TOPICS: join_topics(note.topics, language),
        Slot.CONTENT: truncate(note.content, 80, "auto"),
    }
    parts = note_prompt("text", language)
    return "".join(quote(fields[part], language) if isinstance(part, Slot) else part for part in parts)


def _weights(note: Note, notes_with: Counter[str], num_notes: int) -> dict[str, float]:
    """The words of the note by tf-idf. Words of only one or two notes are left out: they name a note, not a kind."""
    counts = Counter(tokenize(note_text(note), stem=False))
    found = {
        word: count * math.log(num_notes / notes_with[word]) for word, count in counts.items() if notes_with[word] > 2
    }
    return {word: weight for word, weight in found.items() if weight > 0}


def captions_for_clip(settings: Settings, store: NoteStore) -> Iterator[tuple[bytes, str]]:
    """Encoded images with captions: the world's captioned drawings, or else training notes with title and topics."""
    if isinstance(settings.source, WorldSettings):
        from notellm2_ray.data.sources.world import captions

        yield from captions(settings.source, settings.seed, settings.tiny.num_captions)
        return
    for note in _notes(store):
        if note.image is not None:
            yield note.image, ", ".join([note.title, *note.topics])


def _notes(store: NoteStore) -> Iterator[Note]:
    ids = list(store.ids)
    for start in range(0, len(ids), _AT_ONCE):
        yield from store.get(ids[start : start + _AT_ONCE])
