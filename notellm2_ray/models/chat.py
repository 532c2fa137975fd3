"""A model's own chat template around prompts of ours, as token ids.

The template's words and the user's are tokenised apart: the former with the tokenizer's special tokens, the latter with
all of them split, so that nothing a user writes becomes a mark of the chat, an image or an end.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import AutoProcessor, PreTrainedTokenizerBase

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.prompts import joined
from notellm2_ray.core.recommend_prompts import IMAGE, NO, YES, ImageSlot, Part, Text
from notellm2_ray.models.llm import first_line
from notellm2_ray.models.quiet import quiet_loading
from notellm2_ray.models.user_text import UserTextEncoder, leading_ids

_SYSTEM, _USER = "0SYSTEM0WORDS0", "0USER0WORDS0"  # stand-ins that no template alters
_CACHED_TEXTS = 4096
# What a template does with words or lists that it was not written for: it refuses, or stumbles over their type.
_RENDERING = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class TemplateWords(NamedTuple):
    """The words that a model's template puts around ours."""

    before: str  # before the user's turn, without a system message
    before_system: str | None  # before the system message; None: the template has no place for one
    after_system: str  # from there to the user's turn
    after: str  # after the user's turn, ending where the answer begins
    image: str  # stands for one image; empty: the model sees none
    answer_space: str  # what the template puts between that and the answer
    answer_end: str  # what it puts after the answer


class Answers(NamedTuple):
    """Yes and no as a model's training string holds them."""

    common: list[int]  # tokens after the prompt that both share: mostly none
    yes: list[int]  # from the first token that differs, without the end of the turn
    no: list[int]


class ChatTokenizer:
    """Prompts to token ids and back. Picklable; may be used from several threads.

    Attributes:
        tokenizer: the model's.
        layout: its template's words.
        image_token_id: the placeholder that the model's image processing multiplies; None for a text-only model.
        yes_id, no_id: the tokens that tell Yes from No after a prompt and :attr:`Answers.common`.
        end_ids: tokens that end an answer, the template's own first.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, image_token: str | None = None
    ) -> None:
        """Read the words of a chat template off it.

        Args:
            tokenizer: any Hugging Face one.
            template: the chat template; None for a model without one, which gets a plain layout.
            image_token: the model's placeholder for an image; None for a text-only model.

        Raises:
            ModelError: the template cannot be rendered, or Yes and No are the same token.
        """
        self.tokenizer = tokenizer
        self._texts = UserTextEncoder(tokenizer)
        self._open()
        image_id: Any = None if image_token is None else tokenizer.convert_tokens_to_ids(image_token)
        self.image_token_id: int | None = image_id
        self.layout = _plain(image_token) if template is None else _read(tokenizer, template, image_token)
        starts = self._literal(self.layout.before_system or self.layout.before)
        self._start = [] if starts[:1] in ([i] for i in tokenizer.all_special_ids) else leading_ids(tokenizer)
        self.end_ids = self._ends()
        self.answers = self._answers()
        self.yes_id, self.no_id = self.answers.yes[0], self.answers.no[0]

    @classmethod
    def from_pretrained(cls, path: str, revision: str | None = None) -> ChatTokenizer:
        """The tokenizer and template of the model in a directory or under a hub name.

        Raises:
            ModelError: there is none, or its template cannot be used.
        """
        processor = load_processor(path, revision)
        tokenizer = getattr(processor, "tokenizer", processor)
        template = getattr(processor, "chat_template", None) or tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        image_token = getattr(processor, "image_token", None)
        return cls(tokenizer, template, getattr(image_token, "content", image_token))

    def prompt(self, user: Sequence[Part], system: str = "") -> list[int]:
        """Token ids of one user turn, ending where the answer begins.

        Every ``IMAGE`` is the model's single placeholder (between the marks that its template puts around it), as
        vLLM's TokensPrompt takes it; :func:`expand_images` makes it what a Hugging Face model takes.

        Args:
            user: the turn.
            system: a message of ours above it; part of the user's turn where the template has no place for one.

        Raises:
            ModelError: an image, and the model sees none.
        """
        layout = self.layout
        if not system:
            parts: list[Part] = [layout.before, *user, layout.after]
        elif layout.before_system is None:
            parts = [f"{layout.before}{system}\n\n", *user, layout.after]
        else:
            parts = [layout.before_system + system + layout.after_system, *user, layout.after]
        ids = list(self._start)
        for part in joined([self._image() if isinstance(part, ImageSlot) else part for part in parts]):
            ids += self._user(part.value) if isinstance(part, Text) else self._literal(part)
        return ids

    def answer(self, yes: bool) -> list[int]:
        """What follows a prompt in training: the answer and the end of the turn."""
        return [*self.answers.common, *(self.answers.yes if yes else self.answers.no), *self.end_ids[:1]]

    def encode(self, text: str) -> list[int]:
        """Token ids of a user's text, without any mark."""
        return list(self._user(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, special ones left out."""
        with self._lock:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def truncate(self, text: str, max_tokens: int) -> str:
        """The longest beginning of ``text`` that takes at most ``max_tokens`` tokens as a user's text."""
        with self._lock:
            if self._count(text) <= max_tokens:
                return text
            fits, too_long = 0, len(text)
            while too_long - fits > 1:
                middle = (fits + too_long) // 2
                if self._count(text[:middle]) <= max_tokens:
                    fits = middle
                else:
                    too_long = middle
        return text[:fits]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_literal", "_user")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def _open(self) -> None:
        # A fast tokenizer holds "split special tokens" as state of its own: two threads would change it under each
        # other. Tokenising under a lock is quicker than a copy of the vocabulary for each thread.
        self._lock = threading.Lock()
        self._literal = lru_cache(_CACHED_TEXTS)(self._encode_literal)
        self._user = lru_cache(_CACHED_TEXTS)(self._encode_user)

    def _encode_literal(self, text: str) -> list[int]:
        with self._lock:
            return self.tokenizer(text, add_special_tokens=False, split_special_tokens=False).input_ids

    def _encode_user(self, text: str) -> list[int]:
        with self._lock:
            return self._texts.encode([text])[0]

    def _count(self, text: str) -> int:
        return len(self._texts.encode([text])[0])

    def _image(self) -> str:
        if not self.layout.image:
            raise ModelError(
                f"this model ({self.tokenizer.name_or_path or 'unnamed'}) sees no images, and the prompt shows one: "
                "choose a Hugging Face image-text model"
            )
        return self.layout.image

    def _ends(self) -> list[int]:
        special = set(self.tokenizer.all_special_ids) | self._texts.forbidden
        ends = [i for i in self._literal(self.layout.answer_end) if i in special][:1]
        eos = self.tokenizer.eos_token_id
        return ends + [i for i in [eos] if i is not None and i not in ends]

    def _answers(self) -> Answers:
        """Yes and no as they stand after the last words of a prompt.

        The ids are read off the tokenised training string, of which the prompt's own must be the beginning: a model
        that is asked at another place than it was trained at answers something else.
        """
        after, space = self.layout.after, self.layout.answer_space
        prompt = self._literal(after)
        found = []
        for word in (YES, NO):
            whole = self._literal(after + space + word)
            if whole[: len(prompt)] != prompt:
                # The end of the prompt merges with the answer. Apart they are tokens all the same, and that is how
                # both training and scoring then put them.
                whole = prompt + self._literal(space + word)
            found.append(whole[len(prompt) :])
        yes, no = found
        common = next((i for i, (one, other) in enumerate(zip(yes, no, strict=False)) if one != other), None)
        if common is None:
            raise ModelError(f"the tokenizer writes {YES!r} and {NO!r} as {yes} and {no}: they cannot be told apart")
        return Answers(yes[:common], yes[common:], no[common:])


def expand_images(ids: Sequence[int], counts: Sequence[int], image_token_id: int) -> list[int]:
    """Token ids with the i-th image placeholder repeated ``counts[i]`` times.

    Raises:
        ValueError: there are more or fewer placeholders than counts.
    """
    places = [place for place, i in enumerate(ids) if i == image_token_id]
    if len(places) != len(counts):
        raise ValueError(f"{len(places)} image placeholders in the prompt, {len(counts)} images")
    expanded: list[int] = []
    begin = 0
    for place, count in zip(places, counts, strict=True):
        expanded += [*ids[begin:place], *[image_token_id] * count]
        begin = place + 1
    return [*expanded, *ids[begin:]]


@quiet_loading()
def load_processor(path: str, revision: str | None = None) -> Any:
    """The processor of an image-text model, or the tokenizer of a text-only one.

    Raises:
        ModelError: there is neither.
    """
    try:
        return AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise ModelError(
            f"{path} has no usable tokenizer or processor: {first_line(error)}. A generating model needs the "
            "directory or hub name of a Hugging Face model with its tokenizer (and its processor, if it sees images)"
        ) from error


def _plain(image_token: str | None) -> TemplateWords:
    return TemplateWords("", "", "\n\n", "\n", f"{image_token}\n" if image_token else "", "", "")


def _read(tokenizer: PreTrainedTokenizerBase, template: str, image_token: str | None) -> TemplateWords:
    """A template's words, cut out of what it renders of stand-ins."""

    def render(content: Any, system: str | None = None, answer: str | None = None) -> str:
        return _render(tokenizer, template, content, system, answer)

    content: Any = [{"type": "text", "text": _USER}]
    try:
        around = _cut(render(content), _USER)
        if around is None or "'type'" in around[0] or '"type"' in around[0]:
            raise ValueError("it does not take lists")
    except Exception:  # a template can raise what it likes; those of text models may take strings only
        content = _USER
        around = _cut_or_fail(lambda: render(content))
    before, after = around
    image = _image_words(render, before, image_token)
    before_system, after_system = _system_words(render, content)
    space, end = _answer_words(render, content, before + _USER + after)
    return TemplateWords(before, before_system, after_system, after, image, space, end)


def _render(tokenizer: Any, template: str, content: Any, system: str | None, answer: str | None) -> str:
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    in_lists = isinstance(content, list)
    if system is not None:
        text = [{"type": "text", "text": system}] if in_lists else system
        messages.insert(0, {"role": "system", "content": text})
    if answer is not None:
        text = [{"type": "text", "text": answer}] if in_lists else answer
        messages.append({"role": "assistant", "content": text})
    # A date of its own would give every day other prompts; a model that can think aloud is asked not to.
    fixed = {"date_string": "26 Jul 2024", "enable_thinking": False}
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=answer is None, **fixed
    )


def _cut(text: str, stand_in: str) -> tuple[str, str] | None:
    pieces = text.split(stand_in)
    return (pieces[0], pieces[1]) if len(pieces) == 2 else None


def _cut_or_fail(render: Any) -> tuple[str, str]:
    try:
        around = _cut(render(), _USER)
    except _RENDERING as error:
        raise ModelError(f"the model's chat template cannot be rendered: {first_line(error)}") from error
    if around is None:
        raise ModelError("the model's chat template does not repeat the user's words once, as a chat template must")
    return around


def _image_words(render: Any, before: str, image_token: str | None) -> str:
    """What stands for an image before the user's words. Some templates put all images first, wherever they come."""
    if image_token is None:
        return ""
    try:
        around = _cut(render([{"type": "image"}, {"type": "text", "text": _USER}]), _USER)
    except _RENDERING:
        around = None
    if around is None or not around[0].startswith(before) or around[0].count(image_token) != 1:
        return f"{image_token}\n"
    return around[0][len(before) :]


def _system_words(render: Any, content: Any) -> tuple[str | None, str]:
    try:
        around = _cut(render(content, _SYSTEM), _SYSTEM)
    except _RENDERING:  # Mistral's and Gemma's refuse a system message
        return None, ""
    between = None if around is None else _cut(around[1], _USER)
    return (None, "") if around is None or between is None else (around[0], between[0])


def _answer_words(render: Any, content: Any, prompt: str) -> tuple[str, str]:
    """What stands between prompt and answer in a finished conversation, and what after the answer."""
    try:
        around = _cut(render(content, None, _SYSTEM), _SYSTEM)
    except _RENDERING:
        around = None
    if around is None:
        return "", ""
    space = around[0][len(prompt) :] if around[0].startswith(prompt) else ""
    return (space if not space.strip() else ""), around[1]


__all__ = ["IMAGE", "Answers", "ChatTokenizer", "TemplateWords", "Text", "expand_images", "load_processor"]
