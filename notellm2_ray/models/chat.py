"""Prompts in a model's own chat template, as token ids.

The template's words and users' texts are tokenised separately. Only the former may contain special tokens; in the
latter they are split, so that nothing a user writes can act as a chat mark, an image or an end. Marks in brackets that
are plain words to a tokenizer, such as [INST] for Llama 2, are split as well. Roles that are plain words without
brackets ("USER:" in LLaVA-1.5) cannot be told from users' words; the prompts put users' texts in quotation marks.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from notellm2_ray.core.errors import ModelError
from notellm2_ray.core.prompts import joined
from notellm2_ray.core.recommend_prompts import NO, YES, ImageSlot, Part, Text
from notellm2_ray.models.chat_template import image_tokens, read_template
from notellm2_ray.models.image_frames import ImageFrame, put_images, without_breaks
from notellm2_ray.models.processors import load_processor
from notellm2_ray.models.user_text import UserTextEncoder, leading_ids

_CACHED_TEXTS = 4096
_MARK = re.compile(r"<[^<>\s]{1,40}>|\[[^\[\]\s]{1,40}\]")


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
        image_token_id: the token that an image becomes in the model's input; None for a text-only model.
        placeholder_id: the token that stands once for an image in a prompt. It is the same for most models; for Gemma 3
            it is the mark that begins an image.
        yes_id, no_id: the tokens that tell Yes from No after a prompt and :attr:`Answers.common`.
        special_ids: tokens that no user's text may contain, and the unknown one.
        end_ids: tokens that end an answer, the template's own first.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        image_token: str | None = None,
        image_mark: str | None = None,
    ) -> None:
        """Read a chat template.

        Args:
            tokenizer: any Hugging Face tokenizer.
            template: the chat template; None for a model without one, which gets a plain layout.
            image_token: the token that an image becomes; None for a text-only model.
            image_mark: the placeholder for an image in the template, if it is not ``image_token``.

        Raises:
            ModelError: the template cannot be rendered, or Yes and No are the same token.
        """
        self.tokenizer = tokenizer
        self.template = read_template(tokenizer, template, [one for one in (image_token, image_mark) if one])
        self._texts = UserTextEncoder(tokenizer)
        self._open()
        self.special_ids = set(tokenizer.all_special_ids) | self._texts.forbidden
        self._texts = UserTextEncoder(tokenizer, self._plain_marks())
        self.image_token_id = self._image_id(image_token)
        self.placeholder_id = self._image_id(self.template.placeholder or None)
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
        return cls.of(load_processor(path, revision))

    @classmethod
    def of(cls, processor: Any) -> ChatTokenizer:
        """The tokenizer and template of a processor, or of a tokenizer of a text-only model.

        Raises:
            ModelError: as :meth:`from_pretrained`.
        """
        tokenizer = getattr(processor, "tokenizer", processor)
        template = getattr(processor, "chat_template", None) or tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        return cls(tokenizer, template, *image_tokens(processor))

    def prompt(self, user: Sequence[Part], system: str = "", frames: Sequence[ImageFrame] | None = None) -> list[int]:
        """Token ids of one user turn, ending where the answer begins.

        Without ``frames`` every ``IMAGE`` becomes a single placeholder of the model, with the words that the template
        puts around it. vLLM takes such prompts, and puts in the images' tokens itself. With ``frames``, of
        :func:`~notellm2_ray.models.chat_images.process_image`, the ids are those that a Hugging Face model takes.

        Args:
            user: the turn.
            system: a system message; put into the user's turn if the template takes none.
            frames: one for each ``IMAGE``.

        Raises:
            ModelError: the prompt shows an image and the model reads none.
        """
        left = None if frames is None else iter(frames)
        ids = list(self._start)
        parts = [self._image(left) if isinstance(part, ImageSlot) else part for part in self._turn(user, system)]
        for part in joined(parts):
            ids += self._user(part.value) if isinstance(part, Text) else self._literal(part)
        if frames and self.placeholder_id is not None:
            ids = put_images(ids, [frame.ids for frame in frames], self.placeholder_id)
        return ids

    def text(self, user: Sequence[Part]) -> str:
        """The words of a user's turn with the template's, as :meth:`prompt` tokenises them part by part."""
        parts = [self._image(None) if isinstance(part, ImageSlot) else part for part in self._turn(user, "")]
        return "".join(part.value if isinstance(part, Text) else str(part) for part in parts)

    def _turn(self, user: Sequence[Part], system: str) -> list[Part]:
        words = self.template
        if self.placeholder_id != self.image_token_id:
            user = without_breaks(user)
        if not system:
            return [words.before, *user, words.after]
        if words.before_system is None:
            return [f"{words.before}{system}\n\n", *user, words.after]
        return [words.before_system + system + words.after_system, *user, words.after]

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

    def _image(self, frames: Iterator[ImageFrame] | None) -> str:
        words = self.template
        if not words.image:
            raise ModelError(
                f"this model ({self.tokenizer.name_or_path or 'unnamed'}) reads no images, and the prompt shows one: "
                "choose a Hugging Face image-text model"
            )
        if frames is None:
            return words.image
        frame = next(frames)
        return words.image.replace(words.placeholder, frame.before + words.placeholder + frame.after)

    def _image_id(self, token: str | None) -> int | None:
        if token is None:
            return None
        ids = self._literal(token)
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ModelError(f"the model's image token {token!r} is not a token of its tokenizer")
        return ids[0]

    def _plain_marks(self) -> set[str]:
        """Marks in the template's words that are no tokens: for some tokenizers [INST], say, is a word like others."""
        words = self.template
        around = (words.before, words.before_system or "", words.after_system, words.after, words.answer_end)
        return {
            mark for text in around for mark in _MARK.findall(text) if self.special_ids.isdisjoint(self._literal(mark))
        }

    def _ends(self) -> list[int]:
        ends = [i for i in self._literal(self.template.answer_end) if i in self.special_ids][:1]
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
