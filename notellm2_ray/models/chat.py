"""Prompts in a model's own chat template, as token ids.

The template's words and users' texts are tokenised separately. Only the former may contain special tokens; in the
latter they are split, so that nothing a user writes can act as a chat mark, an image or an end.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import AutoProcessor, PreTrainedTokenizerBase

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.prompts import joined
from notellm2_ray.core.recommend_prompts import NO, YES, ImageSlot, Part, Text
from notellm2_ray.models.chat_template import read_template
from notellm2_ray.models.llm import first_line
from notellm2_ray.models.quiet import quiet_loading
from notellm2_ray.models.user_text import UserTextEncoder, leading_ids

_CACHED_TEXTS = 4096


class Answers(NamedTuple):
    """The tokens of Yes and No after a prompt, as in the text that a model is trained on."""

    common: list[int]  # first tokens that both share; usually none
    yes: list[int]  # from the first token that differs, without the end of the turn
    no: list[int]


class ChatTokenizer:
    """Turns prompts into token ids and back. Picklable; may be used from several threads.

    Attributes:
        tokenizer: of the model.
        template: the words of its chat template.
        image_token_id: the placeholder that the model's image processing repeats; None for a text-only model.
        yes_id, no_id: the tokens that tell Yes from No after a prompt and :attr:`Answers.common`.
        end_ids: tokens that end an answer, the template's own first.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, image_token: str | None = None
    ) -> None:
        """Read a chat template.

        Args:
            tokenizer: any Hugging Face tokenizer.
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
        self.template = read_template(tokenizer, template, image_token)
        starts = self._literal(self.template.before_system or self.template.before)
        self._start = [] if starts[:1] in ([i] for i in tokenizer.all_special_ids) else leading_ids(tokenizer)
        self.end_ids = self._ends()
        self.answers = self._answers()
        self.yes_id, self.no_id = self.answers.yes[0], self.answers.no[0]

    @classmethod
    def from_pretrained(cls, path: str, revision: str | None = None) -> ChatTokenizer:
        """The tokenizer and template of the model in a directory or under a hub name.

        Raises:
            ModelError: there is no tokenizer, or the template cannot be used.
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

        Every ``IMAGE`` becomes a single placeholder of the model, with the marks that the template puts around it. vLLM
        takes such prompts; for a Hugging Face model, :func:`expand_images` repeats the placeholder.

        Args:
            user: the turn.
            system: a system message; put into the user's turn if the template takes none.

        Raises:
            ModelError: the prompt shows an image and the model reads none.
        """
        words = self.template
        if not system:
            parts: list[Part] = [words.before, *user, words.after]
        elif words.before_system is None:
            parts = [f"{words.before}{system}\n\n", *user, words.after]
        else:
            parts = [words.before_system + system + words.after_system, *user, words.after]
        ids = list(self._start)
        for part in joined([self._image() if isinstance(part, ImageSlot) else part for part in parts]):
            ids += self._user(part.value) if isinstance(part, Text) else self._literal(part)
        return ids

    def answer(self, yes: bool) -> list[int]:
        """The tokens after a prompt in training: the answer and the end of the turn."""
        return [*self.answers.common, *(self.answers.yes if yes else self.answers.no), *self.end_ids[:1]]

    def encode(self, text: str) -> list[int]:
        """Token ids of a user's text, without special tokens."""
        return list(self._user(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated tokens, without special tokens."""
        with self._lock:
            return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def truncate(self, text: str, max_tokens: int) -> str:
        """The longest beginning of ``text`` that has at most ``max_tokens`` tokens as a user's text."""
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
        # "Split special tokens" is state inside a fast tokenizer, so two threads would interfere. A lock costs less
        # than a copy of the vocabulary for each thread.
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
        if not self.template.image:
            raise ModelError(
                f"this model ({self.tokenizer.name_or_path or 'unnamed'}) reads no images, and the prompt shows one: "
                "choose a Hugging Face image-text model"
            )
        return self.template.image

    def _ends(self) -> list[int]:
        special = set(self.tokenizer.all_special_ids) | self._texts.forbidden
        ends = [i for i in self._literal(self.template.answer_end) if i in special][:1]
        eos = self.tokenizer.eos_token_id
        return ends + [i for i in [eos] if i is not None and i not in ends]

    def _answers(self) -> Answers:
        """The tokens of Yes and No after the last words of a prompt.

        They are read from the tokenised training text, which must begin with the prompt's own tokens. Otherwise the
        model would be asked at another place than it was trained at.
        """
        after, space = self.template.after, self.template.answer_space
        prompt = self._literal(after)
        found = []
        for word in (YES, NO):
            whole = self._literal(after + space + word)
            if whole[: len(prompt)] != prompt:
                # The end of the prompt merges with the answer into one token. Training and scoring then both use the
                # tokens of the two separately.
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
            f"{path} has no usable tokenizer or processor: {first_line(error)}. Give the "
            "directory or hub name of a Hugging Face model with its tokenizer, and its processor if it reads images"
        ) from error
