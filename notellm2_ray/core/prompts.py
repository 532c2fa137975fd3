"""The embedder's prompts, as templates of fixed words and slots.

A template is a tuple of literal strings and :class:`Slot`. The literals are the template's own words. What fills a slot
is the user's text; it is tokenised separately, so that it can become neither a special token nor part of a neighbouring
word.

The note is shown as a JSON object (section 2.2). Both halves of the mICL prompt (section 3) end in the same words, and
each vector is read at the last token of those words: the opening quotation mark.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from notellm2_ray.core.schema import Note
from notellm2_ray.core.scripts import cut_characters, is_mostly_unspaced

if TYPE_CHECKING:
    from notellm2_ray.core.settings.model import ModelSettings

Language = Literal["zh", "en"]
PromptKind = Literal["basic", "micl", "text"]


class Slot(enum.Enum):
    """A place in a template that the note fills."""

    IMAGE = "image"  # the visual tokens
    VISUAL_MARK = "visual mark"  # the token <IMG_EMB>; the visual vector is read just before it
    TITLE = "title"
    TOPICS = "topics"
    CONTENT = "content"


Part = str | Slot
T = TypeVar("T")


class _Words(NamedTuple):
    note: str
    image: str
    title: str
    topics: str
    content: str
    compress: str  # closes the JSON string and object, and opens the quotation mark
    next_note: str  # closes that mark


_WORDS: Mapping[Language, _Words] = {
    "zh": _Words("笔记：{", "图片", "标题", "话题", "内容", '"}，压缩为一个词：“', "”。"),
    "en": _Words(
        "Note content: {", "image", "title", "topic", "content", '"}. Compress this note into one word: "', '". '
    ),
}
_COLON: Mapping[Language, str] = {"zh": ":", "en": ": "}
_COMMA: Mapping[Language, str] = {"zh": ",", "en": ", "}
_TOPIC_JOIN: Mapping[Language, str] = {"zh": "，", "en": ", "}
_LINE_BREAK: Mapping[Language, str] = {"zh": "。", "en": " "}


def note_prompt(kind: PromptKind, language: Language) -> tuple[Part, ...]:
    """The compression prompt.

    Args:
        kind: ``basic`` has image and text in one note (section 2.2), ``micl`` a visual note and then a textual one
            (section 3), ``text`` only the text.
        language: of the template's own words.
    """
    words, colon, comma = _WORDS[language], _COLON[language], _COMMA[language]
    image = f'"{words.image}"{colon}"'
    text: tuple[Part, ...] = (
        f'"{words.title}"{colon}"',
        Slot.TITLE,
        f'"{comma}"{words.topics}"{colon}"',
        Slot.TOPICS,
        f'"{comma}"{words.content}"{colon}"',
        Slot.CONTENT,
        words.compress,
    )
    if kind == "text":
        parts: tuple[Part, ...] = (words.note, *text)
    elif kind == "basic":
        parts = (words.note + image, Slot.IMAGE, f'"{comma}', *text)
    else:
        visual = (words.note + image, Slot.IMAGE, words.compress, Slot.VISUAL_MARK)
        parts = (*visual, words.next_note + words.note, *text)
    return tuple(joined(parts))


def joined(parts: Iterable[T]) -> list[T]:
    """Parts with neighbouring strings joined, so that a prompt's tokens do not depend on how it was assembled."""
    found: list[Any] = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif part != "":
            found.append(part)
    return found


def quote(text: str, language: Language) -> str:
    """User text as it is put between the template's quotation marks: one line, escaped as JSON.

    Escaping keeps a text that contains ``"}`` inside its field. Where the vectors are read never depends on the text.
    """
    one_line = re.sub(r"\s*[\r\n]+\s*", _LINE_BREAK[language], text.strip())
    return json.dumps(one_line, ensure_ascii=False)[1:-1]


def join_topics(topics: tuple[str, ...], language: Language) -> str:
    """Topics as one line."""
    return _TOPIC_JOIN[language].join(topics)


_WORD = re.compile(r"\S+")


def truncate(text: str, limit: int, unit: Literal["auto", "words", "characters"]) -> str:
    """The first ``limit`` words or characters; ``auto`` counts characters in a text without spaces between words."""
    if unit == "characters" or (unit == "auto" and is_mostly_unspaced(text)):
        return cut_characters(text, limit)
    if limit == 0:
        return ""
    for count, word in enumerate(_WORD.finditer(text), start=1):
        if count == limit:
            return text[: word.end()]
    return text


def cut_texts(note: Note, settings: ModelSettings) -> dict[Slot, str]:
    """A note's title, topics and content, cut to the words that the settings keep."""
    unit = settings.truncation_unit
    topics = tuple(topic for topic in note.topics if topic and len(topic) <= settings.max_topic_length)
    return {
        Slot.TITLE: truncate(note.title.strip(), settings.max_title_words, unit),
        Slot.TOPICS: join_topics(topics[: settings.max_topics], settings.prompt_language),
        Slot.CONTENT: truncate(note.content.strip(), settings.max_content_words, unit),
    }


def shown_texts(note: Note, settings: ModelSettings) -> dict[Slot, str]:
    """A note's title, topics and content as the prompt shows them, before tokens are counted."""
    return {slot: quote(text, settings.prompt_language) for slot, text in cut_texts(note, settings).items()}
